"""Feature Pyramid Network (Lin et al., CVPR 2017, arXiv 1612.03144) with RetinaNet's two extra levels P6 and P7."""

from torch import Tensor, nn
from torch.nn import functional as F

from .configuration import DenseDetectorConfig


class FPNConv(nn.Conv2d):
    """A convolution of the FPN, told apart for its initialisation."""


class FPN(nn.Module):
    """C3..C5 -> P3..P7.

    Args:
        config: the fpn fields, and `strides` for the number of levels, are read.
        in_channels: channels of C3, C4, C5.
    """

    def __init__(self, config: DenseDetectorConfig, in_channels: list[int]):
        super().__init__()
        channels = config.fpn_channels
        extra = len(config.strides) - len(in_channels)
        self.extra_on_input = config.fpn_extra_convs == "on_input"
        self.relu_before_last = config.fpn_relu_before_p7
        self.lateral_convs = nn.ModuleList(FPNConv(width, channels, 1) for width in in_channels)
        self.output_convs = nn.ModuleList(FPNConv(channels, channels, 3, padding=1) for _ in in_channels)
        first = in_channels[-1] if self.extra_on_input else channels
        self.extra_convs = nn.ModuleList(
            FPNConv(first if i == 0 else channels, channels, 3, stride=2, padding=1) for i in range(extra)
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Maps (N, C_i, H_i, W_i) of strides 8, 16, 32 -> one (N, fpn_channels, H_i, W_i) a stride."""
        merged = [conv(feature) for conv, feature in zip(self.lateral_convs, features, strict=True)]
        for i in range(len(merged) - 1, 0, -1):
            upsampled = F.interpolate(merged[i], size=merged[i - 1].shape[-2:], mode="nearest")
            merged[i - 1] = merged[i - 1] + upsampled
        levels = [conv(feature) for conv, feature in zip(self.output_convs, merged, strict=True)]
        source = features[-1] if self.extra_on_input else levels[-1]
        for i, conv in enumerate(self.extra_convs):
            source = conv(F.relu(source) if i > 0 and self.relu_before_last else source)
            levels.append(source)
        return levels
