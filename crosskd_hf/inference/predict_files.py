"""Detections of image files, written into a folder: pictures with boxes, and COCO results.

In the folder are then a picture of each image with the boxes on it, and `predictions.json`: a list of COCO results
{image_id, file_name, category_id, category, bbox, score}, bbox being [x, y, width, height] in pixels of the upright
image. Its ids are those of an annotation file, see `match_images`, or else made up, see `number_images`;
category_id is then the model's label, counted from 0.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..models.base import DenseDetector
from ..models.image_processing import DenseDetectorImageProcessor
from ..utils.escaping import printable
from ..utils.images import ImageError
from ..utils.messages import first_line
from ..utils.progress import Progress
from ..weights.loading import load_detector, load_processor
from .image_files import (
    PredictionError,
    category_ids_of,
    find_images,
    match_images,
    number_images,
    picture_names,
    read_annotated,
    relative_names,
)
from .label_files import LabelFiles, check_label_names
from .predict import check_numbers, predict, unreadable
from .prediction_writer import (
    PICTURES_FOLDER,
    PICTURES_MARKER,
    RESULTS_FILE,
    Prediction,
    PredictionWriter,
    check_prediction_folder,
    results_file,
)


@dataclass(frozen=True)
class Written:
    """What `predict_files` has written.

    Attributes:
        results: the file with the COCO results.
        pictures: the folder with the pictures, if there are some.
        detections: number of results of each written image.
        drawn: number of boxes above the threshold, of all images.
        left_out: path -> name and reason of each image that couldn't be used.
        seconds: that reading, detecting and writing took, without the loading of the model.
    """

    results: Path
    pictures: Path | None
    detections: list[int]
    drawn: int
    left_out: dict[Path, str]
    seconds: float

    def lacks_one_of(self, sources: Sequence[str]) -> bool:
        """Whether an image was left out that is a source itself, not of a folder or pattern."""
        named = {os.path.abspath(Path(source).expanduser()) for source in sources}
        return not named.isdisjoint(map(os.path.abspath, self.left_out))


def predict_files(
    model: str,
    sources: Sequence[str],
    output: str,
    *,
    recursive: bool = False,
    threshold: float = 0.3,
    json_threshold: float = 0.0,
    batch_size: int = 4,
    workers: int = 2,
    pictures: bool = True,
    format: str = "coco",
    annotations: str | None = None,
    device: str | None = None,
    stop_at_errors: bool = False,
) -> Written:
    """Write a model's predictions of image files.

    Args:
        model: folder or Hub id of a saved detector.
        sources: see `find_images`, as for `recursive`.
        output: folder of the results; it is made.
        threshold: boxes with a higher score are drawn.
        json_threshold: boxes with a higher score go into the results.
        batch_size, workers: see `predict`.
        pictures: draw them.
        format: coco for `predictions.json` alone; yolo, voc or csv for such files of the drawn boxes beside it.
        annotations: COCO instances JSON that image and category ids come from.
        device: to compute on; None is a GPU if there is one.
        stop_at_errors: end at the first image that can't be read, instead of leaving it out.

    Raises:
        PredictionError: wrong arguments, no image to read, an image that can't be read (with `stop_at_errors`), or
            results that can't be written. `predictions.json` is then as it was before.
        CheckpointError: the model or its image processor can't be loaded.
    """
    check_numbers(batch_size, workers, threshold, json_threshold)
    paths = find_images(sources, recursive)
    names = relative_names(paths)
    pictures_of = picture_names(names)
    results = Path(output) / RESULTS_FILE
    picture_folder = Path(output) / PICTURES_FOLDER if pictures else None
    check_label_names(pictures_of, format)
    earlier = results.exists()
    check_prediction_folder(output, picture_folder, paths, pictures_of)
    annotated = read_annotated(annotations) if annotations else None
    entries = match_images(paths, annotated) if annotated else number_images(names)
    detector, processor = load_for_prediction(model, device)
    id2label = detector.config.id2label
    category_ids = category_ids_of(id2label, annotated)
    entry_of, name_of = (dict(zip(paths, values, strict=True)) for values in (entries, pictures_of))
    labels = LabelFiles(Path(output), format, id2label, threshold) if format != "coco" else None
    if labels:
        labels.check(earlier)
    start = time.perf_counter()
    with results_file(results) as add_results:
        if labels:
            labels.start()
        which, thresholds = (entry_of, name_of, id2label, category_ids), (threshold, json_threshold)
        writer = PredictionWriter(add_results, picture_folder, *which, *thresholds, labels)
        predict_all = partial(predict, detector, processor, paths, batch_size=batch_size, workers=workers)
        detections, drawn, left_out = _write_all(writer, predict_all, len(paths), stop_at_errors)
    if picture_folder:
        (picture_folder / PICTURES_MARKER).unlink(missing_ok=True)  # from now on the results show it
    return Written(results, picture_folder, detections, drawn, left_out, time.perf_counter() - start)


def load_for_prediction(source: str, device: str | None) -> tuple[DenseDetector, DenseDetectorImageProcessor]:
    """A detector on a device (None is a GPU if there is one), and its image processor.

    Raises:
        PredictionError: the device can't be used.
        CheckpointError: the model or its image processor can't be loaded.
    """
    model, processor = load_detector(source), load_processor(source)
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(torch.device(name)), processor
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without CUDA
        reason = first_line(error)
        raise PredictionError(f"the device {name!r} can't be used ({reason}). Try --device cpu.") from error


def _write_all(
    writer: PredictionWriter, predict_all: Callable[..., Iterator[Prediction]], images: int, stop: bool
) -> tuple[list[int], int, dict[Path, str]]:
    """The number of results of each written image, that of all drawn boxes, and path -> name and reason of each that
    was left out.
    """
    counts: list[int] = []
    drawn = 0
    left_out: dict[Path, str] = {}

    def leave_out(path: Path, error: ImageError) -> None:
        if stop:
            raise unreadable(path, error) from error
        left_out[path] = printable(f"{path} {error}")
        bar.update()

    with Progress("predict", images, "images") as bar:
        for prediction in predict_all(on_error=leave_out):
            try:
                count, shown = writer.write(prediction)
            except ImageError as error:
                leave_out(prediction.path, error)
            else:
                counts.append(count)
                drawn += shown
                bar.update()
    if not counts:
        raise PredictionError("none of the images could be used:\n  " + "\n  ".join(left_out.values()))
    return counts, drawn, left_out
