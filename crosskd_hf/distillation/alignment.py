"""Maps with given statistics per channel: what the cross pass and PKD compare maps by (CrossKD, section 3.2)."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..utils.distributed import num_processes, sum_over_ranks

EPS = 1e-6  # added to a deviation that is divided by
HALF = (torch.float16, torch.bfloat16)
TINY = 1e-30  # a product of deviations that is divided by; constant channels have 0


def channel_statistics(maps: list[Tensor], sync: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation per channel of maps (N, C, H, W), over batch and space: (maps, C) each,
    in fp32 also of maps in half precision.

    A single value (one image, 1x1 level) has no unbiased deviation: 0, so that it standardises to 0.

    Args:
        maps: of this process.
        sync: over the maps of all processes.
    """
    if sync and num_processes() > 1:
        return _shared_statistics(maps)
    pairs = [torch.var_mean(_full(m), (0, 2, 3), correction=min(1, _values_per_channel(m) - 1)) for m in maps]
    variances, means = zip(*pairs, strict=True)
    return torch.stack(means), torch.stack(variances).sqrt()


def _shared_statistics(maps: list[Tensor]) -> tuple[Tensor, Tensor]:
    counts = _shared_counts(maps)
    mean = sum_over_ranks(torch.stack([_full(m).sum(dim=(0, 2, 3)) for m in maps])) / counts
    # In a second round, about the mean: differences of sums of squares would round away small deviations.
    squares = [(m - center).square().sum(dim=(0, 2, 3)) for m, center in zip(maps, _per_channel(mean), strict=True)]
    return mean, (sum_over_ranks(torch.stack(squares)) / (counts - 1).clamp(min=1)).sqrt()


def _shared_counts(maps: list[Tensor]) -> Tensor:
    """Values a channel over all processes, (maps, 1)."""
    counts = torch.tensor([float(_values_per_channel(m)) for m in maps], dtype=torch.float64, device=maps[0].device)
    return sum_over_ranks(counts).to(_full_dtype(maps[0])).unsqueeze(1)


def standardise(maps: list[Tensor], sync: bool = False) -> list[Tensor]:
    """Maps (N, C, H, W) with zero mean and unit deviation per channel; gradients flow through both statistics.

    Maps in half precision give fp32. With `sync` the statistics are those of all processes' maps, and so are the
    gradients.
    """
    return list(_Rescaled.apply(False, sync, False, None, None, *maps))


def align(student: list[Tensor], teacher: list[Tensor], rectify: bool = False, sync: bool = False) -> list[Tensor]:
    """Give each of the student's maps (N, C, H, W) the mean and deviation per channel of the teacher's.

    The teacher's are constants. What comes out has the student's precision; statistics are in fp32.

    Args:
        student, teacher: as many maps, in pairs of as many channels.
        rectify: apply a ReLU to what comes out.
        sync: take the statistics over the maps of all processes.

    Raises:
        ValueError: if there aren't as many of both.
    """
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} maps can't be aligned to {len(teacher)}")
    with torch.no_grad():
        mean, std = channel_statistics(teacher, sync)
    return list(_Rescaled.apply(rectify, sync, True, mean, std, *student))


class _Rescaled(torch.autograd.Function):
    """(map - its mean) / (its deviation + EPS), then times `std` plus `mean` (maps, C) if given, then maybe a ReLU.
    The result is in fp32, or with `narrow` as precise as the maps.

    By hand, because autograd would keep four copies of every map and launch five times as many kernels. This keeps
    the input and the output only, both of which the networks around it keep anyway, in half precision if they are.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        rectify: bool,
        sync: bool,
        narrow: bool,
        mean: Tensor | None,
        std: Tensor | None,
        *maps: Tensor,
    ) -> tuple[Tensor, ...]:
        own_mean, own_std = channel_statistics(list(maps), sync)
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
        ctx.sync = sync and num_processes() > 1
        ctx.save_for_backward(own_mean, own_std, factor, *maps, *(outputs if rectify else ()))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mean, std, factor, *saved = ctx.saved_tensors
        maps, outputs = saved[: len(gradients)], saved[len(gradients) :]
        if ctx.rectify:
            through = torch._foreach_sign(outputs)  # 1 or 0
            torch._foreach_mul_(through, gradients)
            gradients = through
        if ctx.sync:
            return *[None] * 5, *_shared_backward(gradients, maps, mean, std, factor)
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
        return *[None] * 5, *results


def _shared_backward(
    gradients: tuple[Tensor, ...], maps: tuple[Tensor, ...], mean: Tensor, std: Tensor, factor: Tensor
) -> list[Tensor]:
    """Gradients of the sum of all processes' losses, whose mean DDP makes of them.

    With y = (x - m) * f, where the deviation s is the square root of sum (x - m)^2 / (n - 1) and f is proportional to
    1 / (s + EPS), the gradient g of y becomes that of x, f * (g - mean g - (x - m) * t), where t is
    sum(g * (x - m)) / ((n - 1) * s * (s + EPS)).
    """
    counts = _shared_counts(list(maps))
    gradients = tuple(_full(g) for g in gradients)
    centered = [m - center for m, center in zip(maps, _per_channel(mean), strict=True)]
    pairs = list(zip(gradients, centered, strict=True))
    sums = torch.stack([g.sum(dim=(0, 2, 3)) for g in gradients] + [(g * c).sum(dim=(0, 2, 3)) for g, c in pairs])
    total, product = sum_over_ranks(sums).chunk(2)
    slope = product / ((counts - 1).clamp(min=1) * std * (std + EPS)).clamp(min=TINY)
    rows = zip(pairs, _per_channel(factor), _per_channel(total / counts), _per_channel(slope), strict=True)
    return [(f * (g - average - c * s)).to(m.dtype) for ((g, c), f, average, s), m in zip(rows, maps, strict=True)]


def _full(features: Tensor) -> Tensor:
    """In fp32 if they are in half precision."""
    return features.to(_full_dtype(features))


def _full_dtype(features: Tensor) -> torch.dtype:
    return torch.float32 if features.dtype in HALF else features.dtype


def _values_per_channel(features: Tensor) -> int:
    return features.shape[0] * features.shape[2] * features.shape[3]


def _per_channel(rows: Tensor) -> tuple[Tensor, ...]:
    """(maps, C) -> (C, 1, 1) a map."""
    return rows.view(*rows.shape, 1, 1).unbind()
