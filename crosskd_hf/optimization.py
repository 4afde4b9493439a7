"""Learning rate and parameter groups as the published recipes have them, as pure functions."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from .training_args import DetectionTrainingArguments


def warmup_multistep_factor(
    step: int,
    *,
    warmup_steps: int,
    start_factor: float,
    style: str,
    milestone_steps: list[int],
    gamma: float,
) -> float:
    """Learning rate factor at an optimizer step, counted from 0.

    Args:
        step: number of updates done.
        warmup_steps: W. "linear" rises from `start_factor` at step 0 to 1 at step W - 1; "constant" stays at
            `start_factor` up to step W - 2. 0 and 1 are no warm-up.
        start_factor: factor at step 0.
        style: "linear" or "constant".
        milestone_steps: steps from which on `gamma` applies, once each.
        gamma: factor of a milestone.
    """
    factor = gamma ** sum(step >= milestone for milestone in milestone_steps)
    if step >= warmup_steps - 1:
        return factor
    if style == "constant":
        return factor * start_factor
    return factor * (start_factor + (1 - start_factor) * step / (warmup_steps - 1))


def multistep_scheduler(
    optimizer: torch.optim.Optimizer, args: DetectionTrainingArguments, steps_per_epoch: int
) -> LambdaLR:
    """The arguments' schedule on an optimizer. Milestones are epochs, so they move with the size of the data set."""
    milestones = [round(epoch * steps_per_epoch) for epoch in args.lr_milestones or []]

    def factor(step: int) -> float:
        return warmup_multistep_factor(
            step,
            warmup_steps=int(args.warmup_steps),
            start_factor=args.warmup_start_factor,
            style=args.warmup_style,
            milestone_steps=milestones,
            gamma=args.lr_gamma,
        )

    return LambdaLR(optimizer, factor)


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    bias_lr_factor: float = 1.0,
    bias_weight_decay: bool = True,
) -> list[dict]:
    """Trained parameters, grouped by learning rate and weight decay, in the model's order.

    Args:
        model: parameters without `requires_grad` are left out.
        learning_rate, weight_decay: of ordinary parameters.
        bias_lr_factor: on the learning rate of convolution biases (FCOS: 2).
        bias_weight_decay: False: no bias is decayed, those of norm layers neither (FCOS).

    Returns:
        dicts of `name`, `params`, `lr`, `weight_decay`.
    """
    conv_biases = {id(m.bias) for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is not None}
    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = name.rsplit(".", 1)[-1] == "bias"
        lr = learning_rate * (bias_lr_factor if id(parameter) in conv_biases else 1.0)
        decay = weight_decay if bias_weight_decay or not is_bias else 0.0
        if (lr, decay) == (learning_rate, weight_decay):
            kind = "weights"
        else:
            kind = "convolution biases" if id(parameter) in conv_biases else "other biases"
        group = groups.setdefault(kind, {"name": kind, "params": [], "lr": lr, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(model: nn.Module, args: DetectionTrainingArguments) -> torch.optim.SGD:
    """SGD with momentum. Fused, because only fused optimizers can skip a step on the device (`found_inf`).

    Raises:
        ValueError: if the model has nothing to train.
    """
    groups = parameter_groups(
        model,
        learning_rate=args.scaled_learning_rate,
        weight_decay=args.weight_decay,
        bias_lr_factor=args.bias_lr_factor,
        bias_weight_decay=args.bias_weight_decay,
    )
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient: nothing to train")
    return torch.optim.SGD(groups, lr=args.scaled_learning_rate, momentum=args.momentum, fused=True)
