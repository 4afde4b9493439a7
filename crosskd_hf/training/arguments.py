"""Training arguments: transformers' own, with detection's defaults and the few settings it lacks."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..utils.recipe_fields import Problem

WARMUP_STYLES = ("linear", "constant")
DEFAULT_OUTPUT = "trainer_output"  # as transformers has it
NO_DECAY = ("none", "norms", "norms_and_biases")
# What the trainer can't work with otherwise, or would silently ignore -> (value, why).
FIXED_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "bf16_full_eval": (False, "boxes need fp32; bf16: true evaluates the networks in bfloat16"),
    "fp16_full_eval": (False, "boxes need fp32; fp16: true evaluates the networks in half precision"),
    "remove_unused_columns": (False, "the data sets read images and boxes from columns the model doesn't name"),
    "eval_do_concat_batches": (False, "detections have a different number per image"),
    "logging_nan_inf_filter": (False, "it hides losses that are not finite; the trainer stops at them"),
    "label_smoothing_factor": (0.0, "the detectors' losses know no label smoothing"),
    "train_sampling_strategy": ("random", "batches are drawn by image orientation (see group_by_orientation)"),
    "save_only_model": (False, "a run can't resume from checkpoints without optimizer and random state"),
    "save_on_each_node": (False, "a run is resumed from one output folder that all machines share"),
    "auto_find_batch_size": (False, "the learning rate is scaled for per_device_train_batch_size"),
    "data_seed": (None, "the order of the images follows seed"),
    "deepspeed": (None, "it isn't supported; these detectors fit a GPU"),
    "resume_from_checkpoint": (
        None,
        "a run resumes by itself from the last complete checkpoint in its output_dir; to start from a trained "
        "detector, set model.checkpoint",
    ),
}
# What accelerate's configuration or launcher turns on by these variables of the environment.
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
LR_FACTORS = (0.0, 1000.0)
# Lowest and highest value. Not in the fields' metadata: HfArgumentParser hands that to argparse as it is.
# The highest ones are far above what is ever meant: they catch slips such as 1e30.
LIMITS: dict[str, tuple[float, float]] = {
    "learning_rate": (0.0, 100.0),
    "weight_decay": (0.0, 10.0),
    "momentum": (0.0, 0.9999),
    "adam_beta1": (0.0, 0.999999),
    "adam_beta2": (0.0, 0.999999),
    "adam_epsilon": (0.0, 1.0),
    "warmup_start_factor": (0.0, 1.0),
    "lr_gamma": (0.0, 1.0),
    "bias_lr_factor": LR_FACTORS,
    "backbone_lr_factor": LR_FACTORS,
    "ema_decay": (0.0, 0.999999),
    "ema_warmup_steps": (0, 1e9),
    "max_grad_norm": (0.0, math.inf),
    "num_train_epochs": (0.0, 1e6),
    "max_steps": (-1, 1e9),
    "base_batch_size": (1, 65536),
    "per_device_train_batch_size": (1, 4096),
    "per_device_eval_batch_size": (1, 4096),
    "gradient_accumulation_steps": (1, 65536),
    "dataloader_num_workers": (0, 1024),
    "seed": (0, 2**32 - 1),
    "evaluation_pictures": (0, 1000),
}


@dataclass
class DetectionTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` for detectors: SGD, a multi-step schedule, COCO's AP as the best checkpoint's.

    The defaults are the published 1x schedule (CrossKD, arXiv 2306.11369, section 4; MMDetection's `schedule_1x`).
    Units: learning rates are per update, warm-up is counted in updates, milestones in epochs, batch sizes in images.

    Raises:
        ValueError: naming every field that can't be, its value and what to do.
    """

    if TYPE_CHECKING:
        output_dir: str  # transformers fills it in where it isn't given

    optim: OptimizerNames | str = field(default="sgd", metadata={"help": "Optimizer; sgd is the published one."})
    learning_rate: float = field(default=0.01, metadata={"help": "Learning rate at a batch of base_batch_size."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay."})
    momentum: float = field(default=0.9, metadata={"help": "Momentum of SGD."})
    base_batch_size: int | None = field(
        default=16,
        metadata={"help": "The learning rate is scaled by the real global batch over this; null: not scaled."},
    )
    num_train_epochs: float = field(default=12.0, metadata={"help": "Epochs."})
    warmup_steps: float = field(
        default=500, metadata={"help": "Updates of warm-up; below 1: as a part of all updates. 0: none."}
    )
    warmup_style: str = field(default="linear", metadata={"help": "linear (rising) or constant warm-up."})
    warmup_start_factor: float = field(default=0.001, metadata={"help": "Learning rate factor at the first step."})
    lr_milestones: list[float] | None = field(
        default_factory=lambda: [8.0, 11.0],
        metadata={"help": "Epochs after which lr_gamma applies; null: transformers' lr_scheduler_type instead."},
    )
    lr_gamma: float = field(default=0.1, metadata={"help": "Learning rate factor at each milestone."})
    bias_lr_factor: float = field(default=1.0, metadata={"help": "Learning rate factor of convolution biases."})
    bias_weight_decay: bool = field(default=True, metadata={"help": "Whether biases (norms' too) are decayed."})
    no_decay: str = field(
        default="none",
        metadata={"help": "What isn't decayed: none, norms (weights and biases), or norms_and_biases (all biases)."},
    )
    backbone_lr_factor: float = field(default=1.0, metadata={"help": "Learning rate factor of the backbone."})
    # As transformers types its own: HfArgumentParser reads the union as text, and __post_init__ that as JSON.
    lr_factors: dict[str, float] | str | None = field(
        default=None,
        metadata={"help": "Part of parameters' names -> learning rate factor, such as {sampling_offsets: 0.1}."},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Average weights exponentially, such as 0.999; evaluated and saved instead. null: off."},
    )
    ema_warmup_steps: int = field(
        default=0,
        metadata={"help": "The average's decay at update t is ema_decay * (1 - exp(-t / this)); 0: constant."},
    )
    group_by_orientation: bool = field(default=True, metadata={"help": "Batches of upright or of wide images only."})
    channels_last: bool = field(
        default=False,
        metadata={"help": "Weights and maps of student and teacher with channels last: faster in bf16 and fp16."},
    )
    fold_teacher_batchnorm: bool = field(
        default=True, metadata={"help": "Fold the frozen teacher's BatchNorms into its convolutions."}
    )
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient norm to clip at; 0: no clipping."})
    per_device_train_batch_size: int = field(default=2, metadata={"help": "Images a device and step."})
    per_device_eval_batch_size: int = field(
        default=1, metadata={"help": "Images a device in evaluation; 1 pads as the reference does."}
    )
    metric_for_best_model: str | None = field(default="AP", metadata={"help": "Metric of the best checkpoint."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether that metric should be high."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep; null: all."})
    # None first, as transformers has it: HfArgumentParser can't read the union in another order.
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Trackers."})  # noqa: RUF036
    evaluation_pictures: int = field(
        default=8, metadata={"help": "Images on the sheet that trackers get after an evaluation; 0: none."}
    )
    standalone: bool = field(
        default=False,
        metadata={"help": "transformers loads saved models with trust_remote_code=True, without import crosskd_hf."},
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Model inputs that are labels."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false."})
    eval_do_concat_batches: bool = field(default=False, metadata={"help": "Must stay false."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must stay false."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Every parameter is used."})

    def __post_init__(self) -> None:
        # Before transformers' own: its __post_init__ sets up the process group, and these mistakes need none.
        refuse_unsupported_launch()
        if isinstance(self.lr_factors, str):
            with contextlib.suppress(json.JSONDecodeError):  # told below
                self.lr_factors = json.loads(self.lr_factors)
        if problems := training_problems(vars(self)):
            raise ValueError("\n".join(message for _, message in problems))
        super().__post_init__()

    @property
    def global_batch_size(self) -> int:
        """Images an optimizer step, over all processes and accumulated batches."""
        return self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps

    @property
    def scaled_learning_rate(self) -> float:
        """Learning rate for the real global batch: linear scaling (Goyal et al., arXiv 1706.02677, section 2.1)."""
        if self.base_batch_size is None:
            return self.learning_rate
        return self.learning_rate * self.global_batch_size / self.base_batch_size


def refuse_unsupported_launch() -> None:
    """Raise ValueError if accelerate was configured to split the model: its launcher says so in the environment."""
    for variable, name in UNSUPPORTED.items():
        if parse_flag_from_env(variable):
            raise ValueError(
                f"accelerate's configuration turns on {name} ({variable}={os.environ[variable]}), which isn't "
                "supported; these detectors fit a GPU. Start with `accelerate launch --multi_gpu` (one GPU: "
                "`--num_processes 1`), or choose another configuration with `accelerate config`."
            )


def training_problems(values: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with training values, without building the arguments (which sets up devices and processes).

    Args:
        values: every field of `DetectionTrainingArguments` by name.

    Returns:
        the fields and text of each problem; what only transformers checks is not among them.
    """
    problems: list[Problem] = []
    for name, (fixed, reason) in FIXED_ARGUMENTS.items():
        if values[name] != fixed:
            problems.append(((name,), f"{name} is {values[name]!r}, but must stay {fixed!r}: {reason}."))
    for name, (low, high) in LIMITS.items():
        value = values[name]
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            problems.append(((name,), f"{name} is {value}; it must be {limits}."))
    return [*problems, *_group_problems(values), *_schedule_problems(values)]


def _group_problems(values: Mapping[str, Any]) -> list[Problem]:
    problems: list[Problem] = []
    factors, no_decay = values["lr_factors"], values["no_decay"]
    if factors is not None and not _are_lr_factors(factors):
        text = (
            f"lr_factors is {factors!r}; it must map parts of parameters' names to factors from {LR_FACTORS[0]:g} to "
            f"{LR_FACTORS[1]:g}, such as {{sampling_offsets: 0.1}}."
        )
        problems.append((("lr_factors",), text))
    if no_decay not in NO_DECAY:
        problems.append((("no_decay",), f"no_decay is {no_decay!r}; it must be one of {', '.join(NO_DECAY)}."))
    elif no_decay != "none" and not values["bias_weight_decay"]:
        text = (
            f"no_decay {no_decay} and bias_weight_decay false both say which biases aren't decayed: leave "
            "bias_weight_decay true, and set no_decay norms_and_biases if none is to be."
        )
        problems.append((("no_decay", "bias_weight_decay"), text))
    if values["ema_warmup_steps"] > 0 and values["ema_decay"] is None:
        text = (
            f"ema_warmup_steps is {values['ema_warmup_steps']}, but ema_decay is null, so that nothing is averaged: "
            "set ema_decay, such as 0.9998, or ema_warmup_steps 0."
        )
        problems.append((("ema_warmup_steps", "ema_decay"), text))
    return problems


def _are_lr_factors(factors: Any) -> bool:
    """Whether they are text -> number within the limits."""
    if not isinstance(factors, Mapping):
        return False
    numbers = [f for f in factors.values() if isinstance(f, int | float) and LR_FACTORS[0] <= f <= LR_FACTORS[1]]
    return len(numbers) == len(factors) and all(isinstance(part, str) for part in factors)


def _schedule_problems(values: Mapping[str, Any]) -> list[Problem]:
    problems: list[Problem] = []
    style, milestones, warmup = values["warmup_style"], values["lr_milestones"], values["warmup_steps"]
    epochs, max_steps = values["num_train_epochs"], values["max_steps"]
    if style not in WARMUP_STYLES:
        problems.append((("warmup_style",), f"warmup_style is {style!r}; it must be {' or '.join(WARMUP_STYLES)}."))
    if max_steps == 0:
        text = "max_steps is 0, which would be no limit: set -1 for num_train_epochs to count, or at least 1."
        problems.append((("max_steps",), text))
    if max_steps <= 0 and epochs <= 0:
        text = f"num_train_epochs is {epochs:g}, so that nothing would be trained: set more than 0."
        return [*problems, (("num_train_epochs", "max_steps"), text)]
    if max_steps > 0 and warmup > max_steps:
        text = f"warmup_steps is {warmup:g}, but training ends after max_steps {max_steps}: lower it; 0 is no warm-up."
        problems.append((("warmup_steps", "max_steps"), text))
    if values["optim"] == "sgd" and values["optim_args"]:
        text = f"optim_args {values['optim_args']!r} is not read with optim sgd: set momentum and weight_decay."
        problems.append((("optim", "optim_args"), text))
    if milestones is None:
        if style == "constant":
            text = "warmup_style constant needs lr_milestones: transformers' own schedules warm up linearly from 0."
            problems.append((("warmup_style", "lr_milestones"), text))
        return problems
    # max_steps overrides the epochs, so that there the last milestones may well never be reached.
    late = [m for m in milestones if not 0 < m < (math.inf if max_steps > 0 else epochs)]
    if late:
        text = (
            f"lr_milestones {late} lie outside the {epochs:g} epochs of num_train_epochs: the learning rate would "
            "never be lowered there. Change either; [] keeps it constant."
        )
        problems.append((("lr_milestones", "num_train_epochs", "max_steps"), text))
    if list(milestones) != sorted(set(milestones)):
        problems.append((("lr_milestones",), f"lr_milestones {milestones} must rise from each epoch to the next."))
    if values["lr_scheduler_type"] != "linear" or values["lr_scheduler_kwargs"]:
        text = f"lr_scheduler_type and lr_scheduler_kwargs need lr_milestones null, which is {milestones}."
        problems.append((("lr_scheduler_type", "lr_scheduler_kwargs", "lr_milestones"), text))
    return problems
