"""BCKD: bridging cross-task protocol inconsistency (Yang et al., ICCV 2023, arXiv 2308.14286).

Detectors score classes by sigmoids, so that classes are distilled by sigmoids, too, and boxes by their overlap.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.losses import binary_kd_loss
from ...utils.recipe_fields import setting
from ..method import KDMethod
from ..observation import Observation, Observer, PairError, Predictions
from ..prediction_losses import overlaps
from ..regions import per_level

EPSILON = 2**-23  # added to the normaliser


@dataclass
class Settings:
    """The values published for GFL."""

    cls_weight: float = setting(1.0, "weight of bckd_cls", minimum=0, maximum=1e6)
    box_weight: float = setting(4.0, "weight of bckd_box", minimum=0, maximum=1e6)


class BCKD(KDMethod):
    """Terms `bckd_cls` (equation 5) and `bckd_box` (equation 7; the code that is published compares by GIoU), over the
    number of positives. Levels on which no prior of the batch is positive contribute nothing."""

    name = "bckd"
    Settings = Settings

    def connect(self, student: Observer, teacher: Observer) -> None:
        """Look at the predictions of both.

        Raises:
            PairError: they can't be compared one by one.
        """
        if reason := student.incomparable(teacher):
            raise PairError(f"bckd: student and teacher have {reason}: leave bckd out")
        if student.levels is not None:  # what the student learnt from the labels is of all of its levels
            raise PairError("bckd: student and teacher have different strides: leave bckd out")
        student.ask_for_predictions()
        teacher.ask_for_predictions()

    def terms(
        self, student: Observation, teacher: Observation, student_observer: Observer, teacher_observer: Observer
    ) -> dict[str, Tensor]:
        """See `KDMethod.terms`; (N, P) each, and nothing in an unlabelled batch."""
        assert student.predictions is not None and teacher.predictions is not None
        if student.targets is None:
            zero = student.predictions.logits.sum() * 0
            return {"bckd_cls": zero, "bckd_box": zero}
        targets, context = student.targets, student.context
        mask = targets.mask * (per_level(targets.positive, context.priors.level_sizes) > 0)
        cls, box = bckd_losses(student.predictions, teacher.predictions, mask, targets.class_normalizer)
        return {"bckd_cls": self.settings.cls_weight * cls, "bckd_box": self.settings.box_weight * box}


def bckd_losses(
    predictions: Predictions, teacher: Predictions, mask: Tensor, normalizer: Tensor
) -> tuple[Tensor, Tensor]:
    """Class and box loss, (N, P) each.

    |p - p_teacher| * BCE, summed over classes; and 1 - GIoU, weighted by the largest |p - p_teacher| of a prior's
    classes, without gradient.

    Args:
        predictions, teacher: of the same priors.
        mask: (N, P), weight of each prior.
        normalizer: scalar, the number of positives.
    """
    weight = mask / (normalizer + EPSILON)
    with torch.no_grad():
        apart = (predictions.logits.sigmoid() - teacher.logits.sigmoid()).abs().amax(-1)
    _, giou = overlaps(predictions, teacher)
    return binary_kd_loss(predictions.logits, teacher.logits) * weight, (1 - giou) * (apart * weight)
