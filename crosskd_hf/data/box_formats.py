"""Box formats, and whether the boxes of a data set are in the declared one."""

import itertools
from typing import Any

import numpy as np

from .errors import DataError, Kind, Problems

FORMATS, UNITS = ("xywh", "xyxy", "cxcywh"), ("pixel", "relative")
MIN_SIDE = 1.0  # pixels of the original image; smaller boxes aren't trained on
SUSPICIOUS_SHARE = 0.05
LARGEST = 1e9  # of a box's numbers and areas: to there sums of float64 are exact to 1e-6 pixels


def to_xywh(boxes: np.ndarray, sizes: np.ndarray, box_format: str = "xywh", unit: str = "pixel") -> np.ndarray:
    """(G, 4) boxes of any format as [x, y, w, h] in pixels.

    Args:
        boxes: (G, 4) numbers.
        sizes: (G, 2) width and height of each box's image, in pixels.
        box_format: `xywh` (upper left corner and size), `xyxy` (two corners), `cxcywh` (centre and size).
        unit: `pixel`, or `relative` to the image's width and height.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    if unit == "relative":
        boxes = boxes * np.tile(sizes, 2)
    first, second = boxes[:, :2], boxes[:, 2:]
    if box_format == "xyxy":
        second = second - first
    elif box_format == "cxcywh":
        first = first - second / 2
    return np.concatenate([first, second], axis=1)


def misfits(boxes_xywh: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(G,) bool: boxes that no person draws - smaller than a pixel, or well over the image's edge.

    Args:
        boxes_xywh: (G, 4) in pixels.
        sizes: (G, 2) width and height of each box's image.
    """
    slack = np.maximum(2.0, 0.02 * sizes)
    low, extent = boxes_xywh[:, :2], boxes_xywh[:, 2:]
    fits = (extent >= MIN_SIDE) & (low >= -slack) & (low + extent <= sizes + slack)
    return ~fits.all(axis=1)


def check_format(boxes: np.ndarray, sizes: np.ndarray, box_format: str, unit: str, source: str) -> None:
    """Raise DataError if many boxes don't fit into their images, but would in another format.

    Args:
        boxes: (G, 4) finite numbers as they were given, G > 0.
        sizes: (G, 2) width and height of each box's image, in pixels.
        box_format, unit: what the user declared.
        source: what the message calls the data.
    """
    candidates = itertools.product(FORMATS, UNITS)
    wrong = {(f, u): int(misfits(to_xywh(boxes, sizes, f, u), sizes).sum()) for f, u in candidates}
    misfitting = wrong[box_format, unit]
    best = min(wrong, key=wrong.get)
    many = misfitting >= 2 and misfitting > SUSPICIOUS_SHARE * len(boxes) and wrong[best] <= misfitting / 2
    # Small boxes in a wrong format seldom leave their images: then nearly all of those that do must fit in another.
    telling = misfitting >= 10 and wrong[best] <= misfitting / 20
    if not (many or telling):
        return
    raise DataError(
        f"{source}: {misfitting} of {len(boxes)} boxes don't fit into their images as {box_format} ({unit}); as "
        f"{best[0]} ({best[1]}) {wrong[best]} don't. The first is {np.asarray(boxes[0]).tolist()} in an image of "
        f"{int(sizes[0, 0])} x {int(sizes[0, 1])}. Layout coco has [x, y, width, height] in pixels: convert the "
        f"file. For layout datasets set data.box_format={best[0]} data.box_unit={best[1]}."
    )


def is_box(box: Any) -> bool:
    """Whether a value is four numbers that `is_finite`."""
    return isinstance(box, (list, tuple)) and len(box) == 4 and all(map(is_finite, box))


def is_finite(value: Any) -> bool:
    """Whether a value is a number from -`LARGEST` to `LARGEST`; True and False are none, nor is NaN.

    Larger ones are mistakes, whose sums and products would overflow.
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def note_box(box_xywh: list[float], width: int, height: int, where: str, problems: Problems) -> bool:
    """Note what is wrong with one box.

    Args:
        box_xywh: four finite numbers, pixels.
        width, height: of its image.
        where: names the record.
        problems: takes what is wrong.

    Returns:
        False if the box can't be used.
    """
    x, y, w, h = box_xywh
    text = f"{where}: {[round(v, 3) for v in box_xywh]} in {width} x {height}"
    if w < 0 or h < 0:
        problems.add(Kind.BOX_NEGATIVE, text)
        return False
    if w < MIN_SIDE or h < MIN_SIDE:
        problems.add(Kind.BOX_EMPTY, text)
    elif not (min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)):
        problems.add(Kind.BOX_OUTSIDE, text)
    elif x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
        problems.add(Kind.BOX_EDGE, text)
    return True
