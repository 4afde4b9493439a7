"""Losses between cross-head predictions and the teacher's own, both in the teacher's format (CrossKD, section 3.3)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..losses import EPS, bin_kl_loss, binary_kd_loss, box_iou, giou_loss
from ..models.modeling_dense import DenseDetector, Predictions, Priors, level_sums
from .settings import DistillationSettings


@dataclass(frozen=True)
class KDTargets:
    """Where distillation happens and what it is divided by.

    Attributes:
        priors: the teacher's.
        class_weights: (N, P) 1 or 0.
        normalizer: scalar, of kd_cls and kd_box.
        positive: (N, P) the student's positives, of kd_centerness; None where the student labels other priors.
        class_normalizer: scalar, of kd_centerness.
    """

    priors: Priors
    class_weights: Tensor
    normalizer: Tensor
    positive: Tensor | None
    class_normalizer: Tensor


def classification_kd_loss(cross: Predictions, teacher: Predictions, targets: KDTargets) -> Tensor:
    """kd_cls: |p - p_teacher| * BCE, over all (shared) classes, a (levels,) tensor (equation 6)."""
    loss = binary_kd_loss(cross.logits, teacher.logits).sum(dim=-1) * targets.class_weights
    return level_sums(loss, targets.priors.level_sizes) / targets.normalizer


def box_kd_loss(
    detector: DenseDetector,
    cross: Predictions,
    teacher: Predictions,
    targets: KDTargets,
    decoded: Tensor | None = None,
) -> Tensor:
    """kd_box, weighted by the teacher's highest probability of a shared class, a (levels,) tensor.

    Distance distributions are compared by their KL divergence, over the sum of those weights on this rank. (The
    reference doesn't bound that sum from below; 1 here, so that a batch without confidence can't blow up.)
    Other detectors compare decoded boxes, by GIoU or -log IoU, over the normaliser; so does GFL, by GIoU, with boxes
    `decoded` (N, P, 4) of a detector that has no such distributions.
    """
    weights = teacher.logits.sigmoid().amax(dim=-1) * targets.class_weights
    normalizer = targets.normalizer
    kind = detector.distillation.box_loss
    if kind == "bin_kl" and decoded is None:
        loss = bin_kl_loss(cross.boxes.unflatten(-1, (4, -1)), teacher.boxes.unflatten(-1, (4, -1))).mean(dim=-1)
        normalizer = weights.sum().clamp(min=1)
    else:
        boxes = detector.decode(cross.boxes, targets.priors) if decoded is None else decoded
        teacher_boxes = detector.decode(teacher.boxes, targets.priors)
        if kind == "log_iou":
            loss = -box_iou(boxes, teacher_boxes).clamp(min=EPS).log()
        else:
            loss = giou_loss(boxes, teacher_boxes)
    return level_sums(loss * weights, targets.priors.level_sizes) / normalizer


def centerness_kd_loss(cross: Predictions, teacher: Predictions, targets: KDTargets) -> Tensor:
    """kd_centerness: BCE with the teacher's centerness at the student's positives, a (levels,) tensor."""
    loss = F.binary_cross_entropy_with_logits(cross.centerness, teacher.centerness.sigmoid(), reduction="none")
    return level_sums(loss * targets.positive, targets.priors.level_sizes) / targets.class_normalizer


def prediction_kd_losses(
    teacher: DenseDetector,
    predictions: Predictions,
    own: Predictions,
    targets: KDTargets,
    settings: DistillationSettings,
    decoded: Tensor | None = None,
) -> dict[str, Tensor]:
    """All terms by which predictions in the teacher's format mimic the teacher's own.

    Args:
        teacher: whose box loss and format it is.
        predictions: those that learn.
        own: the teacher's.
        targets: mask and normalisers.
        settings: weights of the terms.
        decoded: (N, P, 4) xyxy boxes of predictions that are not in the teacher's box format.

    Returns:
        `cls`, `box` and, for a teacher with centerness that is mimicked, `centerness`: (levels,) tensors.
    """
    terms = {
        "cls": settings.cls_weight * classification_kd_loss(predictions, own, targets),
        "box": settings.box_weight * box_kd_loss(teacher, predictions, own, targets, decoded),
    }
    if teacher.distillation.centerness and targets.positive is not None:
        terms["centerness"] = settings.centerness_weight * centerness_kd_loss(predictions, own, targets)
    return terms
