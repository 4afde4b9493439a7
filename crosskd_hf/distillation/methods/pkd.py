"""PKD, arXiv 2207.02039: its settings."""

from dataclasses import dataclass

from ...utils.settings import setting


@dataclass(frozen=True)
class Settings:
    """Settings of PKD."""

    weight: float = setting(1.0, "weight of the feature loss", minimum=0, maximum=1e6)
