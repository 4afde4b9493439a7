"""torchvision's augmentations by name, as the recipe key `data.augment` lists them."""

import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..utils.casting import cast
from ..utils.recipe_fields import check_range, default_of, setting, settings_of
from .box_formats import MIN_SIDE
from .transforms import RandomFlip, Sample

SMALLEST_SIDE = 4  # pixels: RandomIoUCrop rounds 0.3 of a shorter one to none, and divides by it


class OnPixels:
    """A transform of torchvision that leaves boxes where they are."""

    def __init__(self, transform: v2.Transform) -> None:
        self.transform = transform

    def __call__(self, sample: Sample) -> Sample:
        """The sample with other pixels, of the same size."""
        return {**sample, "image": self.transform(sample["image"])}


class OnPixelsAndBoxes:
    """A transform of torchvision that moves boxes, or takes some out.

    Boxes are clipped to the image before and after it. Those less than 1 pixel wide or high are left out, and their
    labels.
    """

    def __init__(self, transform: v2.Transform) -> None:
        self.transform = transform

    def __call__(self, sample: Sample) -> Sample:
        """The sample with an image of another size; one less than `SMALLEST_SIDE` wide or high stays as it is, and
        one without boxes.
        """
        height, width = sample["image"].shape[-2:]
        # Without boxes a crop is never accepted, but tried again and again.
        if min(height, width) < SMALLEST_SIDE or not len(sample["boxes"]):
            return sample
        boxes = tv_tensors.BoundingBoxes(sample["boxes"], format="XYXY", canvas_size=(height, width))
        image, boxes = self.transform(tv_tensors.Image(sample["image"]), v2.functional.clamp_bounding_boxes(boxes))
        boxes, kept = v2.functional.sanitize_bounding_boxes(boxes, min_size=MIN_SIDE)
        pixels, corners = image.as_subclass(Tensor), boxes.as_subclass(Tensor)
        return {**sample, "image": pixels, "boxes": corners, "class_labels": sample["class_labels"][kept]}


@dataclass
class Flip:
    """Turns left and right round."""

    probability: float = setting(0.5, "of a flip", minimum=0, maximum=1)

    def build(self) -> RandomFlip:
        """The transform."""
        return RandomFlip(self.probability)


@dataclass
class PhotometricDistort:
    """Changes brightness, contrast, saturation and hue, and mixes the channels up."""

    probability: float = setting(0.5, "of each of the five changes by itself", minimum=0, maximum=1)

    def build(self) -> OnPixels:
        """The transform."""
        return OnPixels(v2.RandomPhotometricDistort(p=self.probability))


@dataclass
class ZoomOut:
    """Puts the image somewhere on a larger canvas."""

    probability: float = setting(0.5, "of a larger canvas", minimum=0, maximum=1)
    # setting() copies a list.
    side_range: list[float] = setting([1.0, 4.0], "the canvas's sides in those of the image", minimum=1, maximum=8)  # noqa: RUF009
    fill: list[int] = setting([0, 0, 0], "colour of the canvas, RGB", minimum=0, maximum=255)  # noqa: RUF009

    def __post_init__(self) -> None:
        if self.side_range != sorted(self.side_range):
            raise ValueError(f"zoom_out.side_range: {self.side_range} must be [lowest, highest]")

    def build(self) -> OnPixelsAndBoxes:
        """The transform."""
        return OnPixelsAndBoxes(v2.RandomZoomOut(self.fill, self.side_range, self.probability))


@dataclass
class IoUCrop:
    """Crops to a part with at least one box; boxes whose centre is outside of it are left out."""

    probability: float = setting(0.8, "of RandomIoUCrop, which leaves one image in 7 whole", minimum=0, maximum=1)

    def build(self) -> OnPixelsAndBoxes:
        """The transform."""
        return OnPixelsAndBoxes(v2.RandomApply([v2.RandomIoUCrop()], self.probability))


AUGMENTATIONS: dict[str, type[Flip | PhotometricDistort | ZoomOut | IoUCrop]] = {
    "flip": Flip,
    "photometric_distort": PhotometricDistort,
    "zoom_out": ZoomOut,
    "iou_crop": IoUCrop,
}


def augmentation(item: str | dict[str, Any]) -> Callable[[Sample], Sample]:
    """The transform that an item of `data.augment` names; its draws come from torch's global generator.

    Args:
        item: a name, or a dict of one name to its options.

    Raises:
        ValueError: an unknown name or option, or a value that an option can't have.
    """
    named = {item: None} if isinstance(item, str) else item
    if not (isinstance(named, dict) and len(named) == 1):
        raise ValueError(f"{item!r} is neither a name nor one name with its options: {{flip: {{probability: 0.5}}}}")
    [(name, options)] = named.items()
    if name not in AUGMENTATIONS:
        raise ValueError(f"there is no augmentation {name!r}. Valid: {', '.join(AUGMENTATIONS)}")
    return AUGMENTATIONS[name](**_cast_options(name, {} if options is None else options)).build()


def _cast_options(name: str, options: Any) -> dict[str, Any]:
    fields = {field.name: field for field in settings_of(AUGMENTATIONS[name])}
    if not isinstance(options, dict):
        raise ValueError(f"{name}: {options!r} must hold options and their values. Valid: {', '.join(fields)}")
    hints = typing.get_type_hints(AUGMENTATIONS[name])
    checked = {}
    for key, value in options.items():
        if key not in fields:
            raise ValueError(f"{name} has no option {key!r} (value {value!r}). Valid: {', '.join(fields)}")
        try:
            checked[key] = cast(value, hints[key])
            check_range(checked[key], fields[key].metadata)
            default = default_of(fields[key])
            if isinstance(default, list) and len(checked[key]) != len(default):
                raise ValueError(f"must have {len(default)} numbers")
        except ValueError as error:
            raise ValueError(f"{name}.{key}: {value!r} {error}") from None
    return checked
