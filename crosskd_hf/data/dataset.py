"""Items of a training or an evaluation set: an image, the size it gets, and its boxes."""

import math
import operator
from collections import UserDict
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset

from ..data.augment import augmentation
from ..data.box_formats import MIN_SIDE
from ..data.errors import DataError
from ..data.processor_size import SizeForProcessor, plain_size
from ..data.sampler import SampleKey, stable_seed
from ..data.split import DetectionSplit
from ..data.transforms import Multiscale, RandomFlip, Sample, SizeToFit
from ..utils.escaping import printable
from ..utils.images import ImageError, load_tensor

ROWS_AT_ONCE = 1000


class DetectionDataset(Dataset["Item"]):
    """Decodes and augments the images of a split.

    Items have `image` (3, h, w) uint8 RGB, decoded and augmented; `size`, the (height, width) in pixels that it
    gets, at the latest from the collator (an image that grows is resized straight into the batch); `image_id` int;
    `original_size` (height, width) in pixels; and `class_labels` (G,) int64 and `boxes` (G, 4) float32, xyxy in pixels
    of the resized image. (COCO's metrics read the ground truth from the split.)

    With an `OrientationBatchSampler`, augmentation is a function of (seed, epoch, index) alone, so that neither the
    number of workers, nor prefetching, nor a resumed run changes it. Items leave out crowd boxes, boxes less than 1
    pixel wide or high, those of no area and those outside the image.

    Args:
        split: see `load_coco` and `keep_for_training`.
        train: augment.
        short_side, long_side: see `SizeToFit`.
        multiscale, multiscale_short_sides: see `SizeToFit`; evaluation has one size.
        flip_probability: of a horizontal flip in training, without `augment`.
        augment: names of augmentations, or dicts of one name to its options, in their order: see `AUGMENTATIONS`.
        plain_epochs: in this many last epochs only the flips among them are applied; see `set_epochs`.
        seed: of the augmentation.

    Raises:
        ValueError: see `SizeToFit` and `augmentation`; a probability outside [0, 1].
    """

    def __init__(
        self,
        split: DetectionSplit,
        *,
        train: bool,
        short_side: int = 800,
        long_side: int = 1333,
        multiscale: Multiscale = "none",
        multiscale_short_sides: Sequence[int] = (),
        flip_probability: float = 0.5,
        augment: Sequence[str | dict[str, Any]] | None = None,
        plain_epochs: int = 0,
        seed: int = 0,
    ) -> None:
        self.split = split
        self.train = train
        self.seed = seed
        self.size: dict[str, int] = {"short_side": short_side, "long_side": long_side}
        self.plain_epochs = plain_epochs
        self.plain_from: float = math.inf  # the first of the plain epochs, once their number is known
        # Flipped first, while the image is small: the pixels are the same.
        self.augmentations: list[Callable[[Sample], Sample]] = []
        if train:
            items = [{"flip": {"probability": flip_probability}}] if augment is None else augment
            self.augmentations = [augmentation(item) for item in items]
        self.multiscale: Multiscale = multiscale if train else "none"
        self.multiscale_short_sides = tuple(multiscale_short_sides) if train else ()
        self.fit: Callable[[Sample], Sample]
        if self.multiscale != "batch":
            self.fit = SizeToFit(short_side, long_side, self.multiscale, self.multiscale_short_sides)
        rows = split.dataset.select_columns(["image_id", "image", "file_name", "width", "height", "objects"])
        self._rows = rows.cast_column("image", datasets.Image(decode=False))  # decoded by `load_tensor`

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: int | SampleKey) -> "Item":
        """The item of an index or of a `SampleKey`.

        A key decides what augmentation draws, so that a resumed run sees the same images. For an index, as
        transformers' Trainer and plain loaders have them, draws come from torch's global generator.

        Raises:
            IndexError: no such index.
            DataError: an image that cannot be read, or whose size is not the one in the annotation file.
        """
        drawn = 0 if isinstance(key, SampleKey) or not self.train else int(torch.randint(2**31, ()))
        key = key if isinstance(key, SampleKey) else SampleKey(0, operator.index(key))
        if not 0 <= key.index < len(self):
            raise IndexError(f"index {key.index} is outside a data set of {len(self)} images")
        row = self._read(key.index)
        sample: Sample = {"image": row["image"]}
        sample["class_labels"], sample["boxes"] = training_boxes(row["objects"], row["height"], row["width"])
        plain = key.epoch >= self.plain_from
        steps = [step for step in self.augmentations if not plain or isinstance(step, RandomFlip)]
        parts = (self.seed, key.epoch, key.index, *([key.turn] if key.turn else []), *([drawn] if drawn else []))
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would also reseed the GPUs' generators, and those are not restored here.
            torch.random.default_generator.manual_seed(stable_seed(*parts))
            if self.multiscale == "batch" and not plain:
                sample["batch_draw"] = stable_seed(self.seed, key.epoch, key.batch)
            for step in (*steps, self.fit):
                sample = step(sample)
        # A sliver at the image's edge may have been rounded to nothing.
        keep = (sample["boxes"][:, 2:] > sample["boxes"][:, :2]).all(1)
        sample["boxes"], sample["class_labels"] = sample["boxes"][keep], sample["class_labels"][keep]
        return Item({**sample, "image_id": row["image_id"], "original_size": (row["height"], row["width"])})

    def use_processor(self, processor: Any) -> None:
        """Resize images as a processor of transformers does it, instead of to `short_side` and `long_side`."""
        self.fit = SizeForProcessor(processor, self.multiscale, self.multiscale_short_sides)
        self.size = plain_size(processor)

    def set_epochs(self, epochs: int) -> None:
        """Say how many epochs the training has, before it begins: `plain_epochs` are the last ones.

        Raises:
            ValueError: it has no other epochs.
        """
        if self.plain_epochs and self.plain_epochs >= epochs:
            raise ValueError(
                f"data.plain_epochs is {self.plain_epochs}, but the number of epochs {epochs}: data.augment would "
                "never be applied. Lower plain_epochs; 0 is none."
            )
        self.plain_from = epochs - self.plain_epochs

    def orientations(self) -> torch.Tensor:
        """(N,) bool, True where the image is narrower than high. No image is decoded."""
        # In parts, since `datasets` makes a table of every row of a selection before it joins them.
        rows = self._rows.select_columns(["width", "height"]).with_format("arrow")
        parts = [pc.less(part["width"], part["height"]).to_numpy() for part in rows.iter(ROWS_AT_ONCE)]
        return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.bool)

    def _read(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        stored, name = row["image"], f"image {row['image_id']} ({printable(row['file_name'])})"
        try:
            row["image"] = load_tensor(stored["path"] if stored["bytes"] is None else stored["bytes"])
        except ImageError as error:
            raise DataError(
                f"{name} {error}; restore it, or start again in another training.output_dir with data.on_error=skip"
            ) from error
        height, width = row["image"].shape[-2:]
        if (width, height) != (row["width"], row["height"]):
            raise DataError(
                f"{name} is {width} x {height} pixels, but the annotation file "
                f"says {row['width']} x {row['height']}: its boxes would not fit; correct one or the other"
            )
        return row


class Item(UserDict[str, Any]):
    """An item of a `DetectionDataset`. transformers' Trainer takes keys that a model doesn't know out of each `dict`,
    which this isn't."""


def training_boxes(objects: dict[str, list[Any]], height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The boxes of an image that are trained on.

    Args:
        objects: one row of the `objects` column, boxes [x, y, w, h].
        height, width: of the original image, in pixels.

    Returns:
        (G,) int64 labels and (G, 4) float32 xyxy boxes in original pixels, not clipped yet.
    """
    labels, boxes = [], []
    for (x, y, w, h), label, area, crowd in zip(
        objects["bbox"], objects["category"], objects["area"], objects["iscrowd"], strict=True
    ):
        overlaps = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
        if not crowd and w >= MIN_SIDE and h >= MIN_SIDE and area > 0 and overlaps:
            labels.append(label)
            boxes.append([x, y, x + w, y + h])
    return torch.tensor(labels, dtype=torch.int64), torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
