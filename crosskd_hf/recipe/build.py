"""A recipe -> the trainer that it describes, with its models, data sets, image processor and training arguments."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence

from transformers import set_seed

from ..data.load import load_datasets
from ..distillation.methods import method_class
from ..distillation.weight_inheritance import inherit_weights
from ..models import MODELS
from ..models.architecture import ArchitectureSection, build_config
from ..models.base import DenseDetector
from ..models.image_processing import DenseDetectorImageProcessor
from ..training.arguments import DetectionTrainingArguments
from ..training.distillation_trainer import DistillationTrainer
from ..training.run_log import use_run_log
from ..training.trainer import DetectionTrainer
from ..utils.messages import first_line
from ..utils.progress import say
from ..weights.loading import for_labels, load_backbone_weights, load_detector
from .sections import ModelSection, Recipe, TeacherSection

logger = logging.getLogger(__name__)


def build_trainer(recipe: Recipe, arguments: DetectionTrainingArguments | None = None) -> DetectionTrainer:
    """Build everything that a recipe describes, ready to train. The same recipe gives the same weights.

    Args:
        recipe: what to build.
        arguments: the recipe's training arguments, if there are some already.

    Raises:
        RecipeError, CheckpointError, ValueError, OSError: data, weights or arguments can't be used.
    """
    args = arguments or recipe.training_arguments()
    set_seed(args.seed)  # new weights are drawn before the Trainer seeds for itself
    train_dataset, eval_dataset = load_datasets(recipe.data, args.seed)
    names = train_dataset.split.label_names
    model = build_model(recipe.model, names)
    processor = DenseDetectorImageProcessor.for_model(model.config, recipe.data.short_side, recipe.data.long_side)
    parts = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "processing_class": processor}
    if recipe.teacher is None:
        trainer = DetectionTrainer(model, args, **parts)
    else:
        teacher = load_teacher(recipe.teacher, names)
        if recipe.model.inherit:
            say(inherit_weights(model, teacher, recipe.model.inherit))
        methods = [method_class(name)(settings) for name, settings in recipe.distillation.methods.items()]
        trainer = DistillationTrainer(model, teacher, args, methods=methods, **parts)
    use_run_log(trainer)
    return trainer


@contextlib.contextmanager
def _names_section(name: str) -> Iterator[None]:
    """Put the recipe's section before the key that an error begins with."""
    try:
        yield
    except ValueError as error:
        if str(error).partition(" ")[0] in {field.name for field in dataclasses.fields(ArchitectureSection)}:
            raise ValueError(f"{name}.{error}") from error
        raise


@_names_section("model")
def build_model(section: ModelSection, label_names: Sequence[str]) -> DenseDetector:
    """The model a recipe trains: from a checkpoint, or new on a pretrained or random backbone.

    Raises:
        ValueError: if the backbone or its weights can't be used.
        CheckpointError: if the checkpoint can't be used.
    """
    if section.checkpoint:
        return for_labels(load_detector(section.checkpoint, section, label_names), label_names)
    config = build_config(section, label_names)
    if section.backbone_weights == "random" and config.frozen_stages:
        logger.warning(
            "model.backbone_weights is random: model.frozen_stages is 0 instead of %d, since stages without training "
            "would keep random weights",
            config.frozen_stages,
        )
        config.frozen_stages = 0
    pretrained = section.backbone_weights == "pretrained"
    try:
        model = MODELS[section.detector](config, pretrained_backbone=pretrained)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise ValueError(
            f"the ImageNet weights of {section.backbone} can't be fetched ({first_line(error)}). Without "
            "network, give a file as model.backbone_weights, or model.backbone_weights=random to start from scratch."
        ) from error
    if section.backbone_weights not in ("pretrained", "random"):
        load_backbone_weights(model, section.backbone_weights)
    return model


@_names_section("teacher")
def load_teacher(section: TeacherSection, label_names: Sequence[str]) -> DenseDetector:
    """The teacher of a recipe.

    Args:
        section: its checkpoint is a folder, a Hub id, an MMDetection `.pth` by path or URL, or "random" (for trials of
            the machinery only). The architecture fields count for the last two.
        label_names: the data's labels, which a `.pth` without names is taken to have.

    Raises:
        CheckpointError: if the checkpoint can't be used.
    """
    if section.checkpoint == "random":
        logger.warning("the teacher has random weights: nothing can be learnt from it")
        return MODELS[section.detector](build_config(section, label_names))
    return load_detector(section.checkpoint, section, label_names)
