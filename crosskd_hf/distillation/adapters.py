"""1x1 convolutions that give a student's maps the teacher's width: trained, but in no saved model."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn


class Adapters(nn.ModuleDict):
    """A convolution per place whose widths differ.

    Without bias: what follows standardises every channel.

    Args:
        student, teacher: place -> channels of each.
    """

    def __init__(self, student: Mapping[str, int], teacher: Mapping[str, int]):
        super().__init__()
        for place, channels in student.items():
            if channels != teacher[place]:
                self[place] = nn.Conv2d(channels, teacher[place], 1, bias=False)
                nn.init.kaiming_normal_(self[place].weight, nonlinearity="linear")

    if TYPE_CHECKING:

        def __getitem__(self, place: str) -> nn.Conv2d: ...

    def adapt(self, place: str, maps: list[Tensor]) -> list[Tensor]:
        """Maps (N, C, H, W) per level, with the student's C channels -> the teacher's; as they are if widths agree."""
        if place not in self:
            return maps
        weight = self[place].weight
        return [nn.functional.conv2d(level, weight.to(level.dtype)) for level in maps]


def aligning(channels: int, teacher_channels: int) -> nn.Module:
    """A 1x1 convolution with bias between two widths, for methods whose loss sees means; nothing if they agree."""
    return nn.Identity() if channels == teacher_channels else nn.Conv2d(channels, teacher_channels, 1)
