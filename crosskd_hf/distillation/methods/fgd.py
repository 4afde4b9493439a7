"""FGD: focal and global distillation (Yang et al., CVPR 2022, arXiv 2111.11837).

Features inside and outside of the objects count apart, each weighted by where the teacher looks (focal); and a context
block compares the maps as wholes (global).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...models.families import is_dense
from ...utils.recipe_fields import setting
from ..adapters import aligning
from ..method import KDMethod
from ..observation import Observation, Observer, PairError, Targets


@dataclass
class Settings:
    """Weights. null takes the value published for the teacher's detector."""

    foreground_weight: float | None = setting(None, "weight of fgd_foreground", minimum=0, maximum=1e6)
    background_weight: float | None = setting(None, "weight of fgd_background", minimum=0, maximum=1e6)
    attention_weight: float | None = setting(None, "weight of fgd_attention", minimum=0, maximum=1e6)
    relation_weight: float | None = setting(None, "weight of fgd_relation", minimum=0, maximum=1e6)
    temperature: float | None = setting(None, "of the attention; above 1 it is flatter", minimum=0.01, maximum=1000)


# By the teacher's model type. GFL's and RetinaNet's are the same; nothing is published for others.
PUBLISHED = {"crosskd_fcos": Settings(1.6e-3, 8e-4, 8e-4, 8e-6, 0.8)}
DEFAULT = Settings(1e-3, 5e-4, 5e-4, 5e-6, 0.5)


class FGD(KDMethod):
    """Terms `fgd_foreground`, `fgd_background`, `fgd_attention` and `fgd_relation` (equations 6, 7, 9).

    Each is a sum over channels and positions, a mean over images, and summed over levels.
    """

    name = "fgd"
    Settings = Settings

    def connect(self, student: Observer, teacher: Observer) -> None:
        """Make a 1x1 convolution, if the widths differ, and two context blocks for each level that both have.

        Raises:
            PairError: they have none of the same stride.
        """
        if not is_dense(student.model.config):
            raise PairError(f"fgd: {student.model_type} doesn't show where objects are: take pkd, cwd or mgd instead")
        if not student.strides:
            raise PairError("fgd: student and teacher have no level of the same stride: leave fgd out")
        published = PUBLISHED.get(teacher.model_type, DEFAULT)
        given = {name: value for name, value in vars(self.settings).items() if value is not None}
        self.resolved = replace(published, **given)
        channels = student.feature_channels, teacher.feature_channels
        self.levels = nn.ModuleList(Level(*channels) for _ in student.strides)

    def terms(
        self, student: Observation, teacher: Observation, student_observer: Observer, teacher_observer: Observer
    ) -> dict[str, Tensor]:
        """See `KDMethod.terms`; (levels,) each. Images of an unlabelled batch are all background."""
        settings = self.resolved
        weights = (
            *(settings.foreground_weight, settings.background_weight),
            *(settings.attention_weight, settings.relation_weight),
        )
        rows = []
        for level, features, goal in zip(self.levels, student.features, teacher.features, strict=True):
            foreground = object_mask(student.targets, goal)
            rows.append(level(features, goal.float(), foreground, settings.temperature))
        columns = zip(*rows, strict=True)
        names = ("fgd_foreground", "fgd_background", "fgd_attention", "fgd_relation")
        return {
            name: weight * torch.stack(column) for name, weight, column in zip(names, weights, columns, strict=True)
        }


class Level(nn.Module):
    """What is trained for a level: the adapter, and the context blocks of student and teacher.

    Args:
        channels, teacher_channels: of the two maps.
    """

    def __init__(self, channels: int, teacher_channels: int):
        super().__init__()
        self.align = aligning(channels, teacher_channels)
        self.student_context = ContextBlock(teacher_channels)
        self.teacher_context = ContextBlock(teacher_channels)

    def forward(self, features: Tensor, teacher: Tensor, foreground: Tensor, temperature: float) -> tuple[Tensor, ...]:
        """The four losses, without weights.

        Args:
            features, teacher: (N, C, H, W).
            foreground: (N, H, W), see `object_mask`.
            temperature: of the attention.
        """
        features, images = self.align(features).float(), len(teacher)
        focal = focal_losses(features, teacher, foreground, temperature)
        relation = (self.student_context(features).float() - self.teacher_context(teacher).float()).square().sum()
        return *focal, relation / images


class ContextBlock(nn.Module):
    """Adds to each position what the whole map says (GcNet, arXiv 1904.11492, figure 4d)."""

    def __init__(self, channels: int):
        super().__init__()
        self.mask = nn.Conv2d(channels, 1, 1)
        self.conv1 = nn.Conv2d(channels, channels // 2, 1)
        self.norm = nn.LayerNorm([channels // 2, 1, 1])
        self.conv2 = nn.Conv2d(channels // 2, channels, 1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        attention = self.mask(features).flatten(2).softmax(-1)  # (N, 1, H*W)
        context = (features.flatten(2) * attention).sum(-1)[..., None, None]
        return features + self.conv2(self.norm(self.conv1(context)).relu())


def focal_losses(
    features: Tensor, teacher: Tensor, foreground: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Foreground, background and attention loss, scalars.

    Args:
        features, teacher: (N, C, H, W).
        foreground: (N, H, W), see `object_mask`.
        temperature: of the attention.
    """
    spatial, channel = attention(features, temperature)
    teacher_spatial, teacher_channel = attention(teacher, temperature)
    difference = (features - teacher).square() * teacher_spatial[:, None] * teacher_channel[..., None, None]
    per_position, images = difference.sum(1), len(teacher)
    outside = (foreground == 0).to(foreground)
    outside = outside / outside.sum((1, 2), keepdim=True).clamp(min=1)
    apart = (channel - teacher_channel).abs().sum() + (spatial - teacher_spatial).abs().sum()
    return (per_position * foreground).sum() / images, (per_position * outside).sum() / images, apart / images


def attention(features: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Where a map (N, C, H, W) is active: (N, H, W) positions and (N, C) channels, each 1 on average."""
    size, strength = features.shape, features.abs() / temperature
    spatial = strength.mean(1).flatten(1).softmax(-1).view(size[0], *size[2:]) * (size[2] * size[3])
    channel = strength.mean((2, 3)).softmax(-1) * size[1]
    return spatial, channel


def object_mask(targets: Targets | None, like: Tensor) -> Tensor:
    """1 over the number of an object's cells in each of them, of the smallest where several overlap; 0 elsewhere.

    As published, boxes are scaled by the images' sizes without padding, while the map covers the padded batch.

    Args:
        targets: boxes in pixels; None: there is no object.
        like: (N, C, H, W), the map.

    Returns:
        (N, H, W).
    """
    batch, _, height, width = like.shape
    if targets is None:
        return like.new_zeros(batch, height, width)
    cells = like.new_tensor([height, width]) / targets.image_sizes.to(like)
    boxes = targets.boxes_xyxy.to(like) * cells.flip(1).repeat(1, 2)[:, None]
    start, end = boxes[..., :2].floor(), boxes[..., 2:].ceil()  # (N, G, 2) cells, both ends are part of the box
    value = targets.box_mask / (end - start + 1).prod(-1)
    columns, rows = (torch.arange(n, device=like.device) for n in (width, height))
    in_columns = (columns >= start[..., :1]) & (columns <= end[..., :1])  # (N, G, W)
    in_rows = (rows >= start[..., 1:]) & (rows <= end[..., 1:])
    inside = in_rows[..., :, None] & in_columns[..., None, :]
    return (inside * value[..., None, None]).amax(1)
