"""Every backward that is written by hand against autograd of the plain formula, in two layouts, in fp64 and fp32."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from unittest import mock

import torch
from gpu_options import Checks, Options
from torch import Tensor
from torch.nn import functional as F

from crosskd_hf.distillation import alignment
from crosskd_hf.models import head, losses

BARS = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest value
LEVELS = ((12, 20), (6, 10), (3, 5), (1, 1))
IMAGES, CHANNELS, CLASSES, PRIORS = 2, 16, 20, 300
GROUPS, EPS = 4, 1e-5

Function = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Pair:
    """A function whose backward is written by hand, and the plain formula for autograd.

    Attributes:
        hand: the class of the backward that is written by hand.
        ours, plain: tensors -> results.
        inputs: layout and generator -> tensors, all of which learn.
        bars: of the types in which both are compared.
    """

    hand: type[torch.autograd.Function]
    ours: Function
    plain: Function
    inputs: Callable[[bool, torch.Generator], list[Tensor]]
    bars: Mapping[torch.dtype, float] = field(default_factory=lambda: BARS)


def maps(channels_last: bool, generator: torch.Generator) -> list[Tensor]:
    """(N, C, H, W) a level."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    made = (torch.randn(IMAGES, CHANNELS, *size, generator=generator, dtype=torch.float64) for size in LEVELS)
    return [(level * 2 + 1).contiguous(memory_format=layout) for level in made]


def rows(channels_last: bool, generator: torch.Generator, columns: int) -> Tensor:
    """(N, P, columns), as `flatten_levels` gives them: the view of a channels-first tensor, or contiguous."""
    values = torch.randn(IMAGES, columns, PRIORS, generator=generator, dtype=torch.float64).transpose(1, 2)
    return values.contiguous() if channels_last else values


def normalised(channels_last: bool, generator: torch.Generator) -> list[Tensor]:
    """A level, and GroupNorm's weight and bias."""
    weights = torch.randn(2, CHANNELS, generator=generator, dtype=torch.float64)
    return [maps(channels_last, generator)[0], *weights]


def class_logits(channels_last: bool, generator: torch.Generator) -> list[Tensor]:
    """Of a student."""
    return [rows(channels_last, generator, CLASSES) * 3]


def like(tensor: Tensor, seed: int) -> Tensor:
    """Constants of a tensor's shape, type and device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)


# Formulas -----------------------------------------------------------------------------------------------------------


def standardised(features: Tensor) -> Tensor:
    """By the mean and the unbiased deviation a channel."""
    return (features - features.mean((0, 2, 3), True)) / (features.std((0, 2, 3), keepdim=True) + alignment.EPS)


def aligned(levels: list[Tensor], rectify: bool) -> list[Tensor]:
    """With the teacher's mean and deviation."""
    results = []
    for i, level in enumerate(levels):
        teacher = like(level, i) * 3 + 1
        result = standardised(level) * teacher.std((0, 2, 3), keepdim=True) + teacher.mean((0, 2, 3), True)
        results.append(F.relu(result) if rectify else result)
    return results


def scaled_entropy(logits: Tensor, targets: Tensor, exponent: float, weights: Tensor | float = 1.0) -> list[Tensor]:
    """|p - t|^exponent * BCE(p, t), weighted, summed over classes."""
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return [((logits.sigmoid() - targets).abs() ** exponent * entropy * weights).sum(dim=-1)]


def binary(logits: Tensor) -> Tensor:
    """Targets of 0 or 1."""
    return (like(logits, 1) > 1).to(logits)


def focal(logits: Tensor) -> list[Tensor]:
    """RetinaNet's."""
    targets = binary(logits)
    return scaled_entropy(logits, targets, 2, 0.25 * targets + 0.75 * (1 - targets))


def half_group_norm(tensors: list[Tensor]) -> list[Tensor]:
    """Of bf16 maps, in fp32."""
    maps, weight, bias = tensors
    return [F.group_norm(maps.bfloat16().float(), GROUPS, weight, bias, EPS).bfloat16().float()]


def in_parts(function: Callable[[Tensor], Tensor]) -> Function:
    """The function, going through its class map in three parts."""

    def run(tensors: list[Tensor]) -> list[Tensor]:
        with mock.patch.object(losses, "MAX_CLASS_SCORES", PRIORS):
            return [function(tensors[0])]

    return run


PAIRS = {
    "align": Pair(
        alignment._Rescaled,
        lambda x: alignment.align(x, [like(level, i) * 3 + 1 for i, level in enumerate(x)]),
        lambda x: aligned(x, False),
        maps,
    ),
    "align, ReLU": Pair(
        alignment._Rescaled,
        lambda x: alignment.align(x, [like(level, i) * 3 + 1 for i, level in enumerate(x)], rectify=True),
        lambda x: aligned(x, True),
        maps,
    ),
    "standardise": Pair(
        alignment._Rescaled, alignment.standardise, lambda x: [standardised(level) for level in x], maps
    ),
    "GroupNorm of bf16": Pair(
        head.HalfPrecisionGroupNorm,
        lambda x: [head.HalfPrecisionGroupNorm.apply(x[0].bfloat16(), x[1], x[2], GROUPS, EPS).float()],
        half_group_norm,
        normalised,
        {torch.float32: 0.01},  # a step of bf16
    ),
    "quality_focal_loss": Pair(
        losses._ScaledCrossEntropy,
        lambda x: [losses.quality_focal_loss(x[0], like(x[0], 1).sigmoid())],
        lambda x: scaled_entropy(x[0], like(x[0], 1).sigmoid(), 2),
        class_logits,
    ),
    "focal_loss": Pair(
        losses._ScaledCrossEntropy,
        lambda x: [losses.focal_loss(x[0], binary(x[0]))],
        lambda x: focal(x[0]),
        class_logits,
    ),
    "binary_kd_loss": Pair(
        losses._ScaledCrossEntropy,
        lambda x: [losses.binary_kd_loss(x[0], like(x[0], 1))],
        lambda x: scaled_entropy(x[0], like(x[0], 1).sigmoid(), 1),
        class_logits,
    ),
    "binary_kd_loss, in parts": Pair(
        losses._ScaledCrossEntropy,
        in_parts(lambda x: losses.binary_kd_loss(x, like(x, 1))),
        lambda x: scaled_entropy(x[0], like(x[0], 1).sigmoid(), 1),
        class_logits,
    ),
}


def backward(options: Options) -> Checks:
    """Each pair, in both layouts and precisions."""
    for name, pair in PAIRS.items():
        for channels_last in (False, True):
            layout = "channels last" if channels_last else "NCHW"
            for dtype in pair.bars:
                check = functools.partial(compare, pair, channels_last, dtype, options.device)
                yield f"{name}, {layout}, {str(dtype).removeprefix('torch.')}", check


def compare(pair: Pair, channels_last: bool, dtype: torch.dtype, device: str) -> dict:
    """Results and gradients of both."""
    leaves = pair.inputs(channels_last, torch.Generator().manual_seed(0))
    found = []
    for function in (pair.ours, pair.plain):
        copies = [leaf.to(device, dtype, copy=True).requires_grad_() for leaf in leaves]
        results = function(copies)
        loss = sum((result * like(result, 10 + i)).sum() for i, result in enumerate(results))
        found.append(([result.detach() for result in results], torch.autograd.grad(loss, copies)))
    values, gradients = (largest_error(*both) for both in zip(*found, strict=True))
    problem = "" if max(values, gradients) <= (bar := pair.bars[dtype]) else f"they differ by more than {bar:g}"
    return {"problem": problem, "difference of values": values, "of gradients": gradients}


def largest_error(ours: list[Tensor], plain: list[Tensor]) -> float:
    """The largest difference, relative to the largest value."""
    largest = max(float(b.abs().max()) for b in plain)
    return max(float((a - b).abs().max()) for a, b in zip(ours, plain, strict=True)) / largest
