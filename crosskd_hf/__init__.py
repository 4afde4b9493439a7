"""Cross-head knowledge distillation (CrossKD, arXiv 2306.11369) of dense object detectors, for Hugging Face.

Importing the package registers its detectors with transformers' auto classes and its `object-detection` pipeline.
"""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES

from .data.coco import load_coco
from .data.columns import load_columns
from .data.dataset import DetectionDataset
from .data.errors import DataError
from .data.shapes import load_shapes
from .data.split import DetectionSplit, keep_for_training
from .distillation import PKD, CrossKD, DistillationPair, KDMethod, Mimic
from .inference.pipeline import DenseDetectionPipeline
from .inference.pipeline import register as _register_pipeline
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
from .version import __version__

for _name, _config in CONFIGS.items():
    _model = MODELS[_name]
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForObjectDetection.register(_config, _model, exist_ok=True)
    AutoImageProcessor.register(_config, fast_image_processor_class=DenseDetectorImageProcessor, exist_ok=True)
    # The pipeline looks names up here, and warns about models that it doesn't find.
    MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES[_config.model_type] = _model.__name__
_register_pipeline()

__all__ = [
    "CONFIGS",
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
    "DetectionDataset",
    "DetectionSplit",
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
    "Recipe",
    "RetinaNetConfig",
    "RetinaNetForObjectDetection",
    "__version__",
    "keep_for_training",
    "load_coco",
    "load_columns",
    "load_recipe",
    "load_shapes",
]
