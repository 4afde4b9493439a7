"""Losses between two sets of predictions of the same priors (CrossKD, arXiv 2306.11369, section 3.3)."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.losses import EPS, bin_kl_loss, binary_kd_loss, distance_overlaps
from .observation import Observation, Predictions


@dataclass(frozen=True)
class Published:
    """Settings published for teachers of one model type.

    Attributes:
        tap_index: tower blocks that the student runs before the teacher's head takes over.
        cls_weight, box_weight, centerness_weight: of kd_cls, kd_box, kd_centerness.
        log_iou: boxes are compared by -log IoU instead of 1 - GIoU. Distributions of distances, where both models
            have them, are compared by their KL divergence.
        box_normalizer: kd_cls and kd_box are divided by the student's box normaliser, if it is of the same kind.
    """

    tap_index: int = 3
    cls_weight: float = 1.0
    box_weight: float = 1.0
    centerness_weight: float = 0.0
    log_iou: bool = False
    box_normalizer: bool = False


PUBLISHED = {
    "crosskd_gfl": Published(box_weight=4.0),
    "crosskd_retinanet": Published(),
    "crosskd_fcos": Published(tap_index=2, cls_weight=0.4, box_weight=0.75, log_iou=True, box_normalizer=True),
    "crosskd_atss": Published(centerness_weight=1.0),
}


def resolve(settings: Any, model_type: str) -> tuple[Any, Published]:
    """What is in effect of a method's settings, and the weights of its terms.

    Args:
        settings: a dataclass with `weight`, `cls_weight`, `box_weight`, `centerness_weight`, and maybe `tap_index`.
        model_type: the teacher's.

    Returns:
        the settings with the published value for each field of `Published` that is None; the published values with
        the settings' instead, the weights times `weight`.
    """
    published = PUBLISHED.get(model_type, Published())
    names = [field.name for field in fields(Published) if hasattr(settings, field.name)]
    unset = {name: getattr(published, name) for name in names if getattr(settings, name) is None}
    settings = replace(settings, **unset)
    values = {name: getattr(settings, name) * (settings.weight if name.endswith("_weight") else 1) for name in names}
    return settings, replace(published, **values)


@dataclass(frozen=True)
class KDTargets:
    """Where predictions are compared and what the losses are divided by.

    Attributes:
        mask: (N, P) 1 or 0.
        normalizer: scalar, of kd_cls and kd_box.
        positive: (N, P) the student's positives, of kd_centerness; None where it labels others or none.
        class_normalizer: scalar, of kd_centerness.
    """

    mask: Tensor
    normalizer: Tensor
    positive: Tensor | None
    class_normalizer: Tensor

    @classmethod
    def of(cls, student: Observation, teacher: Observation, same_rule: bool, box_normalizer: bool) -> "KDTargets":
        """A student that labels the same priors by the same rule as the teacher lends its mask (which also leaves out
        RetinaNet's ignored band), its positives and the teacher's kind of normaliser. Any other student only lends its
        class normaliser, and the mask is the validity of the teacher's priors. A student without targets (of an
        unlabelled batch) lends nothing: the normaliser is the sum of the teacher's highest probabilities, which stands
        for the number of positives.

        Normalisers are at least 1: a deliberate difference. Without a positive, the reference's FCOS loss explodes.
        """
        if student.targets is None:
            assert teacher.predictions is not None
            mask = teacher.predictions.mask
            sure = (teacher.predictions.logits.amax(dim=-1).sigmoid() * mask).sum().clamp(min=1)
            return cls(mask, sure, None, sure)
        targets = student.targets
        class_normalizer = targets.class_normalizer.clamp(min=1)
        if not same_rule:
            assert teacher.predictions is not None  # see `KDMethod.connect`
            return cls(teacher.predictions.mask, class_normalizer, None, class_normalizer)
        normalizer = targets.box_normalizer.clamp(min=1) if box_normalizer else class_normalizer
        return cls(targets.mask, normalizer, targets.positive, class_normalizer)


def prediction_kd_losses(
    predictions: Predictions, teacher: Predictions, targets: KDTargets, weights: Published
) -> dict[str, Tensor]:
    """All terms by which predictions mimic the teacher's.

    Args:
        predictions: those that learn.
        teacher: those that are learnt.
        targets: mask and normalisers.
        weights: of the terms, and how boxes are compared.

    Returns:
        `cls`, `box` and, where it has a weight, the teacher predicts it and the student has the same positives,
        `centerness`: (N, P) tensors.
    """
    with torch.autocast(predictions.logits.device.type, enabled=False):
        terms = {
            "cls": classification_kd_loss(predictions, teacher, targets, weights.cls_weight),
            "box": box_kd_loss(predictions, teacher, targets, weights.box_weight, weights.log_iou),
        }
        if weights.centerness_weight and targets.positive is not None and teacher.quality is not None:
            terms["centerness"] = centerness_kd_loss(predictions, teacher, targets, weights.centerness_weight)
    return terms


def classification_kd_loss(
    predictions: Predictions, teacher: Predictions, targets: KDTargets, weight: float = 1.0
) -> Tensor:
    """|p - p_teacher| * BCE, summed over classes, (N, P) (equation 6)."""
    return binary_kd_loss(predictions.logits, teacher.logits) * (targets.mask / (targets.normalizer / weight))


def box_kd_loss(
    predictions: Predictions, teacher: Predictions, targets: KDTargets, weight: float = 1.0, log_iou: bool = False
) -> Tensor:
    """Distance of boxes, weighted by the teacher's highest probability of a class, (N, P).

    Distributions are compared by their KL divergence, over the sum of those weights on this rank. (The reference
    doesn't bound that sum from below; 1 here, so that a batch without confidence can't blow up.) Other boxes are
    compared by GIoU, or by -log IoU, over the normaliser.
    """
    confidence = teacher.logits.amax(dim=-1).sigmoid() * targets.mask
    bins, teacher_bins = predictions.bins, teacher.bins
    if bins is not None and teacher_bins is not None and bins.shape == teacher_bins.shape:
        loss = bin_kl_loss(bins, teacher_bins).mean(dim=-1)
        return loss * (confidence / (confidence.sum().clamp(min=1) / weight))
    iou, giou = overlaps(predictions, teacher)
    loss = -iou.clamp(min=EPS).log() if log_iou else 1 - giou
    return loss * (confidence / (targets.normalizer / weight))


def overlaps(predictions: Predictions, teacher: Predictions) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU, (N, P) each. Gradients go to `predictions` only.

    From distances to the teacher's points: coordinates of large boxes would round small ones away.
    """
    (points, distances), (teacher_points, teacher_distances) = predictions.sides(), teacher.sides()
    if points is not teacher_points:
        shift = points - teacher_points
        distances = distances + torch.cat([-shift, shift], dim=-1)
    return distance_overlaps(distances, teacher_distances)


def centerness_kd_loss(
    predictions: Predictions, teacher: Predictions, targets: KDTargets, weight: float = 1.0
) -> Tensor:
    """BCE with the teacher's centerness at the student's positives, (N, P)."""
    quality, teacher_quality, positive = predictions.quality, teacher.quality, targets.positive
    assert quality is not None and teacher_quality is not None and positive is not None
    loss = F.binary_cross_entropy_with_logits(quality, teacher_quality.sigmoid(), reduction="none")
    return loss * (positive / (targets.class_normalizer / weight))
