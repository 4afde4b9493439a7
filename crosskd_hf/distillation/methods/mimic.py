"""Prediction mimicking: the student's *own* predictions mimic the teacher's.

The paper's counter-example (CrossKD, arXiv 2306.11369, section 3.1): ground truth and teacher pull at one output.
"""

from dataclasses import dataclass

from torch import Tensor

from ...utils.recipe_fields import setting
from ..method import KDMethod
from ..observation import Observation, Observer, PairError
from ..prediction_losses import KDTargets, prediction_kd_losses, resolve


@dataclass
class Settings:
    """Weights. null takes the value published for CrossKD and the teacher's detector."""

    weight: float = setting(1.0, "weight of all terms", minimum=0, maximum=1e6)
    cls_weight: float | None = setting(None, "weight of mimic_cls", minimum=0, maximum=1e6)
    box_weight: float | None = setting(None, "weight of mimic_box", minimum=0, maximum=1e6)
    centerness_weight: float | None = setting(None, "weight of mimic_centerness", minimum=0, maximum=1e6)


class Mimic(KDMethod):
    """Terms `mimic_cls`, `mimic_box` and, from ATSS teachers, `mimic_centerness`: CrossKD's without the cross pass."""

    name = "mimic"
    Settings = Settings

    def connect(self, student: Observer, teacher: Observer) -> None:
        """Look at the predictions of both."""
        if reason := student.incomparable(teacher):
            raise PairError(
                f"predictions (mimic): student and teacher have {reason}. CrossKD needs no equal ones: leave mimic "
                "out of distillation.methods"
            )
        self.resolved, self.weights = resolve(self.settings, teacher.model_type)
        student.ask_for_predictions()
        teacher.ask_for_predictions()
        self.same_rule = student.labels_like(teacher)

    def terms(
        self, student: Observation, teacher: Observation, student_observer: Observer, teacher_observer: Observer
    ) -> dict[str, Tensor]:
        """See `KDMethod.terms`; (N, P) each."""
        targets = KDTargets.of(student, teacher, self.same_rule, self.weights.box_normalizer)
        assert student.predictions is not None and teacher.predictions is not None
        terms = prediction_kd_losses(student.predictions, teacher.predictions, targets, self.weights)
        return {f"mimic_{name}": term for name, term in terms.items()}
