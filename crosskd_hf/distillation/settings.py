"""Settings of a distillation, with the published defaults."""

from dataclasses import dataclass

from ..models.base import DenseDetector
from ..utils.settings import setting


@dataclass
class DistillationSection:
    """Which distillation terms there are. null takes the value published for the teacher's detector.

    Source: CrossKD, arXiv 2306.11369, section 3 and its training settings; PKD, arXiv 2207.02039.
    """

    crosskd: float = setting(1.0, "weight of all CrossKD terms; 0: off", minimum=0, maximum=1e6)
    tap_index: int | None = setting(None, "tower blocks of the teacher that the student's stand in for", minimum=0)
    tap: str = setting("rectified", "tap after (rectified) or before (raw) the block's ReLU", ("rectified", "raw"))
    cls_weight: float | None = setting(None, "weight of kd_cls", minimum=0, maximum=1e6)
    box_weight: float | None = setting(None, "weight of kd_box", minimum=0, maximum=1e6)
    centerness_weight: float | None = setting(None, "weight of kd_centerness", minimum=0, maximum=1e6)
    pkd: float = setting(0.0, "weight of the PKD feature loss; 0: off", minimum=0, maximum=1e6)
    mimic: float = setting(0.0, "weight of mimicking by the student's own predictions; 0: off", minimum=0, maximum=1e6)
    student_tap_index: int | None = setting(None, "tower blocks the student runs; null: tap_index", minimum=0)


@dataclass(frozen=True)
class DistillationSettings:
    """Weights and tap with every default filled in from the teacher's published values.

    Attributes:
        crosskd: factor on every CrossKD term; 0 turns the cross pass off.
        tap_index: tower blocks of the teacher that the student's take the place of; it goes on from there.
        student_tap_index: tower blocks the student runs.
        raw_taps: tap before the ReLU.
        cls_weight, box_weight, centerness_weight: weights of the terms.
        pkd: weight of the feature loss; 0 turns it off.
        mimic: factor on the terms that the student's own predictions mimic the teacher's with; 0 turns them off.
        sync: statistics and normalisers are those of all processes, where they are a process' own as published.
    """

    crosskd: float
    tap_index: int
    student_tap_index: int
    raw_taps: bool
    cls_weight: float
    box_weight: float
    centerness_weight: float
    pkd: float
    mimic: float = 0.0
    sync: bool = False


def resolve_settings(section: DistillationSection, teacher: DenseDetector, sync: bool = False) -> DistillationSettings:
    """Fill what the recipe leaves open with the values published for the teacher's detector."""
    published = teacher.distillation

    def given(value, default):
        return default if value is None else value

    tap_index = given(section.tap_index, published.tap_index)
    return DistillationSettings(
        crosskd=section.crosskd,
        tap_index=tap_index,
        student_tap_index=given(section.student_tap_index, tap_index),
        # The published code means to tap before the ReLU, but its in-place ReLU overwrites the tap: its results are
        # those of the rectified one, which is therefore the default.
        raw_taps=section.tap == "raw",
        cls_weight=given(section.cls_weight, published.cls_weight),
        box_weight=given(section.box_weight, published.box_weight),
        centerness_weight=given(section.centerness_weight, published.centerness_weight),
        pkd=section.pkd,
        mimic=section.mimic,
        sync=sync,
    )
