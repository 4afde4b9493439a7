"""Elementwise losses and box overlaps: pure tensor functions. Weighting, summing and normalising is the caller's."""

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6  # lower bound of unions, enclosing areas and of the IoU inside a logarithm


def quality_focal_loss(logits: Tensor, targets: Tensor, beta: float = 2.0) -> Tensor:
    """|target - p|^beta * BCE(p, target) (GFL, arXiv 2006.04388, equation 4). Shapes all equal; targets in [0, 1].

    The factor carries gradient too, as in the reference.
    """
    factor = (targets - logits.sigmoid()).abs().pow(beta)
    return factor * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def distribution_focal_loss(bin_logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy with the two bins around the target, linearly weighted (GFL, arXiv 2006.04388, equation 6).

    Args:
        bin_logits: (..., bins).
        targets: (...) in bins, at least 0 and below the last bin.
    """
    left = targets.floor()
    weight_right = targets - left
    log_probabilities = bin_logits.log_softmax(dim=-1)
    left_index = left.long().unsqueeze(-1)
    log_left = log_probabilities.gather(-1, left_index).squeeze(-1)
    log_right = log_probabilities.gather(-1, left_index + 1).squeeze(-1)
    return -(log_left * (1 - weight_right) + log_right * weight_right)


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    top_left = torch.maximum(a[..., :2], b[..., :2])
    bottom_right = torch.minimum(a[..., 2:], b[..., 2:])
    width_height = (bottom_right - top_left).clamp(min=0)
    intersection = width_height[..., 0] * width_height[..., 1]
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    return intersection, (area_a + area_b - intersection).clamp(min=EPS)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes (..., 4) xyxy with boxes (..., 4) xyxy, element by element (broadcasting)."""
    intersection, union = _intersection_and_union(a, b)
    return intersection / union


def giou_loss(a: Tensor, b: Tensor) -> Tensor:
    """1 - GIoU of boxes (..., 4) xyxy, element by element (Rezatofighi et al., CVPR 2019, arXiv 1902.09630)."""
    intersection, union = _intersection_and_union(a, b)
    size = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0)
    enclosing = (size[..., 0] * size[..., 1]).clamp(min=EPS)
    return 1 - (intersection / union - (enclosing - union) / enclosing)


def binary_kd_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """|p - p_teacher| * BCE(p, p_teacher) (CrossKD, arXiv 2306.11369, section 3.3: quality focal loss with beta 1).

    The factor carries gradient too. Shapes equal.
    """
    return quality_focal_loss(logits, teacher_logits.sigmoid(), beta=1.0)


def bin_kl_loss(bin_logits: Tensor, teacher_bin_logits: Tensor) -> Tensor:
    """KL(teacher || student) of a side's distance distributions, (..., bins) -> (...). Temperature 1.

    (LD, arXiv 2102.12252, equation 3, as CrossKD uses it for GFL.)
    """
    log_p = bin_logits.log_softmax(dim=-1)
    log_teacher = teacher_bin_logits.log_softmax(dim=-1)
    return (log_teacher.exp() * (log_teacher - log_p)).sum(dim=-1)
