"""PKD: feature distillation by Pearson correlation (Cao et al., NeurIPS 2022, arXiv 2207.02039)."""

import torch
from torch import Tensor

from .crosskd import standardise


def pkd_loss(student_features: list[Tensor], teacher_features: list[Tensor]) -> Tensor:
    """Half the mean squared difference of standardised FPN levels (equation 3).

    Args:
        student_features, teacher_features: (N, C, H, W) a level, of the same shapes.

    Returns:
        (levels,) tensor.
    """
    differences = [
        standardise(student.float()) - standardise(teacher.float())
        for student, teacher in zip(student_features, teacher_features, strict=True)
    ]
    return torch.stack([0.5 * difference.pow(2).mean() for difference in differences])
