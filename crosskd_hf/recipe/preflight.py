"""What a run will do: told, and compared with what can be meant and what the disk holds, before it starts."""

import math

import torch

from ..data.stream import DetectionStream, number_of_images
from ..models.families import backbone_name
from ..training.arguments import LIMITS
from ..training.distillation_trainer import DistillationTrainer
from ..training.optimization import groups_of
from ..training.trainer import DetectionTrainer
from ..utils.strict_yaml import RecipeError
from ..weights.loading import count_parameters
from .sections import Recipe


def describe(trainer: DetectionTrainer) -> str:
    """What a run would do: parameters, data, batch, learning rate, steps."""
    args = trainer.args
    total, trained = count_parameters(trainer.model)
    lines = [
        f"model              {trainer.model.config.model_type}, {backbone_name(trainer.model.config)}: "
        f"{total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained",
    ]
    if isinstance(trainer, DistillationTrainer):
        config = trainer.teacher.config
        total, _ = count_parameters(trainer.teacher)
        name = f"{config.model_type}, {backbone_name(config)}"
        lines.append(f"teacher            {name}: {total / 1e6:.2f} M parameters, frozen")
        lines.append(f"distillation       {trainer.methods_text()}")
        lines += [f"                   {note}" for note in trainer.pair.notes]
        if unlabeled := trainer.unlabeled_dataset:
            lines.append(
                f"unlabelled images  {len(unlabeled)} (batches per labelled batch: {trainer.unlabeled_ratio:g})"
            )
    lines += [
        f"training images    {number_of_images(trainer.train_dataset)}",
        f"validation images  {len(trainer.eval_dataset)}",
        f"labels             {trainer.model.config.num_labels}",
        f"effective batch    {args.global_batch_size} ({args.per_device_train_batch_size} a device x "
        f"{args.world_size} processes x {args.gradient_accumulation_steps} accumulated)",
        f"learning rate      {args.scaled_learning_rate:g} ({args.learning_rate:g} at batch "
        f"{args.base_batch_size or args.global_batch_size})",
        *parameter_groups_told(trainer),
        f"precision          {precision(trainer)}",
        f"steps              {planned_steps(trainer)}{steps_an_epoch(trainer)}",
        f"output             {args.output_dir}",
    ]
    return "\n".join(lines)


def parameter_groups_told(trainer: DetectionTrainer) -> list[str]:
    """A line for each group of parameters, if there are several."""
    groups = groups_of(trainer.trained_module(), trainer.args)
    lines = []
    for group in groups if len(groups) > 1 else []:
        size = sum(parameter.numel() for parameter in group["params"])
        values = f"learning rate {group['lr']:g}, weight decay {group['weight_decay']:g}"
        lines.append(f"                   {group['name']}: {size / 1e6:.2f} M parameters, {values}")
    return lines


def precision(trainer: DetectionTrainer) -> str:
    """The precision that a run computes in, and what chose it."""
    mixed = trainer.precision
    if mixed != "fp32":
        by_recipe = getattr(trainer.args, mixed, False)
        source = f"training.{mixed}" if by_recipe else "accelerate's configuration, ACCELERATE_MIXED_PRECISION"
        return f"{mixed}, mixed with fp32 ({source})"
    if trainer.args.device.type == "cuda":
        # Not `allow_tf32`: it can't be read once somebody, such as transformers, has set these.
        parts = [("convolutions", torch.backends.cudnn.conv), ("matrix products", torch.backends.cuda.matmul)]
        tf32 = [name for name, backend in parts if backend.fp32_precision == "tf32"]
        return "fp32" + (f", TF32 in {' and '.join(tf32)}" if tf32 else "")
    return "fp32"


def check_schedule(trainer: DetectionTrainer, recipe: Recipe) -> None:
    """Refuse a schedule that can't be meant, once the numbers of processes and of steps are known.

    A warm-up longer than the training gets a tenth of it, noted in the recipe, unless an override gives it.

    Raises:
        RecipeError: such a warm-up that an override gives, or a scaled learning rate that is too high.
    """
    args, steps = trainer.args, planned_steps(trainer)
    if args.get_warmup_steps(steps) > steps:
        given = f"training ends after {steps} steps{steps_an_epoch(trainer)}"
        if "training.warmup_steps" in recipe.overridden:
            raise RecipeError(
                f"training.warmup_steps is {args.warmup_steps:g}, but {given}: lower it, such as "
                f"training.warmup_steps={steps // 10}."
            )
        recipe.notes.append(f"training.warmup_steps {steps // 10} instead of {args.warmup_steps:g}, since {given}")
        args.warmup_steps = steps // 10  # the saved recipe keeps its own: the same data give the same again
    if args.scaled_learning_rate > LIMITS["learning_rate"][1]:
        raise RecipeError(
            f"training.learning_rate {args.learning_rate:g} at a batch of {args.base_batch_size} is "
            f"{args.scaled_learning_rate:g} at the {args.global_batch_size} images of this run: lower it, or set "
            "training.base_batch_size=null."
        )


def steps_an_epoch(trainer: DetectionTrainer) -> str:
    """How many of the steps are an epoch, if there are any."""
    return "" if isinstance(trainer.train_dataset, DetectionStream) else f" ({trainer.steps_per_epoch} an epoch)"


def planned_steps(trainer: DetectionTrainer) -> int:
    """Optimizer steps of a complete run."""
    args = trainer.args
    return args.max_steps if args.max_steps > 0 else math.ceil(trainer.steps_per_epoch * args.num_train_epochs)
