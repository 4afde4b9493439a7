"""What `crosskd predict` writes: COCO results, complete or not at all, and pictures with boxes."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
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


def _save(picture: Image.Image, path: Path) -> None:
    """Write a picture; a file is there complete or not at all."""
    with _writing(path), replacing(path, flush=False) as temporary:
        picture.save(temporary, format=PICTURE_FORMATS[path.suffix.lower()])


class ResultsFile:
    """A JSON list that is written item by item, and takes its place when the block ends without an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._separator = "[\n"

    def __enter__(self) -> "ResultsFile":
        with _writing(self._path), contextlib.ExitStack() as stack:
            temporary = stack.enter_context(replacing(self._path))
            self._file = stack.enter_context(temporary.open("w", encoding="utf-8"))
            self._stack = stack.pop_all()
        return self

    def add(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Append items."""
        with _writing(self._path):
            for item in items:
                self._file.write(self._separator + json.dumps(item))
                self._separator = ",\n"

    def __exit__(self, *raised: Any) -> None:
        if raised[0] is not None:
            with contextlib.suppress(OSError):  # a full disk fails again here
                self._stack.__exit__(*raised)
            return
        with _writing(self._path), self._stack:
            self._file.write("[]\n" if self._separator == "[\n" else "\n]\n")


@dataclass(frozen=True)
class PredictionWriter:
    """Where predictions go.

    Attributes:
        results: opened and closed with the writer.
        pictures: folder, or None for no pictures.
        entries, picture_names: of each image.
        id2label, category_ids: names and COCO category ids of the model's labels.
        threshold, json_threshold: of what is drawn, and of what goes into the results.
    """

    results: ResultsFile
    pictures: Path | None
    entries: Mapping[Path, ImageEntry]
    picture_names: Mapping[Path, str]
    id2label: Mapping[int, str]
    category_ids: Mapping[int, int]
    threshold: float
    json_threshold: float

    def __enter__(self) -> "PredictionWriter":
        self.results.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.results.__exit__(*raised)
        if raised[0] is None and self.pictures:
            (self.pictures / PICTURES_MARKER).unlink(missing_ok=True)  # from now on the results show it

    def write(self, prediction: Prediction) -> int:
        """Write the results and the picture of an image: the number of results.

        Raises:
            ImageError: the image doesn't have its annotated size; nothing is written.
            PredictionError: the disk doesn't take it.
        """
        entry = self.entries[prediction.path]
        if entry.size is not None and prediction.image.size != entry.size:
            (width, height), (listed_width, listed_height) = prediction.image.size, entry.size
            raise ImageError(
                f"is {width} x {height} pixels, but the annotation file says {listed_width} x {listed_height}"
            )
        rows = coco_results(prediction, entry, self.id2label, self.category_ids, self.json_threshold)
        self.results.add(rows)
        if self.pictures:
            _save(self._picture(prediction), self.pictures / self.picture_names[prediction.path])
            with _writing(self.pictures):
                (self.pictures / PICTURES_MARKER).touch()
        return len(rows)

    def _picture(self, prediction: Prediction) -> Image.Image:
        keep = prediction.scores > self.threshold
        labels = prediction.labels[keep].tolist()
        return draw_boxes(
            prediction.image,
            prediction.boxes[keep],
            [self.id2label[label] for label in labels],
            prediction.scores[keep].tolist(),
            [label_color(label) for label in labels],
        )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PredictionError(
            f"{path} can't be written ({words(error)}). Make room, or name another folder with --output-dir."
        ) from error


def check_output(output: Path, pictures: Path | None, paths: Sequence[Path], names: Sequence[str] = ()) -> None:
    """Refuse folders that can't be written to, and to write over what isn't of an earlier call; name what is.

    Args:
        output: where predictions are written.
        pictures: where pictures are, or None for none.
        paths: of the images.
        names: of the pictures that will be written.

    Raises:
        PredictionError: naming what stands in the way.
    """
    for folder in filter(None, (output, pictures)):
        if problem := folder_problem(str(folder)):
            raise PredictionError(f"{problem} with --output-dir.")
    results = output / RESULTS_FILE
    if earlier := results.exists():
        with open(results, "rb") as file:
            start = file.read(100)
        if not re.match(rb'\[\s*(\]|\{"image_id": )', start):
            raise PredictionError(f"{results} is no file of this command: name another folder with --output-dir.")
        say(f"{results} is of an earlier call, and will be replaced")
    if pictures is None:
        return
    place = pictures.resolve()
    for path in paths:
        if path.resolve().is_relative_to(place):
            raise PredictionError(
                f"the image {path} lies where pictures are written, and could be overwritten: name another folder "
                "with --output-dir, or use --no-pictures."
            )
    there = {p.relative_to(pictures).as_posix() for p in pictures.rglob("*") if p.is_file() and not p.is_symlink()}
    there.discard(PICTURES_MARKER)
    of_earlier_call = earlier or (pictures / PICTURES_MARKER).exists()
    if not of_earlier_call and (lost := sorted(there.intersection(names))):
        raise PredictionError(
            f"{pictures} isn't of an earlier call, and holds pictures that would be written over, such as {lost[0]}: "
            "name another folder with --output-dir, or use --no-pictures."
        )
    if other := sorted(there.difference(names)):
        say(f"{pictures} holds {len(other)} other pictures, such as {other[0]}: they stay beside the new ones")
