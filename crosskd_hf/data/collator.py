"""Items -> batch, with the pixels made by the image processor: training and inference run the same code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from crosskd_hf.models.image_processing_dense import DenseDetectorImageProcessor


@dataclass(frozen=True)
class DetectionCollator:
    """Makes a batch from the items of a `DetectionDataset`.

    Gives `pixel_values` (N, 3, H, W) float32, `pixel_mask` (N, H, W) bool, and
    - for training items `labels`, a list of N dicts: `class_labels` (G,) int64, `boxes` (G, 4) float32 xyxy in pixels
      of the resized image, `image_id` () int64, `size` and `orig_size` (2,) int64, both (height, width);
    - for evaluation items `image_ids` (N,) int64 and `original_sizes` (N, 2) int64, (height, width).

    Args:
        processor: whose `normalize_and_pad` makes the pixels.
    """

    processor: DenseDetectorImageProcessor

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate. Raises ValueError for no items, or for a mixture of training and evaluation items."""
        if len({"boxes" in item for item in items}) != 1:
            raise ValueError("a batch needs at least one item, and training items only or evaluation items only")
        batch = dict(self.processor.normalize_and_pad([item["image"] for item in items]))
        if "boxes" in items[0]:
            return {**batch, "labels": [_label(item) for item in items]}
        image_ids = torch.tensor([item["image_id"] for item in items], dtype=torch.int64)
        original_sizes = torch.tensor([item["original_size"] for item in items], dtype=torch.int64)
        return {**batch, "image_ids": image_ids, "original_sizes": original_sizes}


def _label(item: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        "class_labels": item["class_labels"],
        "boxes": item["boxes"],
        "image_id": torch.tensor(item["image_id"]),
        "size": torch.tensor(item["image"].shape[-2:]),
        "orig_size": torch.tensor(item["original_size"]),
    }
