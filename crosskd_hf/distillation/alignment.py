"""Maps with given statistics per channel: what the cross pass and PKD compare maps by (CrossKD, section 3.2)."""

import torch
from torch import Tensor

EPS = 1e-6  # added to a deviation that is divided by
HALF = (torch.float16, torch.bfloat16)
TINY = 1e-30  # of a variance whose root is taken


def channel_statistics(maps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation per channel of maps (N, C, H, W), over batch and space: (maps, C) each,
    in fp32 also of maps in half precision.

    A single value (one image, 1x1 level) has no unbiased deviation: 0, so that it standardises to 0.

    Args:
        maps: of this process: the reference doesn't share statistics between processes.
    """
    pairs = [torch.var_mean(_full(m), (0, 2, 3), correction=min(1, _values_per_channel(m) - 1)) for m in maps]
    variances, means = zip(*pairs, strict=True)
    # Not the root of 0, whose gradient is infinite: channels may be constant.
    return torch.stack(means), torch.stack(variances).clamp(min=TINY).sqrt()


def standardise(maps: list[Tensor]) -> list[Tensor]:
    """Maps (N, C, H, W) with zero mean and unit deviation per channel; gradients flow through both statistics.

    Maps in half precision give fp32.
    """
    mean, std = channel_statistics(maps)
    rows = zip(maps, _per_channel(mean), _per_channel(std + EPS), strict=True)
    return [(features - center) / divisor for features, center, divisor in rows]


def align(student: list[Tensor], teacher: list[Tensor], rectify: bool = False) -> list[Tensor]:
    """Give each of the student's maps (N, C, H, W) the mean and deviation per channel of the teacher's.

    The teacher's are constants. The result has the student's precision; statistics are in fp32.

    Args:
        student, teacher: as many maps, in pairs of as many channels.
        rectify: apply a ReLU to the result.

    Raises:
        ValueError: if there aren't as many of both.
    """
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} maps can't be aligned to {len(teacher)}")
    with torch.no_grad():
        mean, std = channel_statistics(teacher)
    student_mean, student_std = channel_statistics(student)
    factor = std / (student_std + EPS)
    rows = zip(student, *map(_per_channel, (student_mean, factor, mean)), strict=True)
    # Not map * factor + (mean - student_mean * factor): where a channel is nearly constant, that rounds to noise.
    aligned = [torch.addcmul(shift, m - center, scale).to(m.dtype) for m, center, scale, shift in rows]
    return [m.relu() for m in aligned] if rectify else aligned


def _full(features: Tensor) -> Tensor:
    """In fp32 if they are in half precision."""
    return features.float() if features.dtype in HALF else features


def _values_per_channel(features: Tensor) -> int:
    return features.shape[0] * features.shape[2] * features.shape[3]


def _per_channel(rows: Tensor) -> tuple[Tensor, ...]:
    """(maps, C) -> (C, 1, 1) a map."""
    return rows.view(*rows.shape, 1, 1).unbind()
