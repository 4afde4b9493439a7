"""What `crosskd predict` writes: COCO results, complete or not at all, and pictures with boxes."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..utils.files import folder_problem, replacing
from ..utils.images import ImageError
from ..utils.progress import say
from ..utils.visualization import draw_boxes, label_color
from .image_files import PICTURE_FORMATS, ImageEntry, PredictionError, words
from .label_files import LabelFiles

RESULTS_FILE = "predictions.json"
PICTURES_FOLDER = "pictures"
PICTURES_MARKER = ".crosskd_predict"  # beside the pictures of a call that was interrupted, which left no results


@dataclass(frozen=True)
class Prediction:
    """The K detections of an image, best first, on the CPU.

    Attributes:
        path: of the image file.
        image: what was read: upright, 8-bit RGB.
        scores: (K,).
        labels: (K,) int64, the model's.
        boxes: (K, 4) xyxy in pixels of `image`.
    """

    path: Path
    image: Image.Image
    scores: Tensor
    labels: Tensor
    boxes: Tensor


def coco_results(
    prediction: Prediction,
    entry: ImageEntry,
    id2label: Mapping[int, str],
    category_ids: Mapping[int, int],
    threshold: float = 0.0,
) -> list[dict[str, Any]]:
    """The detections above a threshold in COCO's result format; boxes with 3 decimals, scores with 8."""
    keep = prediction.scores > threshold
    boxes = prediction.boxes[keep].double()  # before subtracting: the width of float32 corners is then exact
    boxes_xywh = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    return [
        {
            "image_id": entry.image_id,
            "file_name": entry.file_name,
            "category_id": category_ids[label],
            "category": id2label[label],
            "bbox": [round(value, 3) for value in box],
            "score": round(score, 8),
        }
        for score, label, box in zip(
            prediction.scores[keep].tolist(), prediction.labels[keep].tolist(), boxes_xywh, strict=True
        )
    ]


@contextlib.contextmanager
def results_file(path: Path) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], None]]:
    """A JSON list, that takes its place when the block ends without an error. Gives the function that appends items.

    Raises:
        PredictionError: it can't be written.
    """
    separator = "[\n"
    with _writing(path), replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:

        def add(items: Sequence[Mapping[str, Any]]) -> None:
            nonlocal separator
            for item in items:
                file.write(separator + json.dumps(item))
                separator = ",\n"

        yield add
        file.write("[]\n" if separator == "[\n" else "\n]\n")


@dataclass(frozen=True)
class PredictionWriter:
    """Where predictions go.

    Attributes:
        add_results: appends to the results.
        pictures: folder, or None for no pictures.
        entries, picture_names: of each image.
        id2label, category_ids: names and COCO category ids of the model's labels.
        threshold, json_threshold: of what is drawn, and of what goes into the results.
        labels: further files, or None for none.
    """

    add_results: Callable[[Sequence[Mapping[str, Any]]], None]
    pictures: Path | None
    entries: Mapping[Path, ImageEntry]
    picture_names: Mapping[Path, str]
    id2label: Mapping[int, str]
    category_ids: Mapping[int, int]
    threshold: float
    json_threshold: float
    labels: LabelFiles | None = None

    def write(self, prediction: Prediction) -> tuple[int, int]:
        """Write the results and the picture of an image: the number of results, and of those above `threshold`.

        Raises:
            ImageError: the image doesn't have its annotated size; nothing is written.
            PredictionError: the disk doesn't take it.
        """
        entry = self.entries[prediction.path]
        if entry.size is not None and prediction.image.size != entry.size:
            size, listed = (f"{width} x {height}" for width, height in (prediction.image.size, entry.size))
            raise ImageError(f"is {size} pixels, but the annotation file says {listed}")
        rows = coco_results(prediction, entry, self.id2label, self.category_ids, self.json_threshold)
        self.add_results(rows)
        if self.pictures:
            picture = draw_prediction(prediction, self.id2label, self.threshold)
            path = self.pictures / self.picture_names[prediction.path]
            with _writing(path), replacing(path, flush=False) as temporary:
                picture.save(temporary, format=PICTURE_FORMATS[path.suffix.lower()])
                (self.pictures / PICTURES_MARKER).touch()
        if self.labels:
            with _writing(self.labels.output):
                self.labels.write(prediction, self.picture_names[prediction.path])
        return len(rows), int((prediction.scores > self.threshold).sum())


def draw_prediction(prediction: Prediction, id2label: Mapping[int, str], threshold: float) -> Image.Image:
    """The image with the boxes above a threshold; see `draw_boxes`."""
    keep = prediction.scores > threshold
    labels = prediction.labels[keep].tolist()
    names, colors = [id2label[label] for label in labels], [label_color(label) for label in labels]
    return draw_boxes(prediction.image, prediction.boxes[keep], names, prediction.scores[keep].tolist(), colors)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PredictionError(
            f"{path} can't be written ({words(error)}). Make room, or name another folder with --output-dir."
        ) from error


def check_prediction_folder(output: str, pictures: Path | None, paths: Sequence[Path], names: Sequence[str]) -> None:
    """Refuse folders that can't be written to, and to write over what isn't of an earlier call; name what is.

    Args:
        output: where predictions are written.
        pictures: where pictures are, or None for none.
        paths: of the images.
        names: of the pictures that will be written.

    Raises:
        PredictionError: naming what stands in the way.
    """
    for folder in (output, *([str(pictures)] if pictures else [])):
        if problem := folder_problem(folder):
            raise PredictionError(f"{problem} with --output-dir.")
    results = Path(output) / RESULTS_FILE
    if earlier := results.exists():
        with open(results, "rb") as file:
            start = file.read(100)
        if not re.match(rb'\[\s*(\]|\{"image_id": )', start):
            raise PredictionError(f"{results} is no file of this command: name another folder with --output-dir.")
        say(f"{results} is of an earlier call: this one replaces it at its end")
    if pictures is None:
        return
    if inside := [path for path in paths if path.resolve().is_relative_to(pictures.resolve())]:
        raise PredictionError(
            f"the image {inside[0]} lies where pictures are written, and could be overwritten: name another folder "
            "with --output-dir, or use --no-pictures."
        )
    there = {p.relative_to(pictures).as_posix() for p in pictures.rglob("*") if p.is_file() and not p.is_symlink()}
    of_earlier_call = earlier or PICTURES_MARKER in there
    there.discard(PICTURES_MARKER)
    if not of_earlier_call and (lost := sorted(there.intersection(names))):
        raise PredictionError(
            f"{pictures} isn't of an earlier call, and holds pictures that would be written over, such as {lost[0]}: "
            "name another folder with --output-dir, or use --no-pictures."
        )
    if other := sorted(there.difference(names)):
        say(f"{pictures} holds {len(other)} other pictures, such as {other[0]}: they stay beside the new ones")
