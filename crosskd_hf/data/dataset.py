"""A training or an evaluation set whose images are read by their number."""

import functools
import operator
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset

from ..utils.escaping import printable
from ..utils.images import ImageError, load_tensor
from .errors import DataError
from .items import Item, Items
from .sampler import SampleKey
from .split import DetectionSplit

ROWS_AT_ONCE = 1000


class DetectionDataset(Items[DetectionSplit], Dataset[Item]):
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
        others: see `Items`, as for the errors.
    """

    @functools.cached_property
    def _rows(self) -> datasets.Dataset:
        columns = ["image_id", "image", "file_name", "width", "height", "objects"]
        return self.split.dataset.select_columns(columns).cast_column("image", datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: int | SampleKey) -> Item:
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
        return self.make_item(self._read(key.index), key, drawn)

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
