"""The one head of every detector: a class tower and a box tower, shared by all levels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration import DenseDetectorConfig

# Of FCOS's distances: 5e8 pixels. Beyond 44 two of them overflow as an area, and the losses of all priors, also those
# that learn no box, become NaN. A deviation from the reference, whose exponent has no bound; no image comes near it.
MAX_EXPONENT = 20.0


@dataclass(frozen=True)
class HeadSpec:
    """What a detector's head is made of.

    Attributes:
        num_labels: classes; there is no background channel.
        in_channels, channels: channels of the FPN levels and of the towers.
        num_blocks: blocks (convolution, norm, ReLU) a tower.
        num_levels: FPN levels.
        num_anchors: priors per cell.
        box_channels: numbers of a prior's box output.
        group_norm: GroupNorm(32) after a bias-free convolution; otherwise a convolution with bias and no norm.
        scale_boxes: a learned factor per level on the box output.
        exp_boxes: exponential of the (scaled) box output (FCOS).
        centerness_from: the tower centerness comes from, "cls" or "reg", or None.
    """

    num_labels: int
    in_channels: int
    channels: int
    num_blocks: int
    num_levels: int
    num_anchors: int = 1
    box_channels: int = 4
    group_norm: bool = True
    scale_boxes: bool = True
    exp_boxes: bool = False
    centerness_from: str | None = None

    @classmethod
    def of(cls, config: DenseDetectorConfig, **shape: Any) -> "HeadSpec":
        """The spec of a configuration's sizes and a detector's shape: the fields that have a default."""
        return cls(
            num_labels=len(config.id2label),
            in_channels=config.fpn_channels,
            channels=config.head_channels,
            num_blocks=config.head_blocks,
            num_levels=len(config.strides),
            **shape,
        )


@dataclass
class HeadOutput:
    """Predictions of a head, one tensor a level, as the convolutions give them.

    Attributes:
        logits: (N, anchors * labels, H, W).
        boxes: (N, anchors * box_channels, H, W), scaled and exponentiated where the detector says so.
        centerness: (N, anchors, H, W) logits, or None.
        cls_taps, reg_taps: (N, channels, H, W) output of the tower block that was asked for, or None.
    """

    logits: list[Tensor]
    boxes: list[Tensor]
    centerness: list[Tensor] | None = None
    cls_taps: list[Tensor] | None = None
    reg_taps: list[Tensor] | None = None


class HeadConv(nn.Conv2d):
    """A convolution of the head, told apart for its initialisation."""


class ClassPredictor(HeadConv):
    """The convolution of the class logits."""


def num_groups(channels: int) -> int:
    """32 groups, or as many as small towers allow: a group of one channel has nothing to normalise on a 1x1 map."""
    groups = math.gcd(channels, 32)
    return groups if channels >= 2 * groups else max(1, groups // 2)


class GroupNorm(nn.GroupNorm):
    """torch's GroupNorm, which keeps half precision: its output has the input's type, its statistics are in fp32.

    Under CUDA's autocast torch's own gives fp32, and keeps its input in fp32 for the backward pass. On a CPU it is as
    here.
    """

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) normalised."""
        if features.device.type == "cpu" or features.dtype == self.weight.dtype:
            return super().forward(features)
        return HalfPrecisionGroupNorm.apply(features, self.weight, self.bias, self.num_groups, self.eps)


class HalfPrecisionGroupNorm(torch.autograd.Function):
    """GroupNorm of half precision maps with fp32 weights: computed in fp32, of which only statistics are kept.

    By hand until a GPU has shown what it saves: `benchmarks/gpu.py` measures a step's memory.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        shape = (features.shape[0], features.shape[1], features.shape[2] * features.shape[3], groups)
        # A GPU's kernels know no other layout: they refuse features, and misread gradients, with channels last.
        output, mean, factor = torch.native_group_norm(features.float().contiguous(), weight, bias, *shape, eps)
        ctx.shape = shape
        ctx.save_for_backward(features, weight, mean, factor)
        return output.to(features.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, mean, factor = ctx.saved_tensors
        maps = (tensor.float().contiguous() for tensor in (gradient, features))
        of_features, of_weight, of_bias = torch.ops.aten.native_group_norm_backward(
            *maps, mean, factor, weight, *ctx.shape, list(ctx.needs_input_grad[:3])
        )
        return None if of_features is None else of_features.to(features.dtype), of_weight, of_bias, None, None


class TowerBlock(GradientCheckpointingLayer):
    """3x3 convolution, GroupNorm or nothing, ReLU. The unit of activation checkpointing in the head."""

    def __init__(self, in_channels: int, channels: int, group_norm: bool):
        super().__init__()
        self.conv = HeadConv(in_channels, channels, 3, padding=1, bias=not group_norm)
        self.norm = GroupNorm(num_groups(channels), channels) if group_norm else nn.Identity()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) -> the same before and after the ReLU."""
        raw = self.norm(self.conv(features))
        return raw, F.relu(raw)


class LevelScales(nn.Module):
    """A learned factor per level, applied by a `forward`: accelerate's hooks bring offloaded factors back there."""

    def __init__(self, num_levels: int):
        super().__init__()
        for level in range(num_levels):
            self.register_parameter(str(level), nn.Parameter(torch.ones(())))

    def forward(self, maps: Tensor, level: int) -> Tensor:
        """(N, C, H, W) of a level, scaled."""
        return maps * getattr(self, str(level))


class DenseHead(nn.Module):
    """Two towers and their prediction convolutions.

    CrossKD (arXiv 2306.11369, section 3.2) is a call of the teacher's head with the student's aligned taps and
    `start_block=k`.
    """

    def __init__(self, spec: HeadSpec):
        super().__init__()
        self.spec = spec
        self.cls_tower = self._tower()
        self.reg_tower = self._tower()
        self.cls_predictor = ClassPredictor(spec.channels, spec.num_anchors * spec.num_labels, 3, padding=1)
        self.box_predictor = HeadConv(spec.channels, spec.num_anchors * spec.box_channels, 3, padding=1)
        if spec.centerness_from:
            self.centerness_predictor = HeadConv(spec.channels, spec.num_anchors, 3, padding=1)
        if spec.scale_boxes:
            self.scales = LevelScales(spec.num_levels)

    def _tower(self) -> nn.ModuleList:
        spec = self.spec
        return nn.ModuleList(
            TowerBlock(spec.in_channels if i == 0 else spec.channels, spec.channels, spec.group_norm)
            for i in range(spec.num_blocks)
        )

    def forward(
        self,
        cls_features: list[Tensor],
        reg_features: list[Tensor] | None = None,
        start_block: int = 0,
        tap_index: int | None = None,
        raw_taps: bool = False,
        levels: Sequence[int] | None = None,
    ) -> HeadOutput:
        """Run both towers from block `start_block` on, then predict.

        Args:
            cls_features: a (N, C, H, W) map per level, input of the class tower's block `start_block`.
            reg_features: the same for the box tower; the class tower's input if None.
            start_block: first block to run; `num_blocks` runs the prediction convolutions only.
            tap_index: number k of blocks after which the towers are tapped, counted from the FPN level: 0 taps the
                input itself, k the output of block k. None taps nothing.
            raw_taps: tap before block k's ReLU.
            levels: which of the head's levels the maps are; None: all of them.

        Raises:
            ValueError: if `start_block` or `tap_index` is no number of blocks of this head.
        """
        spec = self.spec
        for name, index in (("start_block", start_block), ("tap_index", tap_index)):
            if index is not None and not 0 <= index <= spec.num_blocks:
                raise ValueError(f"{name} is {index}, but the head has {spec.num_blocks} blocks per tower.")
        if tap_index is not None and tap_index < start_block:
            raise ValueError(f"tap_index {tap_index} lies before start_block {start_block}.")
        output = HeadOutput([], [], [] if spec.centerness_from else None)
        if tap_index is not None:
            output.cls_taps, output.reg_taps = [], []
        reg_features = cls_features if reg_features is None else reg_features
        levels = range(len(cls_features)) if levels is None else levels
        for level, cls_feature, reg_feature in zip(levels, cls_features, reg_features, strict=True):
            cls_feature, cls_tap = _run_tower(self.cls_tower, cls_feature, start_block, tap_index, raw_taps)
            reg_feature, reg_tap = _run_tower(self.reg_tower, reg_feature, start_block, tap_index, raw_taps)
            boxes = self.box_predictor(reg_feature)
            if spec.scale_boxes:
                boxes = self.scales(boxes, level)
            output.logits.append(self.cls_predictor(cls_feature))
            # exp overflows half precision at 11: always in fp32.
            output.boxes.append(boxes.float().clamp(max=MAX_EXPONENT).exp() if spec.exp_boxes else boxes)
            if output.centerness is not None:
                source = cls_feature if spec.centerness_from == "cls" else reg_feature
                output.centerness.append(self.centerness_predictor(source))
            if output.cls_taps is not None and output.reg_taps is not None:
                output.cls_taps.append(cls_tap)
                output.reg_taps.append(reg_tap)
        return output


def _run_tower(
    tower: nn.ModuleList, features: Tensor, start_block: int, tap_index: int | None, raw_taps: bool
) -> tuple[Tensor, Tensor]:
    """The tower's output, and its tap (the input where no block is tapped)."""
    tap = features
    for index in range(start_block, len(tower)):
        raw, features = tower[index](features)
        if index + 1 == tap_index:
            tap = raw if raw_taps else features
    return features, tap


def flatten_levels(maps: list[Tensor], channels: int) -> Tensor:
    """Maps (N, A * channels, H, W) a level -> (N, sum of H * W * A, channels): level, then row, column, anchor.

    With one anchor a cell the result is a transposed view.
    """
    if maps[0].shape[1] == channels:
        return torch.cat([m.flatten(2) for m in maps], dim=2).transpose(1, 2)
    return torch.cat([m.unflatten(1, (-1, channels)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps], dim=1)
