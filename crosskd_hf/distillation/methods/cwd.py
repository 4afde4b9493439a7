"""CWD: channel-wise distillation (Shu et al., ICCV 2021, arXiv 2011.13256).

Each channel of a map becomes a distribution over positions, and the student's learns the teacher's: where a channel is
active counts, not how strongly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...utils.recipe_fields import setting
from ..adapters import Adapters
from ..method import KDMethod
from ..observation import Observation, Observer, PairError

# By the teacher's model type, as published for 1x schedules: what is compared, and its weight.
PUBLISHED = {"crosskd_gfl": ("logits", 5.0), "crosskd_retinanet": ("features", 10.0)}
DEFAULT = ("features", 10.0)


@dataclass
class Settings:
    """What is compared. null takes the value published for the teacher's detector."""

    maps: str | None = setting(None, "of class logits, or the neck's features", ("logits", "features"))
    weight: float | None = setting(None, "weight of cwd", minimum=0, maximum=1e6)
    temperature: float = setting(1.0, "above 1 the distributions are flatter", minimum=0.01, maximum=1000)


class CWD(KDMethod):
    """Term `cwd`: KL divergence of the channels' distributions over positions (equation 4), a mean over channels,
    summed over levels."""

    name = "cwd"
    Settings = Settings

    def connect(self, student: Observer, teacher: Observer) -> None:
        """Look at class logits, or adapt the student's features where the widths differ.

        Raises:
            PairError: no level of the same stride, or class logits that can't be compared one by one.
        """
        if not student.strides:
            raise PairError("cwd: student and teacher have no level of the same stride: leave cwd out")
        kind, weight = PUBLISHED.get(teacher.model_type, DEFAULT)
        given = self.settings
        kind = given.maps or kind
        self.resolved = Settings(kind, weight if given.weight is None else given.weight, given.temperature)
        if kind == "logits":
            if reason := student.incomparable(teacher):
                raise PairError(f"cwd: student and teacher have {reason}: set distillation.cwd.maps=features")
            student.ask_for_predictions()
            teacher.ask_for_predictions()
        channels = {} if kind == "logits" else {"fpn": student.feature_channels}
        self.adapters = Adapters(channels, {"fpn": teacher.feature_channels})

    def terms(
        self, student: Observation, teacher: Observation, student_observer: Observer, teacher_observer: Observer
    ) -> dict[str, Tensor]:
        """See `KDMethod.terms`; (levels,)."""
        settings = self.resolved
        if settings.maps == "logits":
            maps, goals = logit_maps(student), logit_maps(teacher)
        else:
            maps, goals = self.adapters.adapt("fpn", student.features), teacher.features
        return {"cwd": settings.weight * cwd_loss(maps, goals, settings.temperature)}


def cwd_loss(maps: list[Tensor], teacher_maps: list[Tensor], temperature: float = 1.0) -> Tensor:
    """T^2 times the KL divergence of each channel's distribution over positions, a mean over images and channels.

    Args:
        maps, teacher_maps: (N, C, H, W) per level, of the same shapes.
        temperature: T, which maps are divided by before the softmax.

    Returns:
        (levels,).
    """
    losses = []
    for level, goal in zip(maps, teacher_maps, strict=True):
        log_p, log_goal = (m.flatten(2).float().div(temperature).log_softmax(-1) for m in (level, goal))
        losses.append((log_goal.exp() * (log_goal - log_p)).sum(-1).mean() * temperature**2)
    return torch.stack(losses)


def logit_maps(observation: Observation) -> list[Tensor]:
    """Class logits of the shared classes as maps (N, anchors x classes, H, W) per level."""
    assert observation.predictions is not None
    logits, sizes = observation.predictions.logits, [level.shape[2:] for level in observation.features]
    cells = [height * width for height, width in sizes]
    anchors = logits.shape[1] // sum(cells)
    levels = logits.split([anchors * count for count in cells], dim=1)
    return [
        level.unflatten(1, (height, width, anchors)).flatten(3).permute(0, 3, 1, 2)
        for level, (height, width) in zip(levels, sizes, strict=True)
    ]
