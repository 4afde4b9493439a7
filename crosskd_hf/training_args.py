"""Training arguments: transformers' own, with detection's defaults and the few settings it lacks."""

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

WARMUP_STYLES = ("linear", "constant")
# What the trainer can't work with otherwise -> why.
FIXED = {
    "remove_unused_columns": (False, "the data sets read images and boxes from columns the model doesn't name"),
    "eval_do_concat_batches": (False, "detections have a different number an image"),
    "logging_nan_inf_filter": (False, "it hides losses that are not finite; the trainer stops at them"),
}


@dataclass
class DetectionTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` for detectors: SGD, a multi-step schedule, COCO's AP as the best model's metric.

    Raises:
        ValueError: naming the field, its value and what to do.
    """

    optim: str = field(default="sgd", metadata={"help": "Optimizer; sgd is the published one."})
    learning_rate: float = field(default=0.01, metadata={"help": "Learning rate at a global batch of base_batch_size."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay."})
    momentum: float = field(default=0.9, metadata={"help": "Momentum of SGD."})
    base_batch_size: int | None = field(
        default=16,
        metadata={"help": "The learning rate is scaled by the real global batch over this; null: not scaled."},
    )
    num_train_epochs: float = field(default=12.0, metadata={"help": "Epochs."})
    warmup_steps: float = field(default=500, metadata={"help": "Iterations of warm-up."})
    warmup_style: str = field(default="linear", metadata={"help": "linear (rising) or constant warm-up."})
    warmup_start_factor: float = field(default=0.001, metadata={"help": "Learning rate factor at the first step."})
    lr_milestones: list[float] | None = field(
        default_factory=lambda: [8, 11],
        metadata={"help": "Epochs after which lr_gamma applies; null: transformers' lr_scheduler_type instead."},
    )
    lr_gamma: float = field(default=0.1, metadata={"help": "Learning rate factor at each milestone."})
    bias_lr_factor: float = field(default=1.0, metadata={"help": "Learning rate factor of convolution biases."})
    bias_weight_decay: bool = field(default=True, metadata={"help": "Whether biases (norms' too) are decayed."})
    group_by_orientation: bool = field(default=True, metadata={"help": "Batches of upright or of wide images only."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient norm to clip at; 0: no clipping."})
    per_device_train_batch_size: int = field(default=2, metadata={"help": "Images a device and step."})
    per_device_eval_batch_size: int = field(
        default=1, metadata={"help": "Images a device in evaluation; 1 pads as the reference does."}
    )
    metric_for_best_model: str | None = field(default="AP", metadata={"help": "Metric of the best checkpoint."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether that metric should be high."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Experiment trackers."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Must stay false."})
    eval_do_concat_batches: bool = field(default=False, metadata={"help": "Must stay false."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must stay false."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Every parameter is used."})

    def __post_init__(self) -> None:
        for name, (value, reason) in FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {getattr(self, name)}, but must stay {value}: {reason}.")
        if self.warmup_style not in WARMUP_STYLES:
            raise ValueError(f"warmup_style is {self.warmup_style!r}; it must be one of {', '.join(WARMUP_STYLES)}.")
        for name, low, high in (
            ("learning_rate", 0.0, math.inf),
            ("weight_decay", 0.0, math.inf),
            ("momentum", 0.0, 1.0),
            ("warmup_start_factor", 0.0, 1.0),
            ("lr_gamma", 0.0, 1.0),
            ("bias_lr_factor", 0.0, math.inf),
            ("base_batch_size", 1, math.inf),
            ("per_device_train_batch_size", 1, math.inf),
            ("per_device_eval_batch_size", 1, math.inf),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must be from {low} to {high}.")
        late = [m for m in self.lr_milestones or [] if not 0 < m < self.num_train_epochs]
        if late and self.max_steps <= 0:
            raise ValueError(
                f"lr_milestones {late} lie outside the {self.num_train_epochs:g} epochs of num_train_epochs: the "
                "learning rate would never be lowered there. Change either; [] keeps it constant."
            )
        super().__post_init__()

    @property
    def global_batch_size(self) -> int:
        """Images an optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps

    @property
    def scaled_learning_rate(self) -> float:
        """Learning rate for the real global batch: linear scaling (Goyal et al., arXiv 1706.02677, section 2.1)."""
        if self.base_batch_size is None:
            return self.learning_rate
        return self.learning_rate * self.global_batch_size / self.base_batch_size
