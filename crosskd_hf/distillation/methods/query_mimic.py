"""Mimicking between query-based detectors: the student's *own* final predictions mimic the teacher's, slot by slot.

The counter-example of CrossKD (arXiv 2306.11369, section 3.1), as for dense detectors: ground truth and teacher pull
at one output. Slots of two detectors mean the same only as far as both order their queries alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...utils.recipe_fields import setting
from ..method import KDMethod
from ..observation import Observation, Observer, PairError
from ..observers.query import QueryObserver, refuse_other_frames
from ..query_losses import confidence_weights, first, in_fp32, l1_giou_loss, query_cls_loss


@dataclass
class Settings:
    """Weights, as query_crosskd has them."""

    weight: float = setting(1.0, "weight of all terms", minimum=0, maximum=1e6)
    beta: float = setting(1.0, "exponent of |p - p_teacher| in mimic_cls", minimum=0, maximum=10)
    cls_weight: float = setting(1.0, "weight of mimic_cls", minimum=0, maximum=1e6)
    l1_weight: float = setting(5.0, "weight of mimic_box's L1 of relative cxcywh", minimum=0, maximum=1e6)
    giou_weight: float = setting(2.0, "weight of mimic_box's 1 - GIoU", minimum=0, maximum=1e6)


class QueryMimic(KDMethod):
    """Terms `mimic_cls` and `mimic_box`, of the last layers; of the smaller number of queries."""

    name = "query_mimic"
    Settings = Settings

    def connect(self, student: Observer, teacher: Observer) -> None:
        """Refuse other families."""
        if not (isinstance(student, QueryObserver) and isinstance(teacher, QueryObserver)):
            raise PairError("query_mimic is for two query-based detectors; between dense ones it is mimic")
        _ = student.decoder, teacher.decoder  # a detector without one is refused
        refuse_other_frames(self.name, student, teacher)

    def terms(
        self, student: Observation, teacher: Observation, student_observer: Observer, teacher_observer: Observer
    ) -> dict[str, Tensor]:
        """See `KDMethod.terms`; (N, Q)."""
        assert isinstance(student_observer, QueryObserver) and isinstance(teacher_observer, QueryObserver)
        predictions = student_observer.final(student)
        with torch.no_grad():
            target = teacher_observer.final(teacher)
        count = min(predictions.boxes.shape[1], target.boxes.shape[1])
        predictions, target = (in_fp32(first(p, count)) for p in (predictions, target))
        settings = self.resolved
        with torch.autocast(predictions.logits.device.type, enabled=False):
            weights = settings.weight * confidence_weights(target)
            classes = query_cls_loss(predictions.logits, target.logits, settings.beta)
            boxes = l1_giou_loss(predictions.boxes, target.boxes, settings.l1_weight, settings.giou_weight)
            return {"mimic_cls": settings.cls_weight * classes * weights, "mimic_box": boxes * weights}
