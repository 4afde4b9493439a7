"""Where methods compare predictions, beside the positive priors (LD, arXiv 2102.12252, section 3.3).

Pure tensor functions over whole batches, as the assigners are: padded boxes (N, G, 4) xyxy and a mask (N, G).
"""

import torch
from torch import Tensor

from ..models.assigners import atss_thresholds, box_chunks
from ..models.box_coding import box_centers
from ..models.losses import EPS, box_iou

NEAR = 0.25  # of ATSS's threshold, from which on a prior is valuable
FINE = 0.5  # of a box's best IoU, above which a prior is in its fine-grained region


@torch.no_grad()
def valuable_region(
    anchors: Tensor, level_sizes: list[int], valid: Tensor, boxes: Tensor, box_mask: Tensor, topk: int = 9
) -> Tensor:
    """Weight of each prior in the valuable localization region, (N, P): its largest IoU with a box whose region it is
    in, 0 outside.

    It is in a box's region if overlap is from 0.25 times the box's ATSS threshold to below that. As in the published
    code, the overlap is what the box covers of the *anchor*, less the centres' distance as in DIoU.

    Args:
        anchors: (P, 4) xyxy, level by level.
        level_sizes: anchors a level.
        valid: (N, P) bool.
        boxes, box_mask: padded ground truth.
        topk: of ATSS.
    """
    weight = torch.zeros_like(valid, dtype=anchors.dtype)
    for part in box_chunks(boxes.shape, len(anchors)):
        each, mask = boxes[:, part], box_mask[:, part]
        threshold = atss_thresholds(anchors, level_sizes, valid, each, topk)  # (N, G, 1)
        overlap = covered(anchors, each.unsqueeze(2))
        inside = (overlap >= NEAR * threshold) & (overlap < threshold) & mask[..., None] & valid[:, None]
        weight = torch.maximum(weight, (box_iou(anchors, each.unsqueeze(2)) * inside).amax(1))
    return weight


@torch.no_grad()
def fine_grained_region(anchors: Tensor, valid: Tensor, boxes: Tensor, box_mask: Tensor) -> Tensor:
    """(N, P) bool: a prior has more than half of the IoU that the best one has with the same box (Wang et al., CVPR
    2019, arXiv 1906.03609).

    Args:
        anchors: (P, 4) xyxy.
        valid: (N, P) bool.
        boxes, box_mask: padded ground truth.
    """
    region = torch.zeros_like(valid)
    for part in box_chunks(boxes.shape, len(anchors)):
        usable = box_mask[:, part, None] & valid[:, None]
        ious = box_iou(anchors, boxes[:, part].unsqueeze(2)) * usable
        region |= (ious > FINE * ious.amax(-1, keepdim=True)).any(1)
    return region


def covered(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Share of each anchor that a box covers, less the squared distance of their centres over that of the corners of
    the smallest box around both. (..., 4) xyxy each, broadcast."""
    start, end = torch.maximum(anchors[..., :2], boxes[..., :2]), torch.minimum(anchors[..., 2:], boxes[..., 2:])
    area = (anchors[..., 2:] - anchors[..., :2]).prod(-1)
    share = (end - start).clamp(min=0).prod(-1) / area.clamp(min=EPS)
    distance = (box_centers(anchors) - box_centers(boxes)).square().sum(-1)
    outer = torch.maximum(anchors[..., 2:], boxes[..., 2:]) - torch.minimum(anchors[..., :2], boxes[..., :2])
    return share - distance / outer.square().sum(-1).clamp(min=EPS)


def per_level(positive: Tensor, level_sizes: list[int]) -> Tensor:
    """How many priors of the batch are positive on the level of each prior, (P,).

    Args:
        positive: (N, P) bool.
        level_sizes: priors a level.
    """
    return torch.cat([level.sum().expand(level.shape[1]) for level in positive.split(level_sizes, dim=1)])
