"""Learning rate and parameter groups as the published recipes have them, as pure functions."""

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..utils.messages import nearest
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
    backbone_lr_factor: float = 1.0,
    no_decay: str = "none",
    lr_factors: Mapping[str, float] | None = None,
) -> list[dict]:
    """Trained parameters, grouped by their factor on the learning rate and whether they are decayed.

    By default there is one group: norm weights and scales are decayed, too. The bias rule is that of the published
    FCOS (MMDetection's `bias_lr_mult=2, bias_decay_mult=0`; FCOS, arXiv 1904.01355). The other rules are those that
    query-based detectors train with (Deformable DETR, arXiv 2010.04159; RT-DETR, arXiv 2304.08069).

    Args:
        model: parameters without `requires_grad` are left out.
        learning_rate, weight_decay: of ordinary parameters.
        bias_lr_factor: on the learning rate of convolution biases (FCOS: 2).
        bias_weight_decay: False: no bias is decayed, those of norm layers neither (FCOS).
        backbone_lr_factor, lr_factors, no_decay: see `rate_factors` and `undecayed`.

    Returns:
        dicts of `name`, `params`, `lr`, `weight_decay`: ordinary weights, then the others in the order of the model's
        parameters; none if the model has nothing to train.

    Raises:
        ValueError: a factor is of no parameter.
    """
    factors = rate_factors(model, bias_lr_factor, backbone_lr_factor, lr_factors or {})
    exempt = undecayed(model, no_decay, bias_weight_decay)
    groups: dict[tuple[float, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor, decayed = factors[name], name not in exempt
        new = {"name": group_name(factor, decayed), "params": [], "lr": learning_rate * factor}
        new["weight_decay"] = weight_decay if decayed else 0.0
        groups.setdefault((factor, decayed), new)["params"].append(parameter)
    # The first group's rate is what transformers logs.
    return sorted(groups.values(), key=lambda group: group["name"] != "weights")


def group_name(factor: float, decayed: bool) -> str:
    """What a group is called in a log: "weights", or what is different about it."""
    parts = [f"rate x {factor:g}"] * (factor != 1) + ["no decay"] * (not decayed)
    return ", ".join(parts) or "weights"


def rate_factors(
    model: nn.Module, bias_lr_factor: float, backbone_lr_factor: float, lr_factors: Mapping[str, float]
) -> dict[str, float]:
    """The factor on the learning rate of each parameter by name: the product of all that are of it.

    Args:
        model: a detector, or a `DistillationPair`; the names of what its methods train themselves don't count.
        bias_lr_factor: of convolution biases.
        backbone_lr_factor: of what is in a module `backbone`, at any depth.
        lr_factors: one or more components of a dotted name (`sampling_offsets`, `encoder.layers`) -> factor.

    Raises:
        ValueError: one of `lr_factors`, or a `backbone_lr_factor` that isn't 1, is of no parameter, trained or not.
    """
    conv_biases = {id(m.bias) for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is not None}
    factors = {name: bias_lr_factor if id(p) in conv_biases else 1.0 for name, p in model.named_parameters()}
    # An adapter may be called what a part of the detector is.
    detector = [name for name in factors if not name.startswith("methods.")]
    rules = [("lr_factors", pattern, factor) for pattern, factor in lr_factors.items()]
    if backbone_lr_factor != 1:
        rules.append(("backbone_lr_factor", "backbone", backbone_lr_factor))
    for key, pattern, factor in rules:
        matching = [name for name in detector if f".{pattern}." in f".{name}."]
        if not matching:
            parts = sorted({part for name in detector for part in name.split(".") if not part.isdecimal()})
            raise ValueError(f"{key}: {pattern!r} is in no parameter's name. {nearest(pattern, parts)}")
        for name in matching:
            factors[name] *= factor
    return factors


def undecayed(model: nn.Module, no_decay: str, bias_weight_decay: bool) -> set[str]:
    """The names of parameters without weight decay.

    Args:
        model: a detector, or a module around it.
        no_decay: "norms": weights and biases of norm layers; "norms_and_biases": these and all biases; "none".
        bias_weight_decay: False: what is called `bias` isn't decayed.
    """
    norms = {id(p) for m in model.modules() if is_norm(m) for p in m.parameters(recurse=False)}
    exempt = set()
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if (
            (no_decay != "none" and id(parameter) in norms)
            or (no_decay == "norms_and_biases" and last.endswith("bias"))  # attention has in_proj_bias
            or (not bias_weight_decay and last == "bias")
        ):
            exempt.add(name)
    return exempt


def is_norm(module: nn.Module) -> bool:
    """Whether a layer normalises, by the names of its class and of those that it is derived from."""
    return any(c.__name__.endswith("Norm") or "BatchNorm2d" in c.__name__ for c in type(module).__mro__)


def groups_of(model: nn.Module, args: DetectionTrainingArguments) -> list[dict]:
    """`parameter_groups` as the arguments have them, with the learning rate of the global batch."""
    assert not isinstance(args.lr_factors, str)  # see `DetectionTrainingArguments.__post_init__`
    return parameter_groups(
        model,
        learning_rate=args.scaled_learning_rate,
        weight_decay=args.weight_decay,
        bias_lr_factor=args.bias_lr_factor,
        bias_weight_decay=args.bias_weight_decay,
        backbone_lr_factor=args.backbone_lr_factor,
        no_decay=args.no_decay,
        lr_factors=args.lr_factors,
    )


def build_optimizer(model: nn.Module, args: DetectionTrainingArguments) -> torch.optim.SGD:
    """SGD with momentum, fused where that is known to work.

    A fused optimizer is one kernel, and lets GradScaler skip a step without the host waiting to know.

    Args:
        model: on the device it is trained on.
        args: learning rate, scaled to the global batch; momentum, weight decay and the rules of `groups_of`.

    Raises:
        ValueError: if the model has nothing to train, or a factor is of no parameter.
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
