"""Losses between two sets of predictions of the same queries."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert

from ..utils.distributed import mean_over_ranks
from .observers.decoders.decoder import LayerPredictions

TINY = 1e-12  # of an area: far below a pixel's share of any image


def query_cls_loss(logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """|p - p_teacher|^beta * BCE(p, p_teacher), summed over classes: (N, Q, classes) -> (N, Q).

    With beta 0 it is the binary cross entropy, whose lowest value isn't 0.
    """
    target = teacher_logits.sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if beta:
        loss = loss * (logits.sigmoid() - target).abs().pow(beta)
    return loss.sum(-1)


def l1_giou_loss(boxes: Tensor, teacher_boxes: Tensor, l1: float, giou: float) -> Tensor:
    """L1 distance of cxcywh and 1 - GIoU, each with its weight: (..., 4) relative -> (...); 0 for equal boxes."""
    return l1 * (boxes - teacher_boxes).abs().sum(-1) + giou * (1 - paired_giou(boxes, teacher_boxes))


def pixel_l1_loss(boxes: Tensor, teacher_boxes: Tensor, sizes: Tensor) -> Tensor:
    """L1 distance of xyxy in pixels: (..., N, Q, 4) relative cxcywh -> (..., N, Q).

    Args:
        boxes, teacher_boxes: of N images.
        sizes: (N, 2) height and width of each in pixels.
    """
    scale = sizes.flip(1).repeat(1, 2)[:, None]
    corners, teacher_corners = (box_convert(b, "cxcywh", "xyxy") * scale for b in (boxes, teacher_boxes))
    return (corners - teacher_corners).abs().sum(-1)


def paired_giou(boxes: Tensor, others: Tensor) -> Tensor:
    """Generalised IoU (arXiv 1902.09630) of boxes pair by pair: (..., 4) cxcywh -> (...); exactly 1 for equal boxes.

    Not torchvision's loss, whose `eps` is added to areas: boxes of a few pixels are that small in relative units.
    """
    (low, high), (other_low, other_high) = (
        (b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2) for b in (boxes, others)
    )
    area, other_area = (upper - lower for upper, lower in ((high, low), (other_high, other_low)))
    shared = (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0).prod(-1)
    union = area.prod(-1) + other_area.prod(-1) - shared
    hull = (torch.maximum(high, other_high) - torch.minimum(low, other_low)).prod(-1)
    return shared / union.clamp(min=TINY) - (hull - union) / hull.clamp(min=TINY)


def confidence_weights(teacher: LayerPredictions) -> Tensor:
    """The teacher's highest probability of a class, over the sum of them all: (..., N, Q), without gradient.

    The sum is that of each layer, at least 1, averaged over processes.
    """
    sure = teacher.logits.detach().amax(-1).sigmoid()
    return sure / mean_over_ranks(sure.sum((-2, -1), keepdim=True)).clamp(min=1)


def first(predictions: LayerPredictions, count: int) -> LayerPredictions:
    """Of the first queries."""
    return LayerPredictions(predictions.logits[:, :count], predictions.boxes[:, :count])


def in_fp32(predictions: LayerPredictions) -> LayerPredictions:
    """A pixel of a large box is more than half precision resolves."""
    return LayerPredictions(predictions.logits.float(), predictions.boxes.float())


def stacked(predictions: list[LayerPredictions]) -> LayerPredictions:
    """Of several layers, (layers, N, Q, ...)."""
    return LayerPredictions(*(torch.stack([getattr(p, name) for p in predictions]) for name in ("logits", "boxes")))
