"""Generated detection images: the offline data set that the package carries.

Every image is a function of (seed, split, index) and the settings alone, so that a longer split begins with the
images of a shorter one. Shapes of six classes lie turned, textured and overlapping on a cluttered background; some
images hold a crowd (a patch of tiny shapes with one box, `iscrowd`), some nothing.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .cache import cached_rows
from .checks import ImageRecord, ObjectRecord, arrow_row
from .sampler import stable_seed
from .split import DetectionSplit, detection_features, split_and_part

CLASSES = ("disc", "square", "triangle", "star", "ring", "cross")
EMPTY_FRACTION, CROWD_FRACTION = 0.04, 0.06
CROSS_ARM = math.hypot(1, 0.35)
# Corners of a shape: how often they are repeated around it, and their radius (in parts of the shape's) and angle.
OUTLINES = {
    "square": (4, [(1, 0)]),
    "triangle": (3, [(1, 0)]),
    "star": (5, [(1, 0), (0.45, math.pi / 5)]),
    "cross": (
        4,
        [(1, -math.atan2(0.35, 1)), (1, math.atan2(0.35, 1)), (math.hypot(0.35, 0.35) / CROSS_ARM, math.pi / 4)],
    ),
}
SUPERSAMPLING = 4  # edges are drawn at this many times the resolution
MIN_VISIBLE = 0.4  # part of a shape that later ones leave visible; a shape that would be hidden more is left out


@dataclass(frozen=True)
class Scene:
    """One generated image: (H, W, 3) uint8 pixels; G boxes [x, y, w, h] in pixels, labels and crowd flags."""

    pixels: np.ndarray
    boxes: list[list[int]]
    labels: list[int]
    crowds: list[bool]


def load_shapes(
    split: str, images: int, *, side: int = 128, difficulty: float = 0.5, seed: int = 0, cache_dir: str | None = None
) -> DetectionSplit:
    """A split of generated images, from the Arrow cache when it was made before.

    Args:
        split: any name; splits of different names have no image in common. A slice such as "train[:80%]" is of the
            `images` of its name.
        images: their number.
        side: longer side of an image, in pixels; the other one is 3/4 of it. Every third image is upright.
        difficulty: 0 (few, large shapes on a plain background) to 1 (many, small, noisy ones between clutter, of
            colours near the background's).
        seed: of all images.
        cache_dir: where the Arrow file goes; by default the cache of `datasets`.

    Raises:
        ValueError: no image, a side below 32 pixels, or a difficulty outside 0..1.
        CacheError: see `open_cache`.
    """
    split, part = split_and_part(split)
    if images < 1 or side < 32 or not 0 <= difficulty <= 1:
        raise ValueError(
            "generated images need at least 1 image, a side of 32 pixels or more and a difficulty from 0 to 1, "
            f"got {images}, {side} and {difficulty}"
        )
    made_from = (split, images, side, float(difficulty), seed)
    dataset = cached_rows(
        "crosskd_shapes", made_from, lambda: (detection_features(CLASSES), "", _rows(*made_from)), cache_dir
    )
    ids = tuple(range(1, len(CLASSES) + 1))
    return DetectionSplit(dataset, CLASSES, ids, name=split, source="generated shapes").part(part)


def _rows(split: str, images: int, side: int, difficulty: float, seed: int) -> Iterator[dict[str, Any]]:
    """The rows of a `DetectionSplit`, PNG bytes included."""
    number = 0
    for index in range(images):
        scene = draw_scene(index, split, side, difficulty, seed)
        file = io.BytesIO()
        Image.fromarray(scene.pixels).save(file, "PNG")
        objects = [
            ObjectRecord(number + i, box, label, box[2] * box[3], crowd)
            for i, (box, label, crowd) in enumerate(zip(scene.boxes, scene.labels, scene.crowds, strict=True), 1)
        ]
        number += len(objects)
        height, width = scene.pixels.shape[:2]
        record = ImageRecord(index, f"{split}_{index:06d}.png", width, height, objects)
        yield {**arrow_row(record), "image": {"path": None, "bytes": file.getvalue()}}


def draw_scene(index: int, split: str, side: int, difficulty: float, seed: int) -> Scene:
    """The image of an index.

    Returns:
        boxes are the tight pixel bounds of the whole shape, also where another one covers a part of it.
    """
    rng = np.random.default_rng(stable_seed(seed, index, *split.encode()))
    width, height = (side * 3 // 4, side) if index % 3 == 2 else (side, side * 3 // 4)
    canvas = _background(rng, height, width, difficulty)
    boxes, labels, crowds = [], [], []
    kind = rng.random()
    if kind >= EMPTY_FRACTION:
        if kind < EMPTY_FRACTION + CROWD_FRACTION:
            box, label = _draw_crowd(rng, canvas, difficulty)
            boxes, labels, crowds = [box], [label], [True]
        # How often each pixel's owner was drawn over decides which shapes are too hidden.
        owner = np.full((height, width), -1)
        smallest = 0.25 - 0.17 * difficulty
        for _ in range(int(rng.integers(1, 5 + round(6 * difficulty)))):
            label = int(rng.integers(len(CLASSES)))
            # Log-uniform: as many small shapes as large ones.
            size = min(height, width) * math.exp(rng.uniform(math.log(smallest), math.log(0.7)))
            mask = shape_mask(label, size, rng.uniform(0, 2 * math.pi))[: height - 1, : width - 1]
            x, y = int(rng.integers(0, width - mask.shape[1])), int(rng.integers(0, height - mask.shape[0]))
            solid, owners = mask > 0.5, owner[y : y + mask.shape[0], x : x + mask.shape[1]]
            if not solid.any() or not _leaves_visible(owner, owners[solid]):
                continue
            _paint(canvas, mask, x, y, _texture(rng, mask.shape, canvas, difficulty))
            owners[solid] = len(boxes)
            left, top, right, bottom = Image.fromarray(solid).getbbox()
            boxes.append([x + left, y + top, right - left, bottom - top])
            labels.append(label)
            crowds.append(False)
    canvas += rng.normal(0, 4 + 14 * difficulty, canvas.shape)
    return Scene(canvas.clip(0, 255).round().astype(np.uint8), boxes, labels, crowds)


def shape_mask(label: int, size: float, angle: float) -> np.ndarray:
    """(s, s) coverage 0..1 of a shape of about `size` pixels, turned by `angle` radians."""
    side = math.ceil(size) + 2
    image = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    draw = ImageDraw.Draw(image)
    centre, radius = side * SUPERSAMPLING / 2, size * SUPERSAMPLING / 2

    def disc(part: float, fill: int) -> None:
        r = radius * part
        draw.ellipse((centre - r, centre - r, centre + r, centre + r), fill=fill)

    name = CLASSES[label]
    if name in ("disc", "ring"):
        disc(1, 255)
        if name == "ring":
            disc(0.55, 0)
    else:
        repeats, corners = OUTLINES[name]
        turned = [(radius * r, 2 * math.pi * i / repeats + a + angle) for i in range(repeats) for r, a in corners]
        draw.polygon([(centre + r * math.cos(a), centre + r * math.sin(a)) for r, a in turned], fill=255)
    small = image.resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64) / 255


def _leaves_visible(owner: np.ndarray, below: np.ndarray) -> bool:
    """Whether every shape drawn before stays visible enough under a new one, which covers pixels of these owners."""
    earlier = np.unique(below[below >= 0])
    return all((below == index).sum() <= (1 - MIN_VISIBLE) * (owner == index).sum() for index in earlier)


def _paint(canvas: np.ndarray, mask: np.ndarray, x: int, y: int, colours: np.ndarray) -> None:
    part = canvas[y : y + mask.shape[0], x : x + mask.shape[1]]
    part += mask[..., None] * (colours - part)


def _texture(rng: np.random.Generator, shape: tuple[int, ...], canvas: np.ndarray, difficulty: float) -> np.ndarray:
    """(h, w, 3) colours: plain, stripes, checks, dots or a gradient of two colours."""
    first, second = (rng.uniform(0, 255, 3) for _ in range(2))
    # Towards the image's mean colour, so that contrast falls with difficulty.
    towards = 0.6 * difficulty * rng.random()
    first, second = (c + towards * (canvas.mean(axis=(0, 1)) - c) for c in (first, second))
    second = first + (second - first) * 0.5
    rows, columns = np.indices(shape)
    period = rng.uniform(3, 8)
    angle = rng.uniform(0, math.pi)
    along = rows * math.sin(angle) + columns * math.cos(angle)
    kind = int(rng.integers(5))
    if kind == 0:
        share = np.zeros(shape)
    elif kind == 1:
        share = (along % period < period / 2).astype(float)
    elif kind == 2:
        share = ((rows // (period / 2) + columns // (period / 2)) % 2).astype(float)
    elif kind == 3:
        share = (rng.random(shape) < 0.3).astype(float)
    else:
        share = (along - along.min()) / max(float(np.ptp(along)), 1.0)
    return first + share[..., None] * (second - first)


def _background(rng: np.random.Generator, height: int, width: int, difficulty: float) -> np.ndarray:
    """(H, W, 3) float: a soft pattern of two colours, with lines and blots for clutter."""
    coarse = rng.random((4, 4))
    pattern = np.asarray(Image.fromarray(coarse.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))
    first, second = rng.uniform(40, 215, 3), rng.uniform(40, 215, 3)
    canvas = first + pattern[..., None].astype(float) * (second - first) * (0.3 + 0.5 * difficulty)
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(round(16 * difficulty)):
        xs, ys = rng.uniform(0, width, 2), rng.uniform(0, height, 2)
        colour = tuple(int(v) for v in rng.uniform(0, 255, 3))
        draw.line([(xs[0], ys[0]), (xs[1], ys[1])], fill=colour, width=int(rng.integers(1, 4)))
    return np.asarray(image).astype(float)


def _draw_crowd(rng: np.random.Generator, canvas: np.ndarray, difficulty: float) -> tuple[list[int], int]:
    """A patch full of tiny shapes of one class: its box and label."""
    height, width = canvas.shape[:2]
    label = int(rng.integers(len(CLASSES)))
    w, h = int(width * rng.uniform(0.3, 0.5)), int(height * rng.uniform(0.3, 0.5))
    left, top = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
    size = max(5.0, min(height, width) * 0.08)
    for _ in range(int(rng.integers(20, 40))):
        mask = shape_mask(label, size, rng.uniform(0, 2 * math.pi))
        y = top + int(rng.integers(0, max(1, h - mask.shape[0])))
        x = left + int(rng.integers(0, max(1, w - mask.shape[1])))
        mask = mask[: height - y, : width - x]
        _paint(canvas, mask, x, y, _texture(rng, mask.shape, canvas, difficulty))
    return [left, top, w, h], label
