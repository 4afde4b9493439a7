"""Losses between two sets of predictions of the same queries."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou_loss

from .observers.decoders.decoder import LayerPredictions


def query_cls_loss(logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """|p - p_teacher|^beta * BCE(p, p_teacher), summed over classes: (N, Q, classes) -> (N, Q).

    With beta 0 it is the binary cross entropy, whose lowest value isn't 0.
    """
    target = teacher_logits.sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if beta:
        loss = loss * (logits.sigmoid() - target).abs().pow(beta)
    return loss.sum(-1)


def query_box_loss(boxes: Tensor, teacher_boxes: Tensor, l1: float, giou: float) -> Tensor:
    """L1 distance of cxcywh and 1 - GIoU, each with its weight: (N, Q, 4) relative -> (N, Q)."""
    corners, teacher_corners = (box_convert(b, "cxcywh", "xyxy") for b in (boxes, teacher_boxes))
    return l1 * (boxes - teacher_boxes).abs().sum(-1) + giou * generalized_box_iou_loss(corners, teacher_corners, eps=1e-7)


def confidence(teacher: LayerPredictions) -> Tensor:
    """(N, Q) the teacher's highest probability of a class, without gradient."""
    return teacher.logits.detach().amax(-1).sigmoid()


def stacked(predictions: list[LayerPredictions]) -> LayerPredictions:
    """Of several layers, (layers, N, Q, ...)."""
    return LayerPredictions(*(torch.stack([getattr(p, name) for p in predictions]) for name in ("logits", "boxes")))
