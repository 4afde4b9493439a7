"""Maps with given statistics per channel: what the cross pass and PKD compare maps by (CrossKD, section 3.2)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-6  # added to a deviation that is divided by
HALF = (torch.float16, torch.bfloat16)
TINY = 1e-30  # a product of deviations that is divided by; constant channels have 0


def channel_statistics(maps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation per channel of maps (N, C, H, W), over batch and space: (maps, C) each,
    in fp32 also of maps in half precision.

    A single value (one image, 1x1 level) has no unbiased deviation: 0, so that it standardises to 0.

    Args:
        maps: of this process: the reference doesn't share statistics between processes.
    """
    pairs = [torch.var_mean(_full(m), (0, 2, 3), correction=min(1, _values_per_channel(m) - 1)) for m in maps]
    variances, means = zip(*pairs, strict=True)
    return torch.stack(means), torch.stack(variances).sqrt()


def standardise(maps: list[Tensor]) -> list[Tensor]:
    """Maps (N, C, H, W) with zero mean and unit deviation per channel; gradients flow through both statistics.

    Maps in half precision give fp32.
    """
    return list(_Rescaled.apply(False, False, None, None, *maps))


def align(student: list[Tensor], teacher: list[Tensor], rectify: bool = False) -> list[Tensor]:
    """Give each of the student's maps (N, C, H, W) the mean and deviation per channel of the teacher's.

    The teacher's are constants. What comes out has the student's precision; statistics are in fp32.

    Args:
        student, teacher: as many maps, in pairs of as many channels.
        rectify: apply a ReLU to what comes out.

    Raises:
        ValueError: if there aren't as many of both.
    """
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} maps can't be aligned to {len(teacher)}")
    with torch.no_grad():
        mean, std = channel_statistics(teacher)
    return list(_Rescaled.apply(rectify, True, mean, std, *student))


class _Rescaled(torch.autograd.Function):
    """(map - its mean) / (its deviation + EPS), then times `std` plus `mean` (maps, C) if given, then maybe a ReLU.
    The result is in fp32, or with `narrow` as precise as the maps.

    By hand, although a step's peak memory would only be 2.7% higher without it (`benchmarks/step.py`, GFL, 8 images):
    its gradients would be rounded otherwise, so that the fifth step of a golden case (FCOS with PKD) misses its bar;
    and autograd would run 254 operators more a step.
    """

    @staticmethod
    def forward(
        ctx: Any, rectify: bool, narrow: bool, mean: Tensor | None, std: Tensor | None, *maps: Tensor
    ) -> tuple[Tensor, ...]:
        own_mean, own_std = channel_statistics(list(maps))
        divisor = own_std + EPS
        factor = divisor.reciprocal() if std is None else std / divisor
        shifts = _per_channel(torch.zeros_like(factor) if mean is None else mean)
        rows = zip(maps, _per_channel(own_mean), _per_channel(factor), shifts, strict=True)
        # Not map * factor + (shift - mean * factor): where a channel is nearly constant, that rounds to noise.
        outputs = [torch.addcmul(shift, features - center, scale) for features, center, scale, shift in rows]
        if narrow:
            outputs = [output.to(m.dtype) for output, m in zip(outputs, maps, strict=True)]
        if rectify:
            torch._foreach_clamp_min_(outputs, 0)
        ctx.rectify = rectify
        ctx.save_for_backward(own_mean, own_std, factor, *maps, *(outputs if rectify else ()))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mean, std, factor, *saved = ctx.saved_tensors
        maps, outputs = saved[: len(gradients)], saved[len(gradients) :]
        if ctx.rectify:
            through = torch._foreach_sign(outputs)  # 1 or 0
            torch._foreach_mul_(through, gradients)
            gradients = through
        # The derivative is that of a batch norm with gain w and inverse deviation v, so that its kernel can do all of
        # it: w * v must be the factor, and v^2 / n must be 1 / ((n - 1) * std * (std + EPS)) of n values a channel.
        counts = [_values_per_channel(m) for m in maps]
        bessel = torch.stack([std.new_full((1,), n / max(n - 1, 1)) for n in counts])
        v = (bessel / (std * (std + EPS)).clamp(min=TINY)).sqrt()
        rows = zip(gradients, maps, (factor / v).unbind(), mean.unbind(), v.unbind(), strict=True)
        derivative = torch.ops.aten.native_batch_norm_backward
        results = [
            derivative(_full(g), _full(m), w, None, None, center, v, True, 0.0, [True, False, False])[0].to(m.dtype)
            for g, m, w, center, v in rows
        ]
        return *[None] * 4, *results


def _full(features: Tensor) -> Tensor:
    """In fp32 if they are in half precision."""
    return features.float() if features.dtype in HALF else features


def _values_per_channel(features: Tensor) -> int:
    return features.shape[0] * features.shape[2] * features.shape[3]


def _per_channel(rows: Tensor) -> tuple[Tensor, ...]:
    """(maps, C) -> (C, 1, 1) a map."""
    return rows.view(*rows.shape, 1, 1).unbind()
