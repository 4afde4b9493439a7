"""What a trainer is given: made of what stands for it, and refused where it can't work."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_tensorboard_available, is_trackio_available, is_wandb_available
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..data.dataset import DetectionDataset
from ..data.processor_size import plain_size
from ..data.split import DetectionSplit
from ..data.stream import DetectionStream
from ..models.base import DenseDetector
from ..models.families import FAMILIES, is_dense, label_names_of
from ..models.image_processing import DenseDetectorImageProcessor
from ..models.transformers_detectors import processor_of, use_fp32_losses
from ..utils.label_names import coco_spelling, near_matches, spelling_problem
from ..utils.messages import listed
from ..weights.loading import load_detector, load_processor
from .arguments import DetectionTrainingArguments

# Tracker, which is also the name of its package -> whether it is installed.
TRACKER_PACKAGES = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "trackio": is_trackio_available,
}


def as_detector(model: PreTrainedModel | str) -> PreTrainedModel:
    """A detector, loaded if a folder or Hub id names it.

    Raises:
        ValueError: it is a model of another kind.
    """
    if hasattr(model, "merge_and_unload"):
        raise ValueError(
            "a PEFT model can't be trained here, as only what it adds would be saved: train it with transformers' "
            "Trainer, or give this trainer model.merge_and_unload()"
        )
    if not isinstance(model, PreTrainedModel):
        return load_detector(str(model))
    if not is_dense(model.config) and model.config.model_type not in FAMILIES:
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}) is no detector that can be trained here; of "
            f"transformers' those of {', '.join(FAMILIES)} are."
        )
    return model


def first_detector(
    model: PreTrainedModel | str | None,
    model_init: Callable[..., PreTrainedModel] | None,
    optimizers: tuple = (None, None),
) -> Any:
    """The detector that a trainer begins with; of a `model_init`, one that shows what it makes.

    Raises:
        ValueError: neither is given, or both, or optimizers, which know the parameters of one model only; see
            `as_detector`.
    """
    if (model is None) == (model_init is None):
        raise ValueError("give the trainer a model or a model_init: one of the two")
    if model_init is not None and any(optimizers):
        raise ValueError("optimizers can't be given with model_init: each training makes its own")
    if model_init is None:
        assert model is not None
        return as_detector(model)
    takes_trial = len(inspect.signature(model_init).parameters) > 0
    return as_detector(model_init(None) if takes_trial else model_init())


def prepare_detector(
    detector: PreTrainedModel,
    args: DetectionTrainingArguments,
    datasets: Mapping[str, DetectionDataset | DetectionStream | None],
) -> None:
    """Check a detector against arguments and data, and set it up for training.

    Args:
        detector: is changed.
        args: of the trainer.
        datasets: what messages call each -> data set.

    Raises:
        ValueError: data has other classes, or the detector can't do what the arguments ask for.
    """
    for name, dataset in datasets.items():
        if dataset is not None:
            check_classes(detector, dataset, name, "give the model id2label=split.id2label")
    if isinstance(detector, DenseDetector):
        if args.standalone:  # transformers' own detectors need nothing
            detector.mark_standalone(True)
    else:
        use_fp32_losses(detector)
        if getattr(args, "activation_checkpointing", False) and not detector.supports_gradient_checkpointing:
            kind = detector.config.model_type
            raise ValueError(f"training.activation_checkpointing is true, but {kind} can't do it: set it to false.")
    if args.channels_last:
        detector.to(memory_format=torch.channels_last)  # type: ignore[call-arg]


def processor_for(model: PreTrainedModel | str | None, config: PreTrainedConfig) -> BaseImageProcessor:
    """The image processor of a detector: of transformers' own the one saved beside it, if a folder or Hub id names it.

    Args:
        model: as it was given.
        config: of the detector.
    """
    saved = isinstance(model, str) and not is_dense(config)
    return load_processor(str(model)) if saved else processor_of(config)


def refuse_unsupported(args: DetectionTrainingArguments) -> None:
    """Raise ValueError if the arguments ask for DataParallel, FSDP, DeepSpeed, or a tracker that isn't installed."""
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs, which would make it DataParallel: start one process a GPU with "
            "`accelerate launch --multi_gpu`, or hide the others with CUDA_VISIBLE_DEVICES=0."
        )
    for tracker, is_available in TRACKER_PACKAGES.items():
        if tracker in (args.report_to or ()) and not is_available():
            raise ValueError(
                f"training.report_to={tracker} needs the package {tracker}: pip install {tracker}, or, in a clone of "
                'the repository, pip install -e ".[tracking]"; or set training.report_to=none.'
            )
    if args.fsdp or args.deepspeed:
        raise ValueError("FSDP and DeepSpeed aren't supported; these detectors fit a GPU: use plain multi_gpu.")


def prepare_stream(stream: DetectionStream, processor: Any, args: DetectionTrainingArguments) -> None:
    """Have a stream resized as `as_dataset` says.

    Raises:
        ValueError: the arguments count its epochs, which it hasn't.
    """
    wrong = {
        "max_steps": args.max_steps <= 0 and "set it to the number of updates",
        "lr_milestones": bool(args.lr_milestones) and "in epochs: set null and lr_scheduler_type, or [] for none",
        "eval_strategy": args.eval_strategy == IntervalStrategy.EPOCH and "set steps, and eval_steps",
        "save_strategy": args.save_strategy == SaveStrategy.EPOCH and "set steps, and save_steps",
        "logging_strategy": args.logging_strategy == IntervalStrategy.EPOCH and "set steps, and logging_steps",
    }
    values = {name: getattr(args, name) for name in wrong}
    shown = {name: getattr(value, "value", value) for name, value in values.items()}  # of enumerations
    lines = [f"training.{name} is {shown[name]}: {reason}" for name, reason in wrong.items() if reason]
    if lines:
        raise ValueError("a stream has no epochs:\n  - " + "\n  - ".join(lines))
    if stream.plain_epochs:
        raise ValueError("a stream has no last epochs: leave plain_epochs out")
    if not isinstance(processor, DenseDetectorImageProcessor):
        stream.use_processor(processor)


def as_dataset(data: Dataset | DetectionSplit, processor: Any, train: bool, seed: int) -> DetectionDataset:
    """A data set, made of a split if it is one, whose images are then resized as the processor does it.

    Those of transformers' processors are so in any case.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(data, DetectionDataset | DetectionSplit):
        raise ValueError(
            f"a data set must be a DetectionDataset or a DetectionSplit (see load_coco), not {type(data).__name__}"
        )
    dense, size = isinstance(processor, DenseDetectorImageProcessor), plain_size(processor)
    if dense and isinstance(data, DetectionDataset):
        return data
    if dense and "shortest_edge" in size and isinstance(data, DetectionSplit):
        short, long = size["shortest_edge"], size["longest_edge"]
        return DetectionDataset(data, train=train, short_side=short, long_side=long, seed=seed)
    dataset = data if isinstance(data, DetectionDataset) else DetectionDataset(data, train=train, seed=seed)
    dataset.use_processor(processor)
    return dataset


def check_classes(model: PreTrainedModel, dataset: DetectionDataset | DetectionStream, name: str, advice: str) -> None:
    """Raise ValueError, with the advice, if a data set of this name has other classes than the model."""
    model_names, data_names = map(coco_spelling, (label_names_of(model.config), dataset.split.label_names))
    if model_names == data_names:
        return
    if near := near_matches(model_names, data_names):
        raise ValueError(f"{name} and the model have {spelling_problem(near, 'model', name)}.")
    raise ValueError(
        f"{name} has {len(data_names)} labels ({listed(data_names)}), the model {len(model_names)} "
        f"({listed(model_names)}): {advice}."
    )
