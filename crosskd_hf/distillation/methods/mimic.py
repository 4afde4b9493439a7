"""The student's own predictions mimic the teacher's: its settings."""

from dataclasses import dataclass

from ...utils.settings import setting


@dataclass(frozen=True)
class Settings:
    """Settings of mimicking. null takes the value published for the teacher's detector."""

    weight: float = setting(1.0, "factor on every term", minimum=0, maximum=1e6)
    cls_weight: float | None = setting(None, "weight of the classes' term", minimum=0, maximum=1e6)
    box_weight: float | None = setting(None, "weight of the boxes' term", minimum=0, maximum=1e6)
    centerness_weight: float | None = setting(None, "weight of the centerness' term", minimum=0, maximum=1e6)
