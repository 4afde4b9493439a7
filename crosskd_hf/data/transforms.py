"""Flip, multi-scale and resizing, on uint8 images and their boxes."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize_image

from ..utils.images import resized_size

# `image` (3, H, W) uint8; in training `boxes` (G, 4) xyxy in its pixels, and `class_labels` (G,). Tensors without the
# types of torchvision, whose dispatching took nearly half as long as resizing. After `SizeToFit` also `size`.
Sample = dict[str, Any]
Multiscale = Literal["none", "range", "choice", "batch"]


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image (3, h, w) uint8 at another (height, width) in pixels.

    Bilinear without antialiasing on uint8, within 1 grey level of the published training; with antialiasing the two
    differ by up to 41.
    """
    return resize_image(image, list(size), antialias=False)


class SizeToFit:
    """Choose the `size` of an image, by `resized_size`, and give its boxes at that size.

    The boxes scale by the two rounded per-axis factors and are clipped to the image. The image itself is resized only
    if that makes it smaller. One that grows waits for the collator, which resizes it straight into its batch: until
    then it is small. Draws come from torch's global generator.

    Args:
        short_side: in pixels; not used with `multiscale`.
        long_side: in pixels.
        multiscale: "none"; "range" draws the short side from the integers between two values, both included; "choice"
            draws it from the given ones.
        multiscale_short_sides: the values for the last two, in pixels.

    Raises:
        ValueError: sides that make no size, or do not go with `multiscale`.
    """

    def __init__(
        self,
        short_side: int,
        long_side: int,
        multiscale: Multiscale = "none",
        multiscale_short_sides: Sequence[int] = (),
    ) -> None:
        sides = tuple(multiscale_short_sides)
        if multiscale not in get_args(Multiscale)[:3]:
            raise ValueError(f"multiscale must be one of {', '.join(get_args(Multiscale)[:3])}, got {multiscale!r}")
        if multiscale == "none" and sides:
            raise ValueError(f'multiscale is "none" but multiscale_short_sides is {sides}; set one or the other')
        if multiscale == "range" and (len(sides) != 2 or sides[0] > sides[1]):
            raise ValueError(f'multiscale "range" needs multiscale_short_sides [lowest, highest], got {sides}')
        if multiscale == "choice" and not sides:
            raise ValueError('multiscale "choice" needs at least one of multiscale_short_sides')
        for side in sides or (short_side,):
            resized_size(1, 1, side, long_side)
        self.short_side = short_side
        self.long_side = long_side
        self.multiscale = multiscale
        self.multiscale_short_sides = sides

    def __call__(self, sample: Sample) -> Sample:
        """The sample with `size`, (height, width) in pixels, and its boxes in those pixels."""
        height, width = sample["image"].shape[-2:]
        drawn = draw_short_side(self.multiscale, self.multiscale_short_sides)
        size = resized_size(height, width, drawn or self.short_side, self.long_side)
        smaller = size[0] * size[1] < height * width
        sized = {**sample, "image": resize(sample["image"], size) if smaller else sample["image"], "size": size}
        return with_boxes_at(size, sized, (height, width))


def draw_short_side(multiscale: Multiscale, sides: Sequence[int]) -> int | None:
    """A short side in pixels, from torch's global generator; None where none is drawn for each image.

    Args:
        multiscale: "range" draws from the integers between two values, both included; "choice" from the given ones.
        sides: these values.
    """
    if multiscale == "range":
        return int(torch.randint(sides[0], sides[1] + 1, ()))
    if multiscale == "choice":
        return sides[int(torch.randint(len(sides), ()))]
    return None


def with_boxes_at(size: tuple[int, int], sample: Sample, original: tuple[int, int]) -> Sample:
    """A sample with its boxes, if it has any, scaled by the two rounded per-axis factors and clipped to the image.

    Args:
        size: (height, width) in pixels that the boxes are given at.
        sample: its boxes are xyxy in pixels of the original image.
        original: (height, width) of that one.
    """
    if "boxes" not in sample:
        return sample
    factors = torch.tensor([size[1] / original[1], size[0] / original[0]]).repeat(2)
    boxes = (sample["boxes"] * factors).clamp(min=torch.zeros(4), max=torch.tensor(size[::-1] * 2))
    return {**sample, "boxes": boxes}


class RandomFlip:
    """Turn left and right round with a probability, drawn from torch's global generator."""

    def __init__(self, probability: float) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"the probability of a flip must be from 0 to 1, got {probability}")
        self.probability = probability

    def __call__(self, sample: Sample) -> Sample:
        """The sample or its mirror image."""
        if torch.rand(()) >= self.probability:
            return sample
        left, top, right, bottom = sample["boxes"].unbind(-1)
        width = sample["image"].shape[-1]
        boxes = torch.stack([width - right, top, width - left, bottom], dim=-1)
        return {**sample, "image": sample["image"].flip(-1), "boxes": boxes}
