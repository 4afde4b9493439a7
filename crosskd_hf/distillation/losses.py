"""Losses between cross-head predictions and the teacher's own, both in the teacher's format (CrossKD, section 3.3)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..models.base import DenseDetector, Predictions, Priors
from ..models.losses import EPS, bin_kl_loss, binary_kd_loss, distance_overlaps
from ..utils.distributed import mean_over_ranks
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


def classification_kd_loss(
    cross: Predictions, teacher: Predictions, targets: KDTargets, weight: float = 1.0, overwrite: bool = False
) -> Tensor:
    """kd_cls: |p - p_teacher| * BCE, over all (shared) classes, a (N, P) tensor (equation 6).

    `overwrite` spoils the cross-head logits, see `binary_kd_loss`.
    """
    loss = binary_kd_loss(cross.logits, teacher.logits, overwrite)
    return loss * (targets.class_weights / (targets.normalizer / weight))


def box_kd_loss(
    detector: DenseDetector,
    cross: Predictions,
    teacher: Predictions,
    targets: KDTargets,
    weight: float = 1.0,
    distances: Tensor | None = None,
    sync: bool = False,
) -> Tensor:
    """kd_box, weighted by the teacher's highest probability of a shared class, a (N, P) tensor.

    Distance distributions are compared by their KL divergence, over the sum of those weights on this rank
    (with `sync`: the mean of the ranks' sums). (The
    reference doesn't bound that sum from below; 1 here, so that a batch without confidence can't blow up.)
    Other detectors compare boxes, by GIoU or -log IoU, over the normaliser; so does GFL, by GIoU, with those of a
    detector that has no such distributions, given as `distances` (N, P, 4) from the priors' centres.
    """
    weights = teacher.logits.amax(dim=-1).sigmoid() * targets.class_weights
    normalizer = targets.normalizer
    kind = detector.distillation.box_loss
    if kind == "bin_kl" and distances is None:
        loss = bin_kl_loss(cross.boxes.unflatten(-1, (4, -1)), teacher.boxes.unflatten(-1, (4, -1))).mean(dim=-1)
        normalizer = (mean_over_ranks(weights.sum()) if sync else weights.sum()).clamp(min=1)
    else:
        mine = detector.distances(cross.boxes, targets.priors) if distances is None else distances
        iou, giou = distance_overlaps(mine, detector.distances(teacher.boxes, targets.priors))
        loss = -iou.clamp(min=EPS).log() if kind == "log_iou" else 1 - giou
    return loss * (weights / (normalizer / weight))


def centerness_kd_loss(cross: Predictions, teacher: Predictions, targets: KDTargets, weight: float = 1.0) -> Tensor:
    """kd_centerness: BCE with the teacher's centerness at the student's positives, a (N, P) tensor."""
    loss = F.binary_cross_entropy_with_logits(cross.centerness, teacher.centerness.sigmoid(), reduction="none")
    return loss * (targets.positive / (targets.class_normalizer / weight))


def prediction_kd_losses(
    teacher: DenseDetector,
    predictions: Predictions,
    own: Predictions,
    targets: KDTargets,
    settings: DistillationSettings,
    scale: float = 1.0,
    distances: Tensor | None = None,
    overwrite: bool = False,
) -> dict[str, Tensor]:
    """All terms by which predictions in the teacher's format mimic the teacher's own.

    Args:
        teacher: whose box loss and format it is.
        predictions: those that learn.
        own: the teacher's.
        targets: mask and normalisers.
        settings: weights of the terms.
        scale: of all of them.
        distances: (N, P, 4) from the priors' centres to the sides of boxes that are not in the teacher's format.
        overwrite: the logits of `predictions` aren't read any more, so that their memory may be used.

    Returns:
        `cls`, `box` and, for a teacher with centerness that is mimicked, `centerness`: (N, P) tensors.
    """
    terms = {
        "cls": classification_kd_loss(predictions, own, targets, scale * settings.cls_weight, overwrite),
        "box": box_kd_loss(teacher, predictions, own, targets, scale * settings.box_weight, distances, settings.sync),
    }
    if teacher.distillation.centerness and targets.positive is not None:
        weight = scale * settings.centerness_weight
        terms["centerness"] = centerness_kd_loss(predictions, own, targets, weight)
    return terms
