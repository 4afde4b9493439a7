"""Between boxes and what a head predicts. Boxes are xyxy in pixels, all functions batch over leading dimensions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_LOG_RATIO = math.log(1000 / 16)  # a box is at most 62.5 times as wide or high as its anchor


def distances_to_boxes(points: Tensor, distances: Tensor) -> Tensor:
    """Points (..., 2) and their distances (..., 4) to the left, top, right, bottom sides -> boxes (..., 4) xyxy."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def boxes_to_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """Points (..., 2) and boxes (..., 4) xyxy -> distances (..., 4) to the left, top, right, bottom sides."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def box_centers(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) xyxy -> centres (..., 2) xy."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


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


def _scale(deltas: Tensor, factors: Sequence[float]) -> Tensor:
    """Numbers (..., 4) times one factor each; a tensor of the factors would have to be copied to the device."""
    if all(factor == 1 for factor in factors):
        return deltas
    return torch.stack([part * factor for part, factor in zip(deltas.unbind(-1), factors, strict=True)], dim=-1)


def boxes_to_deltas(anchors: Tensor, boxes: Tensor, stds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Boxes (..., 4) xyxy relative to anchors (..., 4): shift of the centre in anchor sizes, log of the size ratio.

    (R-CNN, arXiv 1311.2524, appendix C, divided by `stds`.)
    """
    size, target_size = anchors[..., 2:] - anchors[..., :2], boxes[..., 2:] - boxes[..., :2]
    shift = (box_centers(boxes) - box_centers(anchors)) / size
    return _scale(torch.cat([shift, (target_size / size).log()], dim=-1), [1 / std for std in stds])


def deltas_to_boxes(anchors: Tensor, deltas: Tensor, stds: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Inverse of `boxes_to_deltas`; the log ratios are clamped to +-`MAX_LOG_RATIO`, boxes are not clipped."""
    deltas = _scale(deltas, stds)
    size = anchors[..., 2:] - anchors[..., :2]
    center = box_centers(anchors) + deltas[..., :2] * size
    half = size * deltas[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() / 2
    return torch.cat([center - half, center + half], dim=-1)


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """How central points (..., 2) lie in boxes (..., 4) xyxy, (...) in [0, 1]: sqrt of the product of the side ratios.

    (FCOS, arXiv 1904.01355, equation 3.) 0 for points outside.
    """
    distances = boxes_to_distances(points, boxes).clamp(min=0)
    opposite = torch.stack([distances[..., 0::2], distances[..., 1::2]], dim=-2)  # (..., axis, two sides)
    ratios = opposite.amin(dim=-1) / opposite.amax(dim=-1).clamp(min=1e-12)
    return ratios.prod(dim=-1).sqrt()
