"""PKD: feature distillation by Pearson correlation (Cao et al., NeurIPS 2022, arXiv 2207.02039)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .alignment import standardise


def pkd_loss(student_features: list[Tensor], teacher_features: list[Tensor], sync: bool = False) -> Tensor:
    """Half the mean squared difference of standardised FPN levels (equation 3).

    Args:
        student_features, teacher_features: (N, C, H, W) a level, of the same shapes.
        sync: standardise by the statistics of all processes' features.

    Returns:
        (levels,) tensor.
    """
    mine, theirs = standardise(student_features, sync), standardise(teacher_features, sync)
    return torch.stack([0.5 * F.mse_loss(a, b) for a, b in zip(mine, theirs, strict=True)])
