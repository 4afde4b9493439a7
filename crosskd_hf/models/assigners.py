"""Which prior learns which ground-truth box: pure tensor functions over whole batches, without a host sync.

Ground truth comes padded: boxes (N, G, 4) xyxy pixels, G at least 1, and a mask (N, G) that is True for real boxes.
Very many boxes are gone through in chunks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .box_coding import box_centers, boxes_to_distances
from .losses import box_iou


@dataclass(frozen=True)
class Assignment:
    """What each prior was given.

    Attributes:
        positive: (N, P) bool.
        box_index: (N, P) int64, index of the box of a positive prior; 0 elsewhere, so that gathering is safe.
        class_weights: (N, P) float, 1 or 0: 0 takes a prior out of the class loss and out of distillation.
    """

    positive: Tensor
    box_index: Tensor
    class_weights: Tensor


MAX_PAIRS = 2**25  # (image, box, prior) triples that are looked at together: a tensor of them takes 128 MB


def box_chunks(boxes: tuple[int, ...], priors: int) -> list[slice]:
    """Which boxes to look at together, so that `MAX_PAIRS` is kept however many there are.

    Args:
        boxes: the shape (N, G, 4) of the padded boxes.
        priors: number of priors.
    """
    batch, count = boxes[:2]
    size = max(1, MAX_PAIRS // (batch * priors))
    if count <= size:  # not by the loop: `torch.compile` would make it for one number of boxes only
        return [slice(0, count)]
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def gather_boxes(boxes: Tensor, index: Tensor) -> Tensor:
    """Boxes (N, G, 4) and an index (N, P) -> (N, P, 4)."""
    return boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))


def atss_assign(
    anchors: Tensor, level_sizes: list[int], valid: Tensor, boxes: Tensor, box_mask: Tensor, topk: int = 9
) -> Assignment:
    """Adaptive Training Sample Selection (Zhang et al., CVPR 2020, arXiv 1912.02424, algorithm 1).

    For each box the `topk` valid anchors of each level with the nearest centres are candidates. Those whose IoU
    reaches the mean plus the unbiased standard deviation of the candidates' IoUs, and whose centre lies more than
    0.01 pixel inside the box, are positive. An anchor claimed by several boxes goes to the highest IoU, the first
    box on a tie.

    Args:
        anchors: (P, 4) xyxy, level by level.
        level_sizes: anchors a level.
        valid: (N, P) bool, anchors that may be candidates.
        boxes: (N, G, 4) xyxy, padded.
        box_mask: (N, G) bool.
        topk: candidates per level and box.
    """
    batch, num_boxes = box_mask.shape
    centers = box_centers(anchors)
    parts = [
        _nearest_anchors(centers, level_sizes, valid, boxes[:, part], topk)
        for part in box_chunks(boxes.shape, len(anchors))
    ]
    candidates, is_candidate = (
        torch.cat(part, dim=1) if len(part) > 1 else part[0] for part in zip(*parts, strict=True)
    )
    each = boxes.unsqueeze(2)  # (N, G, 1, 4)
    ious = box_iou(anchors[candidates], each)
    threshold = _mean_plus_std(ious, is_candidate)
    center = centers[candidates]  # (N, G, K, 2)
    inside = boxes_to_distances(center, each).amin(dim=-1) > 0.01
    claims = is_candidate & box_mask.unsqueeze(-1) & (ious >= threshold) & inside

    # One pass for the best IoU of each anchor, one for the first box that has it.
    flat_index = candidates.flatten(1)
    claimed_iou = (ious * claims).flatten(1)  # above 0, as the centre of one lies in the other
    best_iou = claimed_iou.new_zeros(batch, len(anchors)).scatter_reduce(1, flat_index, claimed_iou, "amax")
    positive = best_iou > 0
    wins = claims.flatten(1) & (claimed_iou == best_iou.gather(1, flat_index))
    box_number = torch.arange(num_boxes, device=boxes.device).unsqueeze(1)
    box_number = torch.where(wins.view_as(candidates), box_number, num_boxes).flatten(1)
    box_index = torch.full_like(positive, num_boxes, dtype=torch.long)
    box_index = box_index.scatter_reduce(1, flat_index, box_number, "amin")
    return Assignment(positive, box_index * positive, valid.to(anchors.dtype))


def atss_thresholds(anchors: Tensor, level_sizes: list[int], valid: Tensor, boxes: Tensor, topk: int = 9) -> Tensor:
    """The IoU that a candidate of each box must reach in `atss_assign`, (N, G, 1); arguments as there."""
    candidates, is_candidate = _nearest_anchors(box_centers(anchors), level_sizes, valid, boxes, topk)
    return _mean_plus_std(box_iou(anchors[candidates], boxes.unsqueeze(2)), is_candidate)


def _nearest_anchors(
    centers: Tensor, level_sizes: list[int], valid: Tensor, boxes: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """Indices (N, G, K) of the nearest valid anchors of every level, and which of them are real (a level may have
    fewer valid anchors than `topk`)."""
    delta = box_centers(boxes).unsqueeze(2) - centers  # (N, G, P, 2)
    distance = torch.linalg.vector_norm(delta, dim=-1)  # not squared: its rounding makes ties
    distance = torch.where(valid.unsqueeze(1), distance, float("inf"))
    nearest, index, start = [], [], 0
    for level in distance.split(level_sizes, dim=-1):
        closest = level.topk(min(topk, level.shape[-1]), dim=-1, largest=False)
        nearest.append(closest.values)
        index.append(closest.indices + start)
        start += level.shape[-1]
    return torch.cat(index, dim=-1), torch.cat(nearest, dim=-1) < float("inf")


def _mean_plus_std(values: Tensor, mask: Tensor) -> Tensor:
    """Mean plus unbiased standard deviation over the last dimension, which is kept, of the entries in the mask.

    A single candidate has no unbiased deviation (the reference gets NaN there and no positive): 0 here.
    """
    count = mask.sum(dim=-1, keepdim=True)
    mean = (values * mask).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    squares = ((values - mean) * mask).square().sum(dim=-1, keepdim=True)
    return mean + (squares / (count - 1).clamp(min=1)).sqrt()


def max_iou_assign(
    anchors: Tensor, valid: Tensor, boxes: Tensor, box_mask: Tensor, positive_iou: float, negative_iou: float
) -> Assignment:
    """Assignment by the highest IoU (Faster R-CNN, arXiv 1506.01497, section 3.1.2, with RetinaNet's thresholds).

    An anchor whose best IoU reaches `positive_iou` is positive, below `negative_iou` it is background, between the two
    it is ignored (class weight 0). Then every box makes all anchors positive that are tied at its best IoU, also those
    matched before; later boxes win. A box that overlaps no anchor makes none positive. (In the reference such a box
    would tie with every anchor.)

    Args:
        anchors: (P, 4) xyxy.
        valid: (N, P) bool; others take no part.
        boxes, box_mask: padded ground truth.
        positive_iou, negative_iou: thresholds, the first inclusive.
    """
    parts = (
        _best_boxes(anchors, valid, boxes[:, part], box_mask[:, part], part.start)
        for part in box_chunks(boxes.shape, len(anchors))
    )
    best_iou, box_index, forced = next(parts)
    for iou, index, forces in parts:
        better = iou > best_iou
        best_iou, box_index = torch.where(better, iou, best_iou), torch.where(better, index, box_index)
        forced = torch.maximum(forced, forces)
    box_index = torch.where(forced >= 0, forced, box_index)
    positive = (best_iou >= positive_iou) | (forced >= 0)
    ignored = ~positive & (best_iou >= negative_iou)
    return Assignment(positive, box_index * positive, valid.to(anchors.dtype) * ~ignored)


def _best_boxes(
    anchors: Tensor, valid: Tensor, boxes: Tensor, box_mask: Tensor, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of boxes number `first` and on: each anchor's best IoU, its box, and the last box it is the best of, or -1."""
    usable = box_mask.unsqueeze(-1) & valid.unsqueeze(1)
    ious = torch.where(usable, box_iou(anchors, boxes.unsqueeze(2)), -1.0)  # (N, G, P)
    best_iou, box_index = ious.max(dim=1)
    box_best = ious.amax(dim=2, keepdim=True)
    number = torch.arange(first, first + boxes.shape[1], device=boxes.device)[:, None]
    forced = torch.where((ious == box_best) & (box_best > 0), number, -1).amax(dim=1)
    return best_iou, box_index + first if first else box_index, forced


def point_assign(points: Tensor, lower: Tensor, upper: Tensor, boxes: Tensor, box_mask: Tensor) -> Assignment:
    """Points inside a box learn it, if its size suits their level (FCOS, arXiv 1904.01355, section 3.2).

    Of several boxes the smallest wins, the first on a tie. Every point has class weight 1, also on padding.

    Args:
        points: (P, 2) xy.
        lower, upper: (P,) range of the largest distance to a side, both ends inclusive.
        boxes, box_mask: padded ground truth.
    """
    parts = (
        _smallest_boxes(points, lower, upper, boxes[:, part], box_mask[:, part], part.start)
        for part in box_chunks(boxes.shape, len(points))
    )
    smallest, box_index = next(parts)
    for area, index in parts:
        smaller = area < smallest
        smallest, box_index = torch.where(smaller, area, smallest), torch.where(smaller, index, box_index)
    positive = smallest < float("inf")
    return Assignment(positive, box_index * positive, torch.ones_like(smallest))


def _smallest_boxes(
    points: Tensor, lower: Tensor, upper: Tensor, boxes: Tensor, box_mask: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """Of boxes number `first` and on: the area of the smallest that suits each point, or infinity, and the box."""
    distances = boxes_to_distances(points, boxes.unsqueeze(2))  # (N, G, P, 4)
    farthest = distances.amax(dim=-1)
    suits = (distances.amin(dim=-1) > 0) & (farthest >= lower) & (farthest <= upper) & box_mask.unsqueeze(-1)
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1, keepdim=True)
    smallest, box_index = torch.where(suits, areas, float("inf")).min(dim=1)
    return smallest, box_index + first if first else box_index
