"""What an image processor is given: sizes, annotations, pixels of any kind; checked, and in one form."""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from transformers.image_utils import AnnotationFormat, SizeDict, validate_annotations
from transformers.models.detr.image_processing_detr import prepare_coco_detection_annotation

from .targets import relative_boxes

LARGEST_SIDE = 100_000  # pixels
SIZES = (("shortest_edge", "longest_edge"), ("max_height", "max_width"), ("height", "width"))  # what `size` can be


def labels_of(
    images: list[torch.Tensor], annotations: Any, sizes: Sequence[tuple[int, int]]
) -> list[dict[str, torch.Tensor]]:
    """COCO's annotations of images -> labels at the sizes, (height, width), that they were resized to."""
    annotations = [annotations] if isinstance(annotations, dict) else annotations
    if len(annotations) != len(images):
        raise ValueError(f"{len(annotations)} annotations were given for {len(images)} images")
    validate_annotations(AnnotationFormat.COCO_DETECTION, (AnnotationFormat.COCO_DETECTION,), annotations)
    labels = []
    for image, annotation, size in zip(images, annotations, sizes, strict=True):
        label = prepare_coco_detection_annotation(image, annotation)
        frame = label["orig_size"]
        label["boxes"] = relative_boxes(label["boxes"][None], frame[None])[0]
        label["area"] = label["area"] * (math.prod(size) / math.prod(image.shape[-2:]))
        label["size"] = torch.tensor(size, device=frame.device)
        labels.append(label)
    return labels


def given_sides(size: SizeDict) -> tuple[int, int]:
    """The two sides that are given. Raise ValueError for sides that images can't be resized to."""
    given = [pair for pair in SIZES if any(getattr(size, side) is not None for side in pair)]
    if len(given) != 1:
        kinds = ", or ".join(" and ".join(pair) for pair in SIZES)
        raise ValueError(f"size is {dict(size)}; it must have {kinds}.")
    for side in given[0]:
        pixels = getattr(size, side)
        if isinstance(pixels, bool) or not (isinstance(pixels, Integral) and 1 <= int(pixels) <= LARGEST_SIDE):
            raise ValueError(
                f"size has the {side} {pixels!r}; it must be a whole number of pixels from 1 to {LARGEST_SIDE}."
            )
    first, second = given[0]
    return getattr(size, first), getattr(size, second)


def channels_can_only_be_last(shape: Sequence[int]) -> bool:
    """Whether an image of this shape, without a known order of its axes, is (height, width, channels)."""
    # transformers takes (1, w, 3) for a grey image of height w: an image of one row is likelier. (3, w, 3) stays open.
    return len(shape) == 3 and shape[-1] == 3 and shape[0] != 3


def as_uint8(image: torch.Tensor) -> torch.Tensor:
    """Grey levels 0..255 as uint8; of floats up to 1, and of booleans, 1 is 255.

    Raises:
        ValueError: values beyond, or NaN.
    """
    if image.dtype == torch.uint8:
        return image
    if image.dtype == torch.bool:
        return image.to(torch.uint8) * 255
    low, high = image.min().item(), image.max().item()
    if not 0 <= low <= high <= 255:  # NaN fails here as well
        raise ValueError(f"image values must be grey levels 0..255 (or 0..1 as floats), got {low} to {high}")
    if image.is_floating_point() and high <= 1:
        image = image * 255
    return image.round().to(torch.uint8) if image.is_floating_point() else image.to(torch.uint8)
