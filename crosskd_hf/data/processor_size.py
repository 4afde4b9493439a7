"""Images and batches as a detector's own image processor makes them: for detectors of transformers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import SizeDict, get_image_size_for_max_height_width

from .collator import are_labelled, item_labels
from .transforms import Multiscale, Sample, draw_short_side, with_boxes_at


class SizeForProcessor:
    """Choose the size that a detector's own image processor gives an image, and give the boxes at that size.

    The image itself is resized by the processor, in the collator.

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
        """The sample with `size`, (height, width) in pixels, its boxes in those pixels, and `processor_size`, in the
        processor's terms.

        Args:
            sample: `batch_draw` is an integer that all images of a batch have in common; without one, a "batch" has
                the processor's size.
        """
        height, width = sample["image"].shape[-2:]
        wanted = self._size(sample)
        if "height" in wanted:
            size = (wanted["height"], wanted["width"])
        elif "max_height" in wanted:
            size = get_image_size_for_max_height_width((height, width), wanted["max_height"], wanted["max_width"])
        else:
            size = get_size_with_aspect_ratio((height, width), wanted["shortest_edge"], wanted["longest_edge"])
        return with_boxes_at(size, {**sample, "size": size, "processor_size": wanted}, (height, width))

    def _size(self, sample: Sample) -> dict[str, int]:
        given = plain_size(self.processor)
        if "batch_draw" in sample:
            side = self.sides[sample["batch_draw"] % len(self.sides)]
            return {"height": side, "width": side}
        drawn = draw_short_side(self.multiscale, self.sides)
        return given if drawn is None else {"shortest_edge": drawn, "longest_edge": given["longest_edge"]}


def plain_size(processor: Any) -> dict[str, int]:
    """A processor's `size` without what isn't set."""
    return {name: side for name, side in dict(processor.size).items() if side}


@dataclass(frozen=True)
class ProcessorCollator:
    """Makes a batch from the items of a `DetectionDataset`, as detectors of transformers take it.

    Gives `pixel_values` (N, 3, H, W), `pixel_mask` (N, H, W) if the processor pads, and `labels` as
    `DetectionCollator` does it: boxes are relative to the image without padding, as predictions are.
    (transformers' processors have them relative to the padded batch.)

    Args:
        processor: of the detector.
    """

    processor: Any

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate.

        Raises:
            ValueError: no items, a mixture of labelled and unlabelled ones, or labels that `check_labels` refuses.
        """
        labelled = are_labelled(items)
        images, first = [item["image"] for item in items], items[0]["processor_size"]
        size: dict[str, Any] = {"size": first}
        # Fixed sizes differ only where an epoch's last batch is filled up with another's images: the first one counts.
        if "height" not in first and any(item["processor_size"] != first for item in items):
            size = {"do_resize": False}
            sized = zip(images, items, strict=True)
            images = [self.processor.resize(image, SizeDict(**item["processor_size"])) for image, item in sized]
        batch = self.processor(images, **size, input_data_format="channels_first", return_tensors="pt")
        made = {name: batch[name] for name in ("pixel_values", "pixel_mask") if name in batch}
        if not labelled:
            return made
        labels = [item_labels(item) for item in items]
        if "height" in first:  # what an image was resized to that fills up a batch of another size
            labels = [{**label, "size": torch.tensor([first["height"], first["width"]])} for label in labels]
        return {**made, "labels": labels}
