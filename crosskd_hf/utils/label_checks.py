"""Labels that can't be right, found before anything is learnt from them."""

from collections.abc import Sequence

import torch
from torch import Tensor

BEYOND = 2.0  # times an image's side
OUTSIDE = 0.05  # of an image's side, by which boxes of a known format are hardly ever outside
PIXELS = "boxes must be xyxy in pixels of pixel_values (see torchvision.ops.box_convert)"
RELATIVE = "boxes must be cxcywh, relative to the image, as DETR's are (see torchvision.ops.box_convert)"


def check_labels(
    boxes_xyxy: Tensor,
    class_labels: Tensor,
    mask: Tensor,
    image_sizes: Tensor,
    num_labels: int | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Refuse boxes in pixels that have another format, and classes that the model doesn't have.

    Looks at values: on a GPU the host would wait for it.

    Args:
        boxes_xyxy: (N, G, 4) in pixels.
        class_labels: (N, G) integers.
        mask: (N, G) bool, True for real boxes.
        image_sizes: (N, 2) height and width of each image in the same pixels.
        num_labels: of the model; None refuses negative classes only.
        names: what messages call each image; "image 0" and so on by default.

    Raises:
        ValueError: naming the first image and box, its values, and what was expected.
    """
    boxes, class_labels, mask = (tensor.detach().cpu() for tensor in (boxes_xyxy, class_labels, mask))
    low, high = boxes[..., :2], boxes[..., 2:]
    sizes = image_sizes.detach().cpu().flip(-1)[:, None]  # width, height
    _refuse(mask & ~boxes.isfinite().all(-1), boxes, "which isn't finite", PIXELS, names)
    fault = "whose x2 is not above x1 or y2 not above y1, as in xywh or cxcywh given as xyxy"
    _refuse(mask & ~(high > low).all(-1), boxes, fault, PIXELS, names)
    # Partly outside are boxes before clipping; the other image's pixels are where most of a box is outside.
    wrong = mask & ((low >= sizes) | (high <= 0) | (high > BEYOND * sizes) | (low < (1 - BEYOND) * sizes)).any(-1)
    if wrong.any():
        height, width = image_sizes[int(wrong.nonzero()[0, 0])].int().tolist()
        fault = f"outside its {width} x {height} pixels"
        _refuse(wrong, boxes, fault, f"{PIXELS}, not of the original image", names)
    _check_classes(class_labels, mask, num_labels, names)


def check_relative_labels(boxes: Tensor, class_labels: Tensor, mask: Tensor, num_labels: int | None = None) -> None:
    """Refuse relative boxes that have another format or unit, and classes that the model doesn't have.

    Looks at values: on a GPU the host would wait for it.

    Args:
        boxes: (N, G, 4) cxcywh, relative to the image.
        class_labels, mask, num_labels: see `check_labels`.

    Raises:
        ValueError: naming the first image and box, its values, and what was expected.
    """
    boxes, class_labels, mask = (tensor.detach().cpu() for tensor in (boxes, class_labels, mask))
    center, extent = boxes[..., :2], boxes[..., 2:]
    _refuse(mask & ~boxes.isfinite().all(-1), boxes, "which isn't finite", RELATIVE)
    wrong = mask & ((center < 0) | (center > 1) | (extent > BEYOND)).any(-1)
    _refuse(wrong, boxes, "which is in pixels or outside its image", RELATIVE)
    _refuse(mask & (extent <= 0).any(-1), boxes, "whose width or height isn't above 0", RELATIVE)
    ordered = (extent > center).all(-1) & (extent <= 1).all(-1)
    outside = mask & ((center - extent / 2 < -OUTSIDE) | (center + extent / 2 > 1 + OUTSIDE)).any(-1)
    if torch.equal(mask & ordered, mask):
        fault = "partly outside its image, and all boxes of the batch look like xyxy"
        _refuse(outside, boxes, fault, RELATIVE)
    _check_classes(class_labels, mask, num_labels)


def _check_classes(
    class_labels: Tensor, mask: Tensor, num_labels: int | None, names: Sequence[str] | None = None
) -> None:
    wrong = mask & ((class_labels < 0) | (class_labels >= (num_labels or float("inf"))))
    expected = "class_labels must be from 0" + (f" to {num_labels - 1}" if num_labels else "")
    _refuse(wrong, class_labels, "as its class", expected, names)


def _refuse(wrong: Tensor, values: Tensor, fault: str, expected: str, names: Sequence[str] | None = None) -> None:
    """Raise ValueError that names the first of what is wrong (N, G), if anything is."""
    if not wrong.any():
        return
    image, box = wrong.nonzero()[0].tolist()
    name = names[image] if names else f"image {image}"
    shown = torch.round(values[image, box].double(), decimals=4).tolist()
    shown = shown if isinstance(shown, list) else int(shown)
    raise ValueError(f"labels: box {box} of {name} has {shown}, {fault}; {expected}")
