"""Between boxes and what a head predicts. Boxes are xyxy in pixels, all functions batch over leading dimensions."""

import math

import torch
from torch import Tensor

MAX_LOG_RATIO = math.log(1000 / 16)  # a box is at most 62.5 times as wide or high as its anchor


def distances_to_boxes(points: Tensor, distances: Tensor) -> Tensor:
    """Points (..., 2) and their distances (..., 4) to the left, top, right, bottom sides -> boxes (..., 4) xyxy."""
    before, after = distances.chunk(2, dim=-1)
    return torch.cat([points - before, points + after], dim=-1)


def boxes_to_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """Points (..., 2) and boxes (..., 4) xyxy -> distances (..., 4) to the left, top, right, bottom sides."""
    top_left, bottom_right = boxes.chunk(2, dim=-1)
    return torch.cat([points - top_left, bottom_right - points], dim=-1)


def box_centers(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) xyxy -> centres (..., 2) xy."""
    top_left, bottom_right = boxes.chunk(2, dim=-1)
    return (top_left + bottom_right) / 2


def expected_bins(bin_logits: Tensor) -> Tensor:
    """Expectation of a side's distance distribution (GFL, arXiv 2006.04388, equation 5).

    Args:
        bin_logits: (..., 4 * bins) logits, side-major.

    Returns:
        (..., 4) expected bin of each side, in bins (strides).
    """
    probabilities = bin_logits.unflatten(-1, (4, -1)).softmax(dim=-1)
    bins = torch.arange(probabilities.shape[-1], device=bin_logits.device, dtype=probabilities.dtype)
    return (probabilities * bins).sum(dim=-1)  # a matrix product would be rounded under autocast


def _times(pairs: Tensor, factors: tuple[float, float]) -> Tensor:
    """Numbers (..., 2) times one factor each; a tensor of the factors would have to be copied to the device."""
    first, second = factors
    if first == second:
        return pairs if first == 1 else pairs * first
    return torch.stack([part * factor for part, factor in zip(pairs.unbind(-1), factors, strict=True)], dim=-1)


def distances_to_deltas(distances: Tensor, extents: Tensor, stds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Boxes relative to anchors: shift of the centre in anchor sizes, log of the size ratio.

    (R-CNN, arXiv 1311.2524, appendix C, divided by `stds`.)

    Args:
        distances: (..., 4) from the anchor's centre to the box's left, top, right, bottom sides.
        extents: (..., 4) the same of the anchor's own sides.
        stds: of the four.
    """
    dx, dy, dw, dh = (1 / std for std in stds)
    before, after = (distances / extents).chunk(2, dim=-1)
    log_ratio = ((after + before) / 2).log()
    return torch.cat([_times(after - before, (dx / 4, dy / 4)), _times(log_ratio, (dw, dh))], dim=-1)


def deltas_to_distances(deltas: Tensor, extents: Tensor, stds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Inverse of `distances_to_deltas`; the log ratios are clamped to +-`MAX_LOG_RATIO`."""
    dx, dy, dw, dh = stds
    shift, log_ratio = deltas.chunk(2, dim=-1)
    shift = _times(shift, (2 * dx, 2 * dy))  # in half sizes
    ratio = _times(log_ratio, (dw, dh)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return torch.cat([ratio - shift, ratio + shift], dim=-1) * extents


def logits_of_product(first: Tensor, second: Tensor) -> Tensor:
    """The logits of the product of two probabilities, given their logits: of a class score times its centerness."""
    first, second = torch.broadcast_tensors(first, second)
    # 1 / p - 1, of which the logit is the negative logarithm: exp(-a) + exp(-b) + exp(-a - b).
    return -torch.logaddexp(torch.logaddexp(-first, -second), -first - second)


def centerness(distances: Tensor) -> Tensor:
    """How central a point lies in its box, (...) in [0, 1]: sqrt of the product of the side ratios; 0 outside.

    (FCOS, arXiv 1904.01355, equation 3.)

    Args:
        distances: (..., 4) to the left, top, right, bottom sides.
    """
    before, after = distances.clamp(min=0).chunk(2, dim=-1)
    ratios = torch.minimum(before, after) / torch.maximum(before, after).clamp(min=1e-12)
    return ratios.prod(dim=-1).sqrt()
