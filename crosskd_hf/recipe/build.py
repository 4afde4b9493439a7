"""A recipe -> the trainer that it describes, with its models, data sets, image processor and training arguments."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoModelForObjectDetection, BaseImageProcessor, PretrainedConfig, PreTrainedModel, set_seed
from transformers.image_utils import SizeDict

from ..data.load import load_datasets, load_unlabeled_dataset
from ..data.settings import DataSection
from ..distillation.methods import method_class
from ..distillation.weight_inheritance import inherit_weights
from ..models import MODELS
from ..models.architecture import ArchitectureSection, build_config, build_transformers_config
from ..models.families import FAMILIES, backbone_name, is_dense, side_divisor, strides_of
from ..models.image_processing import DenseDetectorImageProcessor
from ..models.transformers_detectors import prepare_new, processor_of
from ..training.arguments import DetectionTrainingArguments
from ..training.distillation_trainer import DistillationTrainer
from ..training.run_log import use_run_log
from ..training.trainer import DetectionTrainer
from ..training.trainer_inputs import processor_for
from ..utils.messages import first_line
from ..utils.progress import say
from ..weights.loading import (
    for_labels,
    load_backbone_weights,
    load_detector,
    load_pretrained_backbone,
    load_processor,
)
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
    processor = build_processor(model.config, recipe.model.saved, recipe.data)
    check_queries(model.config, processor, recipe.data, "model")
    if not is_dense(model.config) and not recipe.model.saved:
        check_forward(model, processor)
    parts: dict[str, Any] = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    parts["processing_class"] = processor
    if recipe.teacher is None:
        trainer = DetectionTrainer(model, args, **parts)
    else:
        teacher = load_teacher(recipe.teacher, names)
        if recipe.model.inherit and not (is_dense(model.config) and is_dense(teacher.config)):
            raise ValueError("model.inherit is for two dense detectors: set model.inherit=[]")
        if recipe.model.inherit:
            say(inherit_weights(model, teacher, recipe.model.inherit))
        methods = [method_class(name)(settings) for name, settings in recipe.distillation.methods.items()]
        check_queries(teacher.config, processor, recipe.data, "teacher")
        saved = teacher if recipe.teacher.checkpoint == "random" else recipe.teacher.checkpoint
        parts["teacher_processor"] = processor_for(saved, teacher.config)
        parts["unlabeled_dataset"] = load_unlabeled_dataset(recipe.data, args.seed)
        parts["unlabeled_ratio"] = recipe.data.unlabeled_ratio
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
def build_model(section: ModelSection, label_names: Sequence[str]) -> PreTrainedModel:
    """The model a recipe trains: from a checkpoint, or new on a pretrained or random backbone.

    Raises:
        ValueError: if the backbone or its weights can't be used.
        CheckpointError: if the checkpoint can't be used.
    """
    if section.saved:
        return for_labels(load_detector(section.saved, section, label_names), label_names)
    if section.detector in FAMILIES:
        return _new_transformers_detector(section, label_names)
    config = build_config(section, label_names)
    if section.backbone_weights == "random" and config.frozen_stages:
        logger.warning(
            "model.backbone_weights is random: model.frozen_stages is 0 instead of %d, since stages without training "
            "would keep random weights",
            config.frozen_stages,
        )
        config.frozen_stages = 0
    pretrained = section.backbone_weights == "pretrained"
    with _fetched(section.backbone) if pretrained else contextlib.nullcontext():
        model = MODELS[section.detector](config, pretrained_backbone=pretrained)
    if section.backbone_weights not in ("pretrained", "random"):
        load_backbone_weights(model, section.backbone_weights)
    return model


def _new_transformers_detector(section: ModelSection, label_names: Sequence[str]) -> PreTrainedModel:
    model = new_from_config(section, label_names)
    if section.backbone_weights == "pretrained":
        with _fetched(backbone_name(model.config)):
            load_pretrained_backbone(model)
    elif section.backbone_weights not in ("random", None):
        load_backbone_weights(model, section.backbone_weights)
    prepare_new(model, frozen_stem=section.backbone_weights != "random")
    if not any(parameter.requires_grad for name, parameter in model.named_parameters() if "backbone" in name):
        logger.warning(
            "transformers freezes the complete backbone of this %s: it stays as it is. One of timm (model.config: "
            "{backbone_config: {model_type: timm_backbone, backbone: resnet50, ...}}) is trained",
            section.detector,
        )
    return model


def new_from_config(section: ArchitectureSection, label_names: Sequence[str]) -> PreTrainedModel:
    """A detector of transformers of random weights.

    Raises:
        ValueError: its configuration makes no model; the message begins with "config".
    """
    config = build_transformers_config(section, label_names)
    try:
        return AutoModelForObjectDetection.from_config(config)
    except (ValueError, RuntimeError, KeyError, IndexError) as error:  # each family and timm check in their own way
        raise ValueError(f"config makes no {section.detector} that can be built: {first_line(error)}") from error


def check_forward(model: PreTrainedModel, processor: Any) -> None:
    """Raise ValueError if a new detector of transformers fails at an image: its configuration isn't checked before.

    Args:
        model: the detector.
        processor: makes the images.
    """
    size = processor.size
    height, width = size.height or size.shortest_edge, size.width or size.shortest_edge
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, height, width))
    except (ValueError, RuntimeError, KeyError, IndexError) as error:
        raise ValueError(
            f"model.config makes a {model.config.model_type} that fails at an image of {height} x {width}: the levels "
            f"of its backbone, encoder and decoder must fit each other ({first_line(error)})"
        ) from error
    model.train(training)


@contextlib.contextmanager
def _fetched(backbone: str) -> Iterator[None]:
    """Say what to do where ImageNet weights can't be fetched."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"the ImageNet weights of {backbone} can't be fetched ({first_line(error)}). Without "
            "network, give a file as model.backbone_weights, or model.backbone_weights=random to start from scratch."
        ) from error


def check_queries(config: PretrainedConfig, processor: Any, data: DataSection, name: str) -> None:
    """Raise ValueError if a detector picks more queries than its encoder has tokens at the data's size.

    Args:
        config: of the detector, which is called `name`.
        processor: makes the images.
        data: the recipe's section.
    """
    strides, size = strides_of(config), processor.size
    picks = not is_dense(config) and getattr(config, "two_stage", True)
    if not (picks and strides and size.height):
        return
    count = getattr(config, "two_stage_num_proposals", config.num_queries)
    drawn = [(side, side) for side in data.multiscale_short_sides if data.multiscale == "batch"]
    height, width = min([(size.height, size.width), *drawn])
    tokens = sum(math.ceil(height / stride) * math.ceil(width / stride) for stride in strides)
    if tokens < count:
        raise ValueError(
            f"the {name} picks {count} queries, but images of {height} x {width} give its encoder {tokens} "
            "places: raise data.size, or lower num_queries in its config"
        )


def build_processor(config: PretrainedConfig, saved: str | None, data: DataSection) -> BaseImageProcessor:
    """The image processor that goes with a detector, with the sizes of the recipe's data.

    Args:
        config: of the detector.
        saved: where the detector comes from, if it isn't new.
        data: `size`, or `short_side` and `long_side` where the detector's processor keeps the ratio.

    Raises:
        ValueError: sizes that the detector can't take; the message begins with the key.
        CheckpointError: the saved processor can't be read.
    """
    if is_dense(config):
        if data.size is not None or data.multiscale == "batch":
            key = "data.size" if data.size is not None else "data.multiscale=batch"
            raise ValueError(f"{key} is for detectors of transformers: for this one set data.short_side and long_side")
        return DenseDetectorImageProcessor.for_model(config, data.short_side, data.long_side)
    processor: Any = load_processor(saved) if saved else processor_of(config)
    if data.size is not None:
        processor.size = SizeDict(height=data.size[0], width=data.size[1])
    elif processor.size.shortest_edge:
        processor.size = SizeDict(shortest_edge=data.short_side, longest_edge=data.long_side)
    fixed = bool(processor.size.height)
    if fixed and (data.short_side, data.long_side) != (DataSection.short_side, DataSection.long_side):
        raise ValueError(
            f"data.short_side and data.long_side are for detectors that keep an image's ratio; {config.model_type} "
            f"gets all images at {processor.size.height} x {processor.size.width}: set data.size"
        )
    if data.multiscale != "none" and fixed != (data.multiscale == "batch"):
        raise ValueError(
            f"data.multiscale is {data.multiscale}, but {config.model_type}'s images have "
            + ("one size: set batch" if fixed else "their own ratio: set range or choice, or data.size")
        )
    divisor, sides = side_divisor(config), [processor.size.height, processor.size.width] if fixed else []
    sides += data.multiscale_short_sides if data.multiscale == "batch" else []
    if divisor > 1 and not fixed:
        raise ValueError(f"data.size is null, but {config.model_type} needs images of one size: set it, as [640, 640]")
    if wrong := [side for side in sides if side % divisor]:
        raise ValueError(f"data.size and multiscale_short_sides must be multiples of {divisor}, not {wrong}")
    return processor


@_names_section("teacher")
def load_teacher(section: TeacherSection, label_names: Sequence[str]) -> PreTrainedModel:
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
        if section.detector in FAMILIES:
            return new_from_config(section, label_names)
        return MODELS[section.detector](build_config(section, label_names))
    return load_detector(section.checkpoint, section, label_names)
