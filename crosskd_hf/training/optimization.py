"""Learning rate and parameter groups as the published recipes have them, as pure functions."""

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from .arguments import DetectionTrainingArguments

FUSED_DEVICES = ("cpu", "cuda")


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

    Source: MMDetection's 1x and 2x schedules, which CrossKD (arXiv 2306.11369, section 4) trains with: W 500 and
    factor(t) = 0.001 + 0.999 * t / 499 for t < 499, then 1; its FCOS: 1/3 for t = 0..498, then 1.

    Args:
        step: number of updates done.
        warmup_steps: W. "linear" rises from `start_factor` at step 0 to 1 at step W - 1; "constant" stays at
            `start_factor` up to step W - 2. 0 and 1 are no warm-up.
        start_factor: factor at step 0.
        style: "linear" or "constant".
        milestone_steps: steps from which on `gamma` applies, once each.
        gamma: factor of a milestone.

    Returns:
        factor on the learning rate, without unit.
    """
    factor = gamma ** sum(step >= milestone for milestone in milestone_steps)
    if step >= warmup_steps - 1:
        return factor
    risen = 0.0 if style == "constant" else step / (warmup_steps - 1)
    return factor * (start_factor + (1 - start_factor) * risen)


def multistep_scheduler(
    optimizer: torch.optim.Optimizer, args: DetectionTrainingArguments, steps_per_epoch: int
) -> LambdaLR:
    """The arguments' schedule on an optimizer, to be stepped once an update.

    Args:
        optimizer: its groups' learning rates are those of factor 1.
        args: `lr_milestones` are epochs, so that they move with the size of the data set; a `warmup_steps` below 1 is,
            as everywhere in transformers, a part of all updates.
        steps_per_epoch: updates an epoch.
    """
    milestones = [round(epoch * steps_per_epoch) for epoch in args.lr_milestones or []]
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    warmup_steps = args.get_warmup_steps(total)

    def factor(step: int) -> float:
        return warmup_multistep_factor(
            step,
            warmup_steps=warmup_steps,
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

    Everything that is no bias is decayed, norm weights and scales too. The bias rule is that of the published FCOS
    (MMDetection's `bias_lr_mult=2, bias_decay_mult=0`; FCOS, arXiv 1904.01355); other detectors have one group.

    Args:
        model: parameters without `requires_grad` are left out.
        learning_rate, weight_decay: of ordinary parameters.
        bias_lr_factor: on the learning rate of convolution biases (FCOS: 2).
        bias_weight_decay: False: no bias is decayed, those of norm layers neither (FCOS).

    Returns:
        dicts of `name`, `params`, `lr`, `weight_decay`; none if the model has nothing to train.
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


def groups_of(model: nn.Module, args: DetectionTrainingArguments) -> list[dict]:
    """`parameter_groups` as the arguments have them, with the learning rate of the global batch."""
    return parameter_groups(
        model,
        learning_rate=args.scaled_learning_rate,
        weight_decay=args.weight_decay,
        bias_lr_factor=args.bias_lr_factor,
        bias_weight_decay=args.bias_weight_decay,
    )


def build_optimizer(model: nn.Module, args: DetectionTrainingArguments) -> torch.optim.SGD:
    """SGD with momentum, fused where that is known to work.

    A fused optimizer is one kernel, and lets GradScaler skip a step without the host waiting to know.

    Args:
        model: on the device it is trained on.
        args: learning rate, scaled to the global batch; momentum, weight decay and the bias rule.

    Raises:
        ValueError: if the model has nothing to train.
    """
    groups = groups_of(model, args)
    if not groups:
        raise ValueError(
            "the model has no parameter that requires a gradient, so nothing to train: call requires_grad_() on the "
            "part to train."
        )
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(p.is_floating_point() and p.device.type in FUSED_DEVICES for p in parameters)
    optimizer = torch.optim.SGD(groups, lr=args.scaled_learning_rate, momentum=args.momentum, fused=fused)
    if args.momentum > 0:
        # torch makes the buffers in the first step, uninitialised, and leaves them so if GradScaler skips that step:
        # the second would then add whatever the memory held. From zero, the first step comes out as it does without.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def group_values(optimizer: torch.optim.Optimizer) -> list[dict]:
    """Rates, decay and momentum of each parameter group, as they are before a scheduler changes them."""
    groups = optimizer.param_groups
    return [{**{k: v for k, v in g.items() if k != "params"}, "lr": g.get("initial_lr", g["lr"])} for g in groups]


def restore_group_values(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler | None, values: list[dict]
) -> None:
    """Go back to the arguments' rates, decay and momentum after a checkpoint's were loaded.

    Changed arguments would be ignored without a word; where nothing has changed both are the same. With a scheduler
    that isn't a function of the step, all stays as it was loaded.

    Args:
        optimizer, scheduler: as the checkpoint left them.
        values: `group_values` of the optimizer before that.
    """
    if not isinstance(scheduler, LambdaLR):
        return
    scheduler.base_lrs = [group["lr"] for group in values]
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    scheduler._last_lr = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, new, rate in zip(optimizer.param_groups, values, scheduler._last_lr, strict=True):
        group.update({**new, "initial_lr": new["lr"], "lr": rate})
