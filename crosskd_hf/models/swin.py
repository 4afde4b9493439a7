"""timm's Swin (Liu et al., ICCV 2021, arXiv 2103.14030) with inputs of any size, as detectors were trained with it."""

from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 4  # pixels a side of a patch


class PadFirstSwinBlock(SwinTransformerBlock):
    """A block that pads its map to whole windows and then shifts it.

    timm shifts and then pads, so that other cells meet in a window wherever a side isn't a multiple of the window.
    """

    def _attn(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        # In numbers of windows, and narrowed instead of sliced: so torch.export sees that sides of any size fit.
        rows, columns = (-(-side // window) for side, window in zip((height, width), self.window_size, strict=True))
        bottom, right = rows * self.window_size[0] - height, columns * self.window_size[1] - width
        attended = super()._attn(F.pad(x, (0, 0, 0, right, 0, bottom)))
        return attended.narrow(1, 0, height).narrow(2, 0, width).contiguous()


def is_swin(name: str) -> bool:
    """Whether a timm model name is one of Swin's first version."""
    return name.startswith("swin_")


def pad_before_shifting(body: nn.Module) -> None:
    """Give every block of a timm Swin the reference's order of padding and shifting."""
    for module in body.modules():
        if type(module) is SwinTransformerBlock:
            module.__class__ = PadFirstSwinBlock


def pad_to_patches(pixel_values: Tensor) -> Tensor:
    """(N, 3, H, W) with zeros at the right and bottom up to whole patches."""
    height, width = pixel_values.shape[-2:]
    return F.pad(pixel_values, (0, -width % PATCH, 0, -height % PATCH))


def merge_order(channels: int) -> list[int]:
    """Where timm's patch merging finds each of its 4 * channels inputs in the reference's order.

    timm's input (kw * 2 + kh) * C + c is the reference's c * 4 + kh * 2 + kw.
    """
    return [c * 4 + kh * 2 + kw for kw in range(2) for kh in range(2) for c in range(channels)]
