"""Losses of priors and box overlaps: pure tensor functions. Weighting, summing and normalising is the caller's."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

EPS = 1e-6  # lower bound of unions, enclosing areas and of the IoU inside a logarithm
TINY = 1e-30  # of a base that may have a negative exponent
MAX_CLASS_SCORES = 5 * 2**19  # gone through at once, if three parts are enough for that
MAX_PARTS = 3  # so that operators don't grow with images; more of them don't lower a step's peak any more


def quality_focal_loss(logits: Tensor, targets: Tensor, beta: float = 2.0) -> Tensor:
    """|target - p|^beta * BCE(p, target), summed over classes (GFL, arXiv 2006.04388, equation 4).

    The factor carries gradient too, as in the reference.

    Args:
        logits, targets: (..., classes), targets in [0, 1].
        beta: positive.
    """
    return _ScaledCrossEntropy.apply(logits, targets, beta, None, False)


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """alpha_t * (1 - p_t)^gamma * -log(p_t), summed over classes (RetinaNet, arXiv 1708.02002, equation 5).

    Args:
        logits, targets: (..., classes), targets 0 or 1, so that 1 - p_t is |target - p|.
        alpha: weight of targets of 1; the others have 1 - alpha.
        gamma: positive.
    """
    return _ScaledCrossEntropy.apply(logits, targets, gamma, alpha, False)


def binary_kd_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """|p - p_teacher| * BCE(p, p_teacher), summed over classes (CrossKD, arXiv 2306.11369, section 3.3).

    It is the quality focal loss with beta 1; the factor carries gradient too.

    Args:
        logits, teacher_logits: (..., classes).
    """
    return _ScaledCrossEntropy.apply(logits, teacher_logits, 1.0, None, True)


class _ScaledCrossEntropy(torch.autograd.Function):
    """|p - t|^exponent * BCE(p, t) of targets t, times `alpha` where t is 1 and 1 - `alpha` where it is 0, summed over
    the last dimension.

    By hand: autograd would keep half a dozen copies of the class map, the largest tensor of the losses, until the
    backward pass: 31% more of a RetinaNet step's peak memory (`benchmarks/step.py`, 8 images). This keeps one, its
    gradient, and large maps are gone through in parts.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        exponent: float,
        alpha: float | None,
        targets_are_logits: bool,
    ) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        options = exponent, alpha, targets_are_logits
        # A compiler needs no parts, and would make a program of one number of them.
        if torch.compiler.is_compiling() or logits.numel() <= MAX_CLASS_SCORES:
            loss = _scaled_cross_entropy(logits, targets, *options, gradient)
        else:
            loss = logits.new_empty(logits.shape[:-1])
            priors = logits.shape[-2]
            size = -(-priors // min(MAX_PARTS, -(-logits.numel() // MAX_CLASS_SCORES)))
            for start in range(0, priors, size):
                part = slice(start, start + size)
                of_part = None if gradient is None else gradient[..., part, :]
                loss[..., part] = _scaled_cross_entropy(logits[..., part, :], targets[..., part, :], *options, of_part)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * gradient.unsqueeze(-1), None, None, None, None


def _scaled_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    exponent: float,
    alpha: float | None,
    targets_are_logits: bool,
    gradient: Tensor | None,
) -> Tensor:
    """The loss. Writes its gradient into `gradient`, if given."""
    targets = targets.sigmoid() if targets_are_logits else targets
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    if gradient is not None:  # dBCE/dx is p - t, dp/dx is p - p^2
        gradient.copy_(probability).addcmul_(probability, probability, value=-1).mul_(entropy)
    error = probability.sub_(targets)
    weights = None if alpha is None else (targets * (2 * alpha - 1)).add_(1 - alpha)
    del targets  # their probabilities' memory serves the next line
    factor = _signed_power(error, exponent - 1)  # d/dp |p - t|^exponent is exponent * factor
    if weights is not None:
        factor = weights.mul_(factor)
    if gradient is not None:
        gradient.mul_(exponent).addcmul_(error, error).mul_(factor)
    return entropy.mul_(error).mul_(factor).sum(dim=-1)


def _signed_power(values: Tensor, exponent: float) -> Tensor:
    """sign(x) * |x|^exponent, 0 at 0."""
    if exponent == 1:
        return values
    return values.sign() if exponent == 0 else values.sign().mul_(values.abs().clamp_(min=TINY).pow_(exponent))


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


def _area(size: Tensor) -> Tensor:
    width, height = size.unbind(-1)
    return width * height


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes (..., 4) xyxy with boxes (..., 4) xyxy, element by element (broadcasting)."""
    (a_start, a_end), (b_start, b_end) = a.chunk(2, dim=-1), b.chunk(2, dim=-1)
    intersection = _area((torch.minimum(a_end, b_end) - torch.maximum(a_start, b_start)).clamp(min=0))
    union = _area(a_end - a_start) + _area(b_end - b_start) - intersection
    return intersection / union.clamp(min=EPS)


def distance_overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of boxes given as distances from one point, element by element.

    From distances, one minimum and one sum say how far two boxes overlap along an axis, without a detour over image
    coordinates. (GIoU: Rezatofighi et al., CVPR 2019, arXiv 1902.09630.)

    Args:
        a, b: (..., 4) distances to the left, top, right and bottom sides, of equal shapes.

    Returns:
        IoU (...) and generalised IoU (...).
    """
    intersection = _enclosed(torch.minimum(a, b))
    enclosing = _enclosed(torch.maximum(a, b)).clamp(min=EPS)
    union = (_enclosed(a) + _enclosed(b) - intersection).clamp(min=EPS)
    iou = intersection / union
    return iou, iou - (enclosing - union) / enclosing


def _enclosed(distances: Tensor) -> Tensor:
    """Area of the box with these distances (..., 4) to its sides; 0 where opposite sides have passed each other."""
    starts, ends = distances.chunk(2, dim=-1)
    return _area((starts + ends).clamp(min=0))


def bin_kl_loss(bin_logits: Tensor, teacher_bin_logits: Tensor) -> Tensor:
    """KL(teacher || student) of a side's distance distributions, (..., bins) -> (...). Temperature 1.

    (LD, arXiv 2102.12252, equation 3, as CrossKD uses it for GFL.)
    """
    log_p = bin_logits.log_softmax(dim=-1)
    log_teacher = teacher_bin_logits.log_softmax(dim=-1)
    return (log_teacher.exp() * (log_teacher - log_p)).sum(dim=-1)
