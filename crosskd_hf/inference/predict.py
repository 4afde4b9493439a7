"""Detections of image files: `crosskd predict MODEL SOURCE [SOURCE ...]`, and `predict` from Python.

Used like this:

    paths = find_images(["photos", "more/*.jpg"])
    for prediction in predict(model, processor, paths):       # reads as it goes; nothing is kept
        print(prediction.path, prediction.labels, prediction.boxes)

The command writes, into its output folder, a picture of each image with the boxes on it, and `predictions.json`: a
list of COCO results {image_id, file_name, category_id, category, bbox, score}, bbox being [x, y, width, height] in
pixels of the upright image. Its ids are those of an annotation file, see `match_images`, or else made up, see
`number_images`; category_id is then the model's label, counted from 0.
"""

import argparse
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..models.base import DenseDetector
from ..models.image_processing import DenseDetectorImageProcessor
from ..utils.escaping import printable
from ..utils.files import folder_problem
from ..utils.images import ImageError, load_rgb
from ..utils.memory import out_of_memory_explained
from ..utils.progress import Progress, say
from ..weights.loading import load_detector, load_processor
from .detect import detect_images
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
from .prediction_files import PICTURES_FOLDER, RESULTS_FILE, Prediction, PredictionWriter, ResultsFile, check_output

ErrorHandler = Callable[[Path, ImageError], None]


def predict(
    model: DenseDetector,
    processor: DenseDetectorImageProcessor,
    paths: Iterable[str | os.PathLike[str]],
    *,
    threshold: float = 0.0,
    batch_size: int = 4,
    workers: int = 2,
    on_error: ErrorHandler | None = None,
) -> Iterator[Prediction]:
    """Detections of image files, in the order of the files, read and computed while they are asked for.

    In memory are one batch that is computed and one that is read (or an image a worker, if that is more). Each image
    gets what `processor(image)` and the model give for it alone, see `detect_images`.

    Args:
        model: on the device to compute on; it is put into evaluation mode.
        processor: the model's; its thresholds and number of detections count.
        paths: image files.
        threshold: detections with a score up to this are left out.
        batch_size: images a batch.
        workers: threads that read and prepare images; with 0 none is read before it is needed.
        on_error: called with the path and the error of an image that can't be read, which is then left out. Without
            it, the first such image ends the predictions.

    Raises:
        PredictionError: an argument is out of its range; while iterating and without `on_error`, an image can't be
            read.
    """
    _check_numbers(batch_size, workers, threshold)
    return _predict(model, processor, paths, threshold, batch_size, workers, on_error)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `crosskd predict`."""
    parser.description = (
        f"Detections of image files. Writes OUTPUT_DIR/{RESULTS_FILE}, a list of COCO results {{image_id, file_name, "
        "category_id, category, bbox, score}, with bbox [x, y, width, height] in pixels of the upright image, and "
        f"OUTPUT_DIR/{PICTURES_FOLDER}, the images with the boxes drawn. Without --annotations, image_id is the file "
        "name's stem if all of them are different whole numbers, else 1, 2, ... in the order of the sorted paths, and "
        "category_id is the model's label, counted from 0. Pictures keep the images' names, from the folder on that "
        "all images share."
    )
    parser.add_argument("model", help="folder or Hub id of a saved detector")
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="image file, folder, or glob pattern in quotes")
    parser.add_argument("--recursive", action="store_true", help="also the images in folders of a folder")
    parser.add_argument("--output-dir", default="predictions", help="where results go (default: predictions)")
    parser.add_argument(
        "--threshold", type=float, default=0.3, help="boxes with a higher score are drawn (default: 0.3)"
    )
    parser.add_argument(
        "--json-threshold",
        type=float,
        default=0.0,
        help=f"boxes with a higher score go into {RESULTS_FILE} (default: 0, all that the model's image processor "
        "keeps; AP needs them)",
    )
    parser.add_argument("--batch-size", type=int, default=4, help="images a batch (default: 4)")
    parser.add_argument("--workers", type=int, default=2, help="threads that read images (default: 2)")
    parser.add_argument("--no-pictures", action="store_true", help=f"write {RESULTS_FILE} only")
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        help="COCO instances JSON that gives image ids by file_name and category ids by label, so that pycocotools "
        "can score the results; an image that isn't in it is an error",
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="skip",
        help="what an image that can't be read does: end the command, or be named at the end (default: skip); if it "
        "is a SOURCE itself, not of a folder or pattern, the status is then 1",
    )


def run(arguments: argparse.Namespace) -> None:
    """`crosskd predict`: see the module, and `add_arguments`.

    Raises:
        PredictionError: wrong arguments, no image to read, an image that can't be read (with `--on-error stop`), or
            results that can't be written. `predictions.json` is then as it was before.
        SystemExit: with status 1, when all else is written, if an image that is a source itself was left out.
        CheckpointError: the model or its image processor can't be loaded.
    """
    _check_numbers(arguments.batch_size, arguments.workers, arguments.threshold, arguments.json_threshold)
    paths = find_images(arguments.sources, arguments.recursive)
    names = relative_names(paths)
    output = Path(arguments.output_dir)
    pictures = None if arguments.no_pictures else output / PICTURES_FOLDER
    if problem := folder_problem(arguments.output_dir):
        raise PredictionError(f"{problem} with --output-dir.")
    check_output(output, pictures, paths, picture_names(names))
    annotated = read_annotated(arguments.annotations) if arguments.annotations else None
    entries = match_images(paths, annotated) if annotated else number_images(names)
    model, processor = _load(arguments.model, arguments.device)
    id2label = model.config.id2label
    writer = PredictionWriter(
        ResultsFile(output / RESULTS_FILE),
        pictures,
        dict(zip(paths, entries, strict=True)),
        dict(zip(paths, picture_names(names), strict=True)),
        id2label,
        category_ids_of(id2label, annotated),
        arguments.threshold,
        arguments.json_threshold,
    )
    start = time.perf_counter()
    counts, left_out = _write_all(writer, model, processor, paths, arguments)
    speed = len(counts) / (time.perf_counter() - start)
    say(f"{len(counts)} images, {sum(counts)} detections, {speed:.1f} images/s")
    say(f"written to {output / RESULTS_FILE}" + (f" and {pictures}" if pictures else ""))
    if left_out:
        print(f"{len(left_out)} of {len(paths)} images were left out:\n  " + "\n  ".join(left_out.values()))
    named = {os.path.abspath(Path(source).expanduser()) for source in arguments.sources}
    if not named.isdisjoint(map(os.path.abspath, left_out)):
        raise SystemExit(1)


@dataclass(frozen=True)
class _Sample:
    """An image and what the model takes of it: `pixel_values` (1, 3, H, W) and `pixel_mask` (1, H, W)."""

    path: Path
    image: Image.Image
    inputs: Mapping[str, Tensor]


def _predict(
    model: DenseDetector,
    processor: DenseDetectorImageProcessor,
    paths: Iterable[str | os.PathLike[str]],
    threshold: float,
    batch_size: int,
    workers: int,
    on_error: ErrorHandler | None,
) -> Iterator[Prediction]:
    def read(path: Path) -> _Sample | ImageError:
        try:
            image = load_rgb(path)
        except ImageError as error:
            return error
        return _Sample(path, image, processor(image, return_tensors="pt"))

    model.eval()
    batch: list[_Sample] = []
    samples = _read_ahead(map(Path, paths), read, workers, max(batch_size, workers) if workers else 0)
    with contextlib.closing(samples):  # its threads end when the caller stops asking
        for path, sample in samples:
            if isinstance(sample, _Sample):
                batch.append(sample)
            elif on_error is None:
                raise _unreadable(path, sample) from sample
            else:
                on_error(path, sample)
            if len(batch) == batch_size:
                yield from _detect(model, processor, batch, threshold)
                batch = []
    if batch:
        yield from _detect(model, processor, batch, threshold)


def _read_ahead(
    paths: Iterator[Path], read: Callable[[Path], _Sample | ImageError], workers: int, ahead: int
) -> Iterator[tuple[Path, _Sample | ImageError]]:
    """What `read` gives for each path, in their order; up to `ahead` are read before they are asked for."""
    pending: deque[tuple[Path, Future[_Sample | ImageError]]] = deque()
    pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="crosskd-read")
    try:
        for path in paths:
            pending.append((path, pool.submit(read, path)))
            if len(pending) > ahead:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _detect(
    model: DenseDetector, processor: DenseDetectorImageProcessor, batch: Sequence[_Sample], threshold: float
) -> list[Prediction]:
    """Predictions of a batch, in its order."""
    inputs = [sample.inputs for sample in batch]
    sizes = [(sample.image.height, sample.image.width) for sample in batch]
    shapes = sorted({tuple(sample["pixel_values"].shape[-2:]) for sample in inputs})
    images = ", ".join(f"{height} x {width}" for height, width in shapes[:5])
    advice = "lower --batch-size (batch_size)" if len(batch) > 1 else "lower the size in preprocessor_config.json"
    with out_of_memory_explained(lambda: f"a batch of {len(batch)} images of {images} pixels: {advice}"):
        detections = detect_images(model, processor, inputs, sizes, threshold)
    return [
        Prediction(sample.path, sample.image, detected["scores"], detected["labels"], detected["boxes"])
        for sample, detected in zip(batch, detections, strict=True)
    ]


def _load(source: str, device: str | None) -> tuple[DenseDetector, DenseDetectorImageProcessor]:
    model, processor = load_detector(source, None, ()), load_processor(source)
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(torch.device(name)), processor
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise PredictionError(f"the device {name!r} can't be used ({reason}). Try --device cpu.") from error


def _write_all(
    writer: "PredictionWriter",
    model: DenseDetector,
    processor: DenseDetectorImageProcessor,
    paths: Sequence[Path],
    arguments: argparse.Namespace,
) -> tuple[list[int], dict[Path, str]]:
    """The number of results of each written image, and path -> name and reason of each that was left out."""
    counts: list[int] = []
    left_out: dict[Path, str] = {}

    def leave_out(path: Path, error: ImageError) -> None:
        if arguments.on_error == "stop":
            raise _unreadable(path, error) from error
        left_out[path] = printable(f"{path} {error}")
        bar.update()

    with writer, Progress("predict", len(paths), "images") as bar:
        for prediction in predict(
            model,
            processor,
            paths,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
            on_error=leave_out,
        ):
            try:
                counts.append(writer.write(prediction))
            except ImageError as error:
                leave_out(prediction.path, error)
            else:
                bar.update()
        if not counts:  # raised in here, so that no results are written
            raise PredictionError("none of the images could be used:\n  " + "\n  ".join(left_out.values()))
    return counts, left_out


def _check_numbers(batch_size: int, workers: int, *thresholds: float) -> None:
    for threshold in thresholds:
        if not 0 <= threshold <= 1:  # NaN fails here as well
            raise PredictionError(f"a threshold must be from 0 to 1, got {threshold}")
    for name, value, minimum in (("batch size", batch_size, 1), ("number of workers", workers, 0)):
        if value < minimum:
            raise PredictionError(f"the {name} must be at least {minimum}, got {value}")


def _unreadable(path: Path, error: ImageError) -> PredictionError:
    return PredictionError(f"{printable(path)} {error}: restore or remove it.")
