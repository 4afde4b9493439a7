"""The dense detectors by name."""

from .atss import ATSSForObjectDetection
from .base import DenseDetector
from .fcos import FCOSForObjectDetection
from .gfl import GFLForObjectDetection
from .retinanet import RetinaNetForObjectDetection

MODELS: dict[str, type[DenseDetector]] = {
    "gfl": GFLForObjectDetection,
    "retinanet": RetinaNetForObjectDetection,
    "fcos": FCOSForObjectDetection,
    "atss": ATSSForObjectDetection,
}
