"""CrossKD, arXiv 2306.11369, section 3: its settings. null takes the value published for the teacher's detector."""

from dataclasses import dataclass

from ...utils.settings import setting


@dataclass(frozen=True)
class Settings:
    """Settings of CrossKD."""

    weight: float = setting(1.0, "factor on every term", minimum=0, maximum=1e6)
    tap_index: int | None = setting(None, "tower blocks of the teacher that the student's stand in for", minimum=0)
    student_tap_index: int | None = setting(None, "tower blocks the student runs; null: tap_index", minimum=0)
    tap: str = setting("rectified", "tap after (rectified) or before (raw) the block's ReLU", ("rectified", "raw"))
    cls_weight: float | None = setting(None, "weight of kd_cls", minimum=0, maximum=1e6)
    box_weight: float | None = setting(None, "weight of kd_box", minimum=0, maximum=1e6)
    centerness_weight: float | None = setting(None, "weight of kd_centerness", minimum=0, maximum=1e6)
