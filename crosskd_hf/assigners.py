"""Which prior learns which ground-truth box: pure tensor functions over whole batches, without a host sync.

Ground truth comes padded: boxes (N, G, 4) xyxy pixels and a mask (N, G) that is True for real boxes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

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


def gather_boxes(boxes: Tensor, index: Tensor) -> Tensor:
    """Boxes (N, G, 4) and an index (N, P) -> (N, P, 4). G may be 0: zeros then."""
    if boxes.shape[1] == 0:
        return boxes.new_zeros(*index.shape, 4)
    return boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))


def gather_labels(labels: Tensor, index: Tensor) -> Tensor:
    """Labels (N, G) and an index (N, P) -> (N, P). G may be 0: zeros then."""
    if labels.shape[1] == 0:
        return torch.zeros_like(index)
    return labels.gather(1, index)


def atss_assign(anchors: list[Tensor], valid: Tensor, boxes: Tensor, box_mask: Tensor, topk: int = 9) -> Assignment:
    """Adaptive Training Sample Selection (Zhang et al., CVPR 2020, arXiv 1912.02424, algorithm 1).

    For each box the `topk` valid anchors of each level with the nearest centres are candidates. Those whose IoU
    reaches the mean plus the unbiased standard deviation of the candidates' IoUs, and whose centre lies more than
    0.01 pixel inside the box, are positive. An anchor claimed by several boxes goes to the highest IoU, the first
    box on a tie.

    Args:
        anchors: (P_l, 4) xyxy a level.
        valid: (N, P) bool, anchors that may be candidates.
        boxes: (N, G, 4) xyxy, padded.
        box_mask: (N, G) bool.
        topk: candidates a level and box.
    """
    all_anchors = torch.cat(anchors)
    batch, num_boxes = box_mask.shape
    num_anchors = len(all_anchors)
    class_weights = valid.to(all_anchors.dtype)
    if num_boxes == 0:
        empty = torch.zeros_like(valid)
        return Assignment(empty, empty.long(), class_weights)
    candidates, is_candidate = _nearest_anchors(anchors, valid, boxes, topk)  # (N, G, K)
    candidate_boxes = all_anchors[candidates]  # (N, G, K, 4)
    ious = box_iou(candidate_boxes, boxes.unsqueeze(2))
    threshold = _mean_plus_std(ious, is_candidate).unsqueeze(-1)
    center = (candidate_boxes[..., :2] + candidate_boxes[..., 2:]) / 2
    inside = torch.cat([center - boxes[..., None, :2], boxes[..., None, 2:] - center], dim=-1).amin(dim=-1) > 0.01
    claims = is_candidate & box_mask.unsqueeze(-1) & (ious >= threshold) & inside

    # One pass for the best IoU of each anchor, one for the first box that has it.
    flat_index = candidates.flatten(1)
    claimed_iou = torch.where(claims, ious, -1.0).flatten(1)
    best_iou = claimed_iou.new_full((batch, num_anchors), -1.0).scatter_reduce(1, flat_index, claimed_iou, "amax")
    positive = best_iou > -1.0
    wins = claims.flatten(1) & (claimed_iou == best_iou.gather(1, flat_index))
    box_number = torch.arange(num_boxes, device=boxes.device).repeat_interleave(candidates.shape[2]).expand(batch, -1)
    box_number = torch.where(wins, box_number, num_boxes)
    box_index = torch.full_like(positive, num_boxes, dtype=torch.long)
    box_index = box_index.scatter_reduce(1, flat_index, box_number, "amin")
    return Assignment(positive, torch.where(positive, box_index, 0), class_weights)


def _nearest_anchors(anchors: list[Tensor], valid: Tensor, boxes: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Indices (N, G, K) of the nearest valid anchors of every level, and which of them are real (a level may have
    fewer valid anchors than `topk`)."""
    box_center = (boxes[..., :2] + boxes[..., 2:]) / 2
    indices, real, start = [], [], 0
    for level in anchors:
        center = (level[:, :2] + level[:, 2:]) / 2
        delta = box_center.unsqueeze(2) - center  # (N, G, P_l, 2)
        distance = delta.pow(2).sum(dim=-1).sqrt()
        usable = valid[:, start : start + len(level)].unsqueeze(1)
        distance = distance.masked_fill(~usable, float("inf"))
        nearest, index = distance.topk(min(topk, len(level)), dim=-1, largest=False)
        indices.append(index + start)
        real.append(nearest.isfinite())
        start += len(level)
    return torch.cat(indices, dim=-1), torch.cat(real, dim=-1)


def _mean_plus_std(values: Tensor, mask: Tensor) -> Tensor:
    """Mean plus unbiased standard deviation over the last dimension, of the entries in the mask.

    A single candidate has no unbiased deviation (the reference gets NaN there and no positive): 0 here.
    """
    count = mask.sum(dim=-1)
    mean = torch.where(mask, values, 0.0).sum(dim=-1) / count.clamp(min=1)
    squares = torch.where(mask, values - mean.unsqueeze(-1), 0.0).pow(2).sum(dim=-1)
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
    class_weights = valid.to(anchors.dtype)
    if boxes.shape[1] == 0:
        empty = torch.zeros_like(valid)
        return Assignment(empty, empty.long(), class_weights)
    usable = box_mask.unsqueeze(-1) & valid.unsqueeze(1)
    ious = torch.where(usable, box_iou(anchors, boxes.unsqueeze(2)), -1.0)  # (N, G, P)
    best_iou, box_index = ious.max(dim=1)
    box_best = ious.amax(dim=2, keepdim=True)
    number = torch.arange(boxes.shape[1], device=boxes.device)[:, None]
    forced = torch.where((ious == box_best) & (box_best > 0), number, -1).amax(dim=1)
    box_index = torch.where(forced >= 0, forced, box_index)
    positive = (best_iou >= positive_iou) | (forced >= 0)
    ignored = ~positive & (best_iou >= negative_iou)
    return Assignment(positive, torch.where(positive, box_index, 0), class_weights * ~ignored)


def point_assign(points: Tensor, lower: Tensor, upper: Tensor, boxes: Tensor, box_mask: Tensor) -> Assignment:
    """Points inside a box learn it, if its size suits their level (FCOS, arXiv 1904.01355, section 3.2).

    Of several boxes the smallest wins, the first on a tie. Every point has class weight 1, also on padding.

    Args:
        points: (P, 2) xy.
        lower, upper: (P,) range of the largest distance to a side, both ends inclusive.
        boxes, box_mask: padded ground truth.
    """
    batch, num_boxes = box_mask.shape
    class_weights = boxes.new_ones(batch, len(points))
    if num_boxes == 0:
        empty = torch.zeros(batch, len(points), dtype=torch.bool, device=boxes.device)
        return Assignment(empty, empty.long(), class_weights)
    corners = boxes.unsqueeze(2)  # (N, G, 1, 4)
    distances = torch.cat([points - corners[..., :2], corners[..., 2:] - points], dim=-1)  # (N, G, P, 4)
    farthest = distances.amax(dim=-1)
    suits = (distances.amin(dim=-1) > 0) & (farthest >= lower) & (farthest <= upper) & box_mask.unsqueeze(-1)
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    smallest, box_index = torch.where(suits, areas.unsqueeze(-1), float("inf")).min(dim=1)
    positive = smallest.isfinite()
    return Assignment(positive, torch.where(positive, box_index, 0), class_weights)
