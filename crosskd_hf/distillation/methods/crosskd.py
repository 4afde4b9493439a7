"""CrossKD: cross-head knowledge distillation (arXiv 2306.11369).

The student's half-processed head state, given the teacher's statistics, runs through the rest of the *teacher's*
head. The predictions that come out mimic the teacher's own. Everything is in the teacher's terms - its head, its
priors, its box format - so that no line depends on the student's detector.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from ...utils.recipe_fields import setting
from ..adapters import Adapters
from ..method import KDMethod
from ..observation import Observation, Observer, PairError
from ..prediction_losses import KDTargets, prediction_kd_losses, resolve


@dataclass
class Settings:
    """Weights and taps. null takes the value published for the teacher's detector."""

    weight: float = setting(1.0, "weight of all terms", minimum=0, maximum=1e6)
    tap_index: int | None = setting(None, "tower blocks of the teacher that the student's stand in for", minimum=0)
    student_tap_index: int | None = setting(None, "tower blocks the student runs; null: tap_index", minimum=0)
    # The published code means to tap before the ReLU, but its in-place ReLU overwrites the tap: its results are those
    # of the rectified one, which is therefore the default.
    tap: str = setting("rectified", "tap after (rectified) or before (raw) the block's ReLU", ("rectified", "raw"))
    cls_weight: float | None = setting(None, "weight of kd_cls", minimum=0, maximum=1e6)
    box_weight: float | None = setting(None, "weight of kd_box", minimum=0, maximum=1e6)
    centerness_weight: float | None = setting(None, "weight of kd_centerness", minimum=0, maximum=1e6)


class CrossKD(KDMethod):
    """Terms `kd_cls`, `kd_box` and, from ATSS teachers, `kd_centerness`."""

    name = "crosskd"
    Settings = Settings

    def connect(self, student: Observer, teacher: Observer) -> None:
        """Tap both heads; adapt the student's taps where the widths differ."""
        settings, self.weights = resolve(self.settings, teacher.model_type)
        tap = settings.tap_index
        student_tap = tap if settings.student_tap_index is None else settings.student_tap_index
        self.resolved = replace(settings, student_tap_index=student_tap)
        for name, observer, index in (("tap_index", teacher, tap), ("student_tap_index", student, student_tap)):
            try:
                observer.ask_for_taps(index, settings.tap == "raw")
            except PairError as error:
                raise PairError(f"crosskd.{name}: {error}") from None
        teacher.ask_for_predictions()
        self.adapters = Adapters(student.tap_channels(), teacher.tap_channels())
        self.same_rule = student.labels_like(teacher)

    def terms(
        self, student: Observation, teacher: Observation, student_observer: Observer, teacher_observer: Observer
    ) -> dict[str, Tensor]:
        """See `KDMethod.terms`; (N, P) each."""
        assert student.taps is not None and teacher.taps is not None and teacher.predictions is not None
        taps = student.taps.adapted(self.adapters.adapt).aligned_to(teacher.taps)
        cross = teacher_observer.finish(taps, teacher)
        targets = KDTargets.of(student, teacher, self.same_rule, self.weights.box_normalizer)
        terms = prediction_kd_losses(cross, teacher.predictions, targets, self.weights)
        return {f"kd_{name}": term for name, term in terms.items()}
