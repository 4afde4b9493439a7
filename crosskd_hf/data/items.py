"""A row of a data set -> an item: an image, augmented, the size it gets, and its boxes."""

import math
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch

from .augment import augmentation
from .box_formats import MIN_SIDE
from .processor_size import SizeForProcessor, plain_size
from .sampler import SampleKey, stable_seed
from .transforms import Multiscale, RandomFlip, Sample, SizeToFit

Split = TypeVar("Split")


class Items(Generic[Split]):
    """Augments the images of a split and their boxes, and says to which size they are resized: what `DetectionDataset`
    and `DetectionStream` share.

    Args:
        split: of which the rows are.
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
        split: Split,
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
            steps = [{"flip": {"probability": flip_probability}}] if augment is None else augment
            self.augmentations = [augmentation(step) for step in steps]
        self.multiscale: Multiscale = multiscale if train else "none"
        self.multiscale_short_sides = tuple(multiscale_short_sides) if train else ()
        self.fit: Callable[[Sample], Sample]
        if self.multiscale != "batch":
            self.fit = SizeToFit(short_side, long_side, self.multiscale, self.multiscale_short_sides)

    def make_item(self, row: Mapping[str, Any], key: SampleKey, drawn: int = 0) -> "Item":
        """The item of a row.

        Args:
            row: the columns of a `DetectionSplit`, with the image as (3, h, w) uint8.
            key: decides what augmentation draws, and `drawn`, if it isn't 0, besides it.
        """
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
