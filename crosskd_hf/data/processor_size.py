"""Images and batches as a detector's own image processor makes them: for detectors of transformers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert
from transformers.image_utils import SizeDict

from ..utils.label_checks import check_labels
from .transforms import Multiscale, Sample


class SizeForProcessor:
    """Resize an image, and its boxes with it, as its detector's image processor does it.

    Args:
        processor: of the detector; its `size` counts where nothing is drawn.
        multiscale: "none"; "range" and "choice" draw the short side for each image, from torch's global generator;
            "batch" draws height and width, which are equal, for all images of a batch.
        multiscale_short_sides: the values for these, in pixels.
    """

    def __init__(self, processor: Any, multiscale: Multiscale = "none", multiscale_short_sides: Sequence[int] = ()):
        self.processor = processor
        self.multiscale = multiscale
        self.sides = tuple(multiscale_short_sides)

    def __call__(self, sample: Sample) -> Sample:
        """The resized sample with `size`, (height, width) in pixels, and its boxes in those pixels.

        Args:
            sample: `batch_draw` is an integer that all images of a batch have in common.
        """
        image = sample["image"]
        resized = self.processor.resize(image, self._size(sample), self.processor.resample)
        (height, width), size = image.shape[-2:], tuple(resized.shape[-2:])
        sized = {**sample, "image": resized, "size": size}
        if "boxes" in sample:
            factors = torch.tensor([size[1] / width, size[0] / height]).repeat(2)
            sized["boxes"] = (sample["boxes"] * factors).clamp(min=torch.zeros(4), max=torch.tensor(size[::-1] * 2))
        return sized

    def _size(self, sample: Sample) -> SizeDict:
        given: SizeDict = self.processor.size
        if self.multiscale == "batch":
            side = self.sides[sample["batch_draw"] % len(self.sides)]
            return SizeDict(height=side, width=side)
        if self.multiscale == "range":
            return SizeDict(
                shortest_edge=int(torch.randint(self.sides[0], self.sides[1] + 1, ())), longest_edge=given.longest_edge
            )
        if self.multiscale == "choice":
            side = self.sides[int(torch.randint(len(self.sides), ()))]
            return SizeDict(shortest_edge=side, longest_edge=given.longest_edge)
        return given


@dataclass(frozen=True)
class ProcessorCollator:
    """Makes a batch from the items of a `DetectionDataset`, as detectors of transformers take it.

    Gives `pixel_values` (N, 3, H, W) and, if the processor pads, `pixel_mask` (N, H, W), and
    - for training items `labels`, a list of a dict per image: `class_labels` (G,) int64 and `boxes` (G, 4) float32,
      cxcywh relative to the image without padding;
    - for evaluation items `image_ids` (N,) int64 and `original_sizes` (N, 2) int64, (height, width).

    Args:
        processor: of the detector. The items are resized by it already.
    """

    processor: Any

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate.

        Raises:
            ValueError: no items, a mixture of training and evaluation items, or labels that `check_labels` refuses.
        """
        if len({"boxes" in item for item in items}) != 1:
            raise ValueError("a batch needs at least one item, and training items only or evaluation items only")
        batch = self.processor(
            [item["image"] for item in items], do_resize=False, input_data_format="channels_first", return_tensors="pt"
        )
        made = {name: batch[name] for name in ("pixel_values", "pixel_mask") if name in batch}
        if "boxes" in items[0]:
            return {**made, "labels": [_labels(item) for item in items]}
        image_ids = torch.tensor([item["image_id"] for item in items], dtype=torch.int64)
        original_sizes = torch.tensor([item["original_size"] for item in items], dtype=torch.int64)
        return {**made, "image_ids": image_ids, "original_sizes": original_sizes}


def _labels(item: dict[str, Any]) -> dict[str, Tensor]:
    boxes, classes = item["boxes"], item["class_labels"]
    size = torch.tensor(item["size"])
    mask = torch.ones(1, len(boxes), dtype=torch.bool)
    names = [f"image_id {item['image_id']}"]
    check_labels(boxes[None], classes[None], mask, size[None], names=names, refuse_relative=False)
    return {"class_labels": classes, "boxes": box_convert(boxes, "xyxy", "cxcywh") / size.flip(0).repeat(2)}
