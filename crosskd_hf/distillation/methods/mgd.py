"""MGD: masked generative distillation (Yang et al., ECCV 2022, arXiv 2205.01529).

Parts of the student's map are hidden, and a small network, trained along, makes the teacher's whole map of the rest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...utils.recipe_fields import setting
from ..adapters import aligning
from ..method import KDMethod
from ..observation import Observation, Observer, PairError


@dataclass
class Settings:
    """The values published for RetinaNet."""

    weight: float = setting(2e-5, "weight of mgd", minimum=0, maximum=1e6)
    hidden: float = setting(0.65, "share of the positions that are hidden", minimum=0, maximum=1)


class MGD(KDMethod):
    """Term `mgd`: squared difference of the generated and the teacher's map (equation 5), summed over channels and
    positions, a mean over images, summed over levels."""

    name = "mgd"
    Settings = Settings

    def connect(self, student: Observer, teacher: Observer) -> None:
        """Make a generator for each level that both have.

        Raises:
            PairError: they have none of the same stride.
        """
        if not student.strides:
            raise PairError("mgd: student and teacher have no level of the same stride: leave mgd out")
        levels = student.strides
        self.generators = nn.ModuleList(Generator(student.feature_channels, teacher.feature_channels) for _ in levels)

    def terms(
        self, student: Observation, teacher: Observation, student_observer: Observer, teacher_observer: Observer
    ) -> dict[str, Tensor]:
        """See `KDMethod.terms`; (levels,)."""
        losses = []
        for generator, level, goal in zip(self.generators, student.features, teacher.features, strict=True):
            shown = torch.rand_like(level[:, :1], dtype=torch.float32) <= 1 - self.settings.hidden
            losses.append(mgd_loss(generator(level, shown), goal))
        return {"mgd": self.settings.weight * torch.stack(losses)}


class Generator(nn.Module):
    """A 1x1 convolution, if the widths differ, and two of 3x3.

    Args:
        channels, teacher_channels: of the two maps.
    """

    def __init__(self, channels: int, teacher_channels: int):
        super().__init__()
        self.align = aligning(channels, teacher_channels)
        self.conv1 = nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1)

    def forward(self, features: Tensor, shown: Tensor) -> Tensor:
        """(N, C, H, W) and (N, 1, H, W), 0 where a position is hidden -> (N, teacher's C, H, W)."""
        masked = self.align(features) * shown
        return self.conv2(self.conv1(masked).relu())


def mgd_loss(generated: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of maps (N, C, H, W), hidden or not, summed but for a mean over images: a scalar."""
    return (generated.float() - teacher.float()).square().sum() / len(teacher)
