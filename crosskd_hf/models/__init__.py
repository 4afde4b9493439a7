"""The detectors."""

from .atss import ATSSForObjectDetection
from .base import DenseDetector
from .configuration import ATSSConfig, DenseDetectorConfig, FCOSConfig, GFLConfig, RetinaNetConfig
from .fcos import FCOSForObjectDetection
from .gfl import GFLForObjectDetection
from .outputs import DenseDetectorOutput
from .retinanet import RetinaNetForObjectDetection

CONFIGS = {"gfl": GFLConfig, "retinanet": RetinaNetConfig, "fcos": FCOSConfig, "atss": ATSSConfig}
MODELS = {
    "gfl": GFLForObjectDetection,
    "retinanet": RetinaNetForObjectDetection,
    "fcos": FCOSForObjectDetection,
    "atss": ATSSForObjectDetection,
}

__all__ = [
    "CONFIGS",
    "MODELS",
    "ATSSConfig",
    "ATSSForObjectDetection",
    "DenseDetector",
    "DenseDetectorConfig",
    "DenseDetectorOutput",
    "FCOSConfig",
    "FCOSForObjectDetection",
    "GFLConfig",
    "GFLForObjectDetection",
    "RetinaNetConfig",
    "RetinaNetForObjectDetection",
]
