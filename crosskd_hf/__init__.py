"""Cross-head knowledge distillation (CrossKD, arXiv 2306.11369) of object detectors, for Hugging Face.

Importing the package registers its detectors with transformers' auto classes and its `object-detection` pipeline,
before or after transformers is imported. Names are loaded when they are first used.
"""

from typing import TYPE_CHECKING

from . import registration
from .utils.lazy_names import lazy_names
from .version import __version__

if TYPE_CHECKING:
    from .data.coco import load_coco
    from .data.collator import DetectionCollator
    from .data.columns import load_columns
    from .data.dataset import DetectionDataset
    from .data.errors import DataError
    from .data.shapes import load_shapes
    from .data.split import DetectionSplit, keep_for_training
    from .data.stream import DetectionStream, load_stream
    from .data.voc import load_voc
    from .data.yolo import load_yolo
    from .distillation import (
        BCKD,
        CWD,
        FGD,
        LD,
        MGD,
        PKD,
        CrossKD,
        DistillationPair,
        KDMethod,
        Mimic,
        PairError,
        QueryCrossKD,
        QueryMimic,
        SoftBoxes,
        pair_up,
    )
    from .inference.pipeline import DenseDetectionPipeline
    from .models import (
        CONFIGS,
        MODELS,
        ATSSConfig,
        ATSSForObjectDetection,
        DenseDetector,
        DenseDetectorConfig,
        DenseDetectorOutput,
        FCOSConfig,
        FCOSForObjectDetection,
        GFLConfig,
        GFLForObjectDetection,
        RetinaNetConfig,
        RetinaNetForObjectDetection,
    )
    from .models.image_processing import DenseDetectorImageProcessor
    from .recipe.distillation import DistillationSection
    from .recipe.load import load_recipe
    from .recipe.sections import Recipe
    from .training.arguments import DetectionTrainingArguments
    from .training.coco_metrics import CocoEvaluator
    from .training.distillation_trainer import DistillationTrainer
    from .training.trainer import DetectionTrainer

# Module -> the public names that it holds.
HOMES = {
    "data.coco": ("load_coco",),
    "data.collator": ("DetectionCollator",),
    "data.columns": ("load_columns",),
    "data.dataset": ("DetectionDataset",),
    "data.errors": ("DataError",),
    "data.shapes": ("load_shapes",),
    "data.split": ("DetectionSplit", "keep_for_training"),
    "data.stream": ("DetectionStream", "load_stream"),
    "data.voc": ("load_voc",),
    "data.yolo": ("load_yolo",),
    "distillation": (
        "BCKD",
        "CWD",
        "FGD",
        "LD",
        "MGD",
        "PKD",
        "CrossKD",
        "DistillationPair",
        "KDMethod",
        "Mimic",
        "PairError",
        "QueryCrossKD",
        "QueryMimic",
        "SoftBoxes",
        "pair_up",
    ),
    "inference.pipeline": ("DenseDetectionPipeline",),
    "models": (
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
    ),
    "models.image_processing": ("DenseDetectorImageProcessor",),
    "recipe.distillation": ("DistillationSection",),
    "recipe.load": ("load_recipe",),
    "recipe.sections": ("Recipe",),
    "training.arguments": ("DetectionTrainingArguments",),
    "training.coco_metrics": ("CocoEvaluator",),
    "training.distillation_trainer": ("DistillationTrainer",),
    "training.trainer": ("DetectionTrainer",),
}
__getattr__, __dir__ = lazy_names(__name__, HOMES)

registration.install()

__all__ = [
    "BCKD",
    "CONFIGS",
    "CWD",
    "FGD",
    "LD",
    "MGD",
    "MODELS",
    "PKD",
    "ATSSConfig",
    "ATSSForObjectDetection",
    "CocoEvaluator",
    "CrossKD",
    "DataError",
    "DenseDetectionPipeline",
    "DenseDetector",
    "DenseDetectorConfig",
    "DenseDetectorImageProcessor",
    "DenseDetectorOutput",
    "DetectionCollator",
    "DetectionDataset",
    "DetectionSplit",
    "DetectionStream",
    "DetectionTrainer",
    "DetectionTrainingArguments",
    "DistillationPair",
    "DistillationSection",
    "DistillationTrainer",
    "FCOSConfig",
    "FCOSForObjectDetection",
    "GFLConfig",
    "GFLForObjectDetection",
    "KDMethod",
    "Mimic",
    "PairError",
    "QueryCrossKD",
    "QueryMimic",
    "Recipe",
    "RetinaNetConfig",
    "RetinaNetForObjectDetection",
    "SoftBoxes",
    "__version__",
    "keep_for_training",
    "load_coco",
    "load_columns",
    "load_recipe",
    "load_shapes",
    "load_stream",
    "load_voc",
    "load_yolo",
    "pair_up",
]
