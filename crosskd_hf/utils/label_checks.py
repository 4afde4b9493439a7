"""Labels that can't be right, found before anything is learnt from them."""

from collections.abc import Sequence

import torch
from torch import Tensor

BEYOND = 2.0  # times an image's side
FORMAT = "boxes must be xyxy in pixels of pixel_values (see torchvision.ops.box_convert)"


def check_labels(
    boxes: Tensor,
    class_labels: Tensor,
    mask: Tensor,
    image_sizes: Tensor,
    num_labels: int | None = None,
    names: Sequence[str] | None = None,
    refuse_relative: bool = True,
) -> None:
    """Refuse boxes of another format or unit, and classes that the model doesn't have.

    Looks at values: on a GPU the host would wait for it.

    Args:
        boxes: (N, G, 4) xyxy in pixels.
        class_labels: (N, G) integers.
        mask: (N, G) bool, True for real boxes.
        image_sizes: (N, 2) height and width of each image in the same pixels.
        num_labels: of the model; None refuses negative classes only.
        names: what messages call each image; "image 0" and so on by default.
        refuse_relative: refuse a batch whose boxes all lie within 0..1. Tiny boxes of a resized image may, too.

    Raises:
        ValueError: naming the first image and box, its values, and what was expected.
    """
    boxes, class_labels, mask = (tensor.detach().cpu() for tensor in (boxes, class_labels, mask))
    low, high = boxes[..., :2], boxes[..., 2:]
    sizes = image_sizes.detach().cpu().flip(-1)[:, None]  # width, height
    # Relative ones seldom begin at 0, but a box of a pixel in the upper left corner does.
    relative = mask & ((boxes >= 0) & (boxes <= 1)).all(-1)
    if refuse_relative and mask.any() and torch.equal(relative, mask) and (low[mask] > 0).any():
        fault = f"and all {int(mask.sum())} boxes of the batch lie within 0..1, as relative boxes (DETR's cxcywh) do"
        raise ValueError(_message(relative, boxes, fault, FORMAT, names))
    wrong = mask & ~boxes.isfinite().all(-1)
    if wrong.any():
        raise ValueError(_message(wrong, boxes, "which isn't finite", FORMAT, names))
    wrong = mask & ~(high > low).all(-1)
    if wrong.any():
        fault = "whose x2 is not above x1 or y2 not above y1, as in xywh or cxcywh given as xyxy"
        raise ValueError(_message(wrong, boxes, fault, FORMAT, names))
    # Partly outside are boxes before clipping; the other image's pixels are where most of a box is outside.
    wrong = mask & ((low >= sizes) | (high <= 0) | (high > BEYOND * sizes) | (low < (1 - BEYOND) * sizes)).any(-1)
    if wrong.any():
        height, width = image_sizes[int(wrong.nonzero()[0, 0])].int().tolist()
        fault = f"outside its {width} x {height} pixels"
        raise ValueError(_message(wrong, boxes, fault, f"{FORMAT}, not of the original image", names))
    wrong = mask & ((class_labels < 0) | (class_labels >= (num_labels or float("inf"))))
    if wrong.any():
        expected = "class_labels must be from 0" + (f" to {num_labels - 1}" if num_labels else "")
        raise ValueError(_message(wrong, class_labels, "as its class", expected, names))


def _message(wrong: Tensor, values: Tensor, fault: str, expected: str, names: Sequence[str] | None) -> str:
    image, box = wrong.nonzero()[0].tolist()
    name = names[image] if names else f"image {image}"
    shown = torch.round(values[image, box].double(), decimals=4).tolist()
    return f"labels: box {box} of {name} has {shown if isinstance(shown, list) else int(shown)}, {fault}; {expected}"
