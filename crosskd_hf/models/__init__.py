"""The detectors. Names are loaded when they are first used: configurations need no torch."""

from typing import TYPE_CHECKING

from ..utils.lazy_names import lazy_names

if TYPE_CHECKING:
    from .atss import ATSSForObjectDetection
    from .base import DenseDetector
    from .configuration import CONFIGS, ATSSConfig, DenseDetectorConfig, FCOSConfig, GFLConfig, RetinaNetConfig
    from .detectors import MODELS
    from .fcos import FCOSForObjectDetection
    from .gfl import GFLForObjectDetection
    from .outputs import DenseDetectorOutput
    from .retinanet import RetinaNetForObjectDetection

# Module -> the public names that it holds.
HOMES = {
    "atss": ("ATSSForObjectDetection",),
    "base": ("DenseDetector",),
    "configuration": ("CONFIGS", "ATSSConfig", "DenseDetectorConfig", "FCOSConfig", "GFLConfig", "RetinaNetConfig"),
    "detectors": ("MODELS",),
    "fcos": ("FCOSForObjectDetection",),
    "gfl": ("GFLForObjectDetection",),
    "outputs": ("DenseDetectorOutput",),
    "retinanet": ("RetinaNetForObjectDetection",),
}
__getattr__, __dir__ = lazy_names(__name__, HOMES)

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
