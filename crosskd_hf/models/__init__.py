"""The detectors."""

from .configuration_dense import DenseDetectorConfig, GFLConfig
from .gfl import GFLForObjectDetection
from .modeling_dense import DenseDetector, DenseDetectorOutput

CONFIGS = {"gfl": GFLConfig}
MODELS = {"gfl": GFLForObjectDetection}

__all__ = ["CONFIGS", "MODELS", "DenseDetector", "DenseDetectorConfig", "DenseDetectorOutput", "GFLConfig", "GFLForObjectDetection"]
