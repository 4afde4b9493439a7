"""Between boxes and what a head predicts. Boxes are xyxy in pixels, all functions batch over leading dimensions."""

import torch
from torch import Tensor


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
    return probabilities @ bins
