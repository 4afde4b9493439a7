"""Items -> batch: resized, with the pixels made by the image processor, whose code inference runs, too."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchvision.ops import box_convert

from ..data.transforms import resize
from ..utils.label_checks import check_labels

MIN_PADDED_BOXES = 8


@dataclass(frozen=True)
class DetectionCollator:
    """Makes a batch from the items of a `DetectionDataset`.

    Gives `pixel_values` (N, 3, H, W) float32, `pixel_mask` (N, H, W) bool and, unless the items are unlabelled,
    `labels`: a dict per image with `class_labels` (G,) int64, `boxes` (G, 4) float32 cxcywh, relative to the image
    without padding, `image_id` (1,), and `size` and `orig_size` (2,) int64, (height, width) resized and in the file.

    Args:
        padded: make one dict of the batch instead, with the boxes padded, in pixels: `class_labels` (N, G),
            `boxes_xyxy` (N, G, 4), `mask` (N, G) bool, True for real boxes, `image_id` (N,), `size` and `orig_size`
            (N, 2). Padded here, in the loader's workers, and to few different lengths, boxes cost the model nothing
            that grows with the images of a batch, and a compiled model is one program for any number of boxes.
        processor: whose `normalize_and_pad` gives `pixel_values` and `pixel_mask` of resized (3, h, w) uint8 images.
        normalize: False leaves that to `finish`, on the device that trains. Then `pixel_values` are (N, 3, H, W) uint8
            with H and W the largest of the batch, and instead of the mask there are `pixel_sizes` (N, 2), (height,
            width): a sixth of the bytes for a worker to write and send.
    """

    processor: Any
    normalize: bool = True
    padded: bool = False

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate.

        Raises:
            ValueError: no items, a mixture of labelled and unlabelled ones, or labels that `check_labels` refuses.
        """
        labelled = are_labelled(items)
        batch = _resize_and_stack(items)
        if self.normalize:
            sizes = (item["size"] for item in items)
            images = [image[:, :h, :w] for image, (h, w) in zip(batch["pixel_values"], sizes, strict=True)]
            batch = dict(self.processor.normalize_and_pad(images))
        if not labelled:
            return batch
        return {**batch, "labels": _padded_labels(items) if self.padded else [item_labels(item) for item in items]}

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch made with `normalize=False` as it is with True, on the batch's device and without waiting for it."""
        stacked, sizes = batch["pixel_values"], batch["pixel_sizes"]
        height, width = stacked.shape[-2:]
        rows, columns = (torch.arange(n, device=stacked.device) for n in (height, width))
        inside = (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None]
        made = self.processor.normalize_and_pad(list(stacked))
        made["pixel_values"][..., :height, :width].masked_fill_(~inside[:, None], 0)
        made["pixel_mask"][:, :height, :width] = inside
        return {**made, **{name: value for name, value in batch.items() if not name.startswith("pixel_")}}


def are_labelled(items: Sequence[Mapping[str, Any]]) -> bool:
    """Whether items have boxes, if only none.

    Raises:
        ValueError: no items, or a mixture.
    """
    kinds = {"boxes" in item for item in items}
    if len(kinds) != 1:
        raise ValueError("a batch needs at least one item, and labelled items only or unlabelled items only")
    return kinds.pop()


def item_labels(item: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Labels of an item as DETR's are; see `DetectionCollator`.

    Raises:
        ValueError: see `check_labels`.
    """
    boxes, classes, size = item["boxes"], item["class_labels"], torch.tensor(item["size"])
    mask = torch.ones(1, len(boxes), dtype=torch.bool)
    check_labels(boxes[None], classes[None], mask, size[None], names=[f"image_id {item['image_id']}"])
    return {
        "class_labels": classes,
        "boxes": box_convert(boxes, "xyxy", "cxcywh") / size.flip(0).repeat(2),
        "image_id": torch.tensor([item["image_id"]]),
        "size": size,
        "orig_size": torch.tensor(item["original_size"]),
    }


def _resize_and_stack(items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Resized one after another and copied at once, each into the memory that the one before has just left.

    To resize all and then stack them takes a tenth of the loader's time more, spent on waiting for memory.
    """
    height, width = (max(sides) for sides in zip(*(item["size"] for item in items), strict=True))
    # Channels last, as images are decoded and resized: copied row by row.
    stacked = torch.empty((len(items), height, width, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    for item, target in zip(items, stacked, strict=True):
        h, w = item["size"]
        target[:, :h, :w] = resize(item["image"], (h, w))
        target[:, :h, w:] = 0
        target[:, h:] = 0
    return {"pixel_values": stacked, "pixel_sizes": torch.tensor([item["size"] for item in items])}


def padded_number(boxes: int) -> int:
    """The next power of two, at least `MIN_PADDED_BOXES`."""
    return max(MIN_PADDED_BOXES, 1 << max(boxes - 1, 0).bit_length())


def _padded_labels(items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    counts = torch.tensor([len(item["boxes"]) for item in items])
    length = padded_number(int(counts.max()))
    boxes, classes = torch.zeros(len(items), length, 4), torch.zeros(len(items), length, dtype=torch.int64)
    for i, item in enumerate(items):
        boxes[i, : counts[i]] = item["boxes"]
        classes[i, : counts[i]] = item["class_labels"]
    mask, sizes = torch.arange(length) < counts[:, None], torch.tensor([item["size"] for item in items])
    names = [f"image {i} (image_id {item['image_id']})" for i, item in enumerate(items)]
    # Here, in the loader's workers, it costs no step its time.
    check_labels(boxes, classes, mask, sizes, names=names)
    return {
        "class_labels": classes,
        "boxes_xyxy": boxes,
        "mask": mask,
        "image_id": torch.tensor([item["image_id"] for item in items]),
        "size": sizes,
        "orig_size": torch.tensor([item["original_size"] for item in items]),
    }
