"""Example pictures of a validation set: ground truth beside the detections of models."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from ..data.dataset import DetectionDataset
from ..data.transforms import resize
from ..utils.visualization import draw_boxes, label_color
from .coco_metrics import CocoEvaluator

THRESHOLD = 0.3  # detections with a lower score aren't drawn


@dataclass(frozen=True)
class Boxes:
    """What is drawn on an image.

    Attributes:
        boxes: (K, 4) xyxy in pixels of the image.
        labels: K label numbers, which give the colours.
        names: K texts.
        scores: K scores, or None for ground truth.
    """

    boxes: torch.Tensor
    labels: list[int]
    names: list[str]
    scores: list[float] | None = None


def evenly_spaced(count: int, total: int) -> list[int]:
    """At most `count` indices of `total`, so that examples aren't chosen by their results."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def example(dataset: DetectionDataset, index: int) -> tuple[int, Image.Image, Boxes, tuple[float, float]]:
    """An evaluation image as the model sees it.

    Returns:
        image id; the resized image; its ground truth; (x, y) factors from original to resized pixels.
    """
    split, item = dataset.split, dataset[index]
    image = Image.fromarray(resize(item["image"], item["size"]).permute(1, 2, 0).numpy())
    height, width = item["original_size"]
    factors = image.width / width, image.height / height
    objects = split.dataset.with_format("arrow", columns=["objects"])[index].to_pylist()[0]["objects"]
    boxes = torch.tensor(objects["bbox"], dtype=torch.float64).reshape(-1, 4)
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1) * torch.tensor(factors * 2)
    pairs = zip(objects["category"], objects["iscrowd"], strict=True)
    names = [f"{split.label_names[label]} (crowd)" if crowd else split.label_names[label] for label, crowd in pairs]
    return item["image_id"], image, Boxes(corners, objects["category"], names), factors


def predicted_boxes(
    evaluator: CocoEvaluator,
    image_id: int,
    label_names: Sequence[str],
    factors: tuple[float, float],
    threshold: float = THRESHOLD,
) -> Boxes:
    """What an evaluation found in an image, above a score.

    Args:
        evaluator: holds the detections.
        image_id: of the image.
        label_names: by label.
        factors: (x, y) from original pixels to those of the boxes; see `example`.
        threshold: a score must be above.
    """
    scores, labels, boxes = evaluator.detections_of(image_id)
    shown = scores > threshold
    classes = labels[shown].tolist()
    corners = torch.from_numpy(boxes[shown]) * torch.tensor(factors * 2)
    return Boxes(corners, classes, [label_names[label] for label in classes], scores[shown].tolist())


def with_boxes(image: Image.Image, boxes: Boxes) -> Image.Image:
    """The image with boxes, labels and scores on it."""
    colors = [label_color(label) for label in boxes.labels]
    return draw_boxes(image, boxes.boxes, boxes.names, boxes.scores, colors)
