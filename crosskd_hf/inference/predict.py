"""Detections of image files.

Used like this:

    paths = find_images(["photos", "more/*.jpg"])
    for prediction in predict(model, processor, paths):       # reads as it goes; nothing is kept
        print(prediction.path, prediction.labels, prediction.boxes)
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from ..models.base import DenseDetector
from ..models.image_processing import DenseDetectorImageProcessor
from ..utils.escaping import printable
from ..utils.images import ImageError, load_rgb
from ..utils.memory import out_of_memory_explained
from .detect import detect_images
from .image_files import PredictionError
from .prediction_writer import Prediction


class Sample(NamedTuple):
    """An image and what the model takes of it: `pixel_values` (1, 3, H, W) and `pixel_mask` (1, H, W)."""

    path: Path
    image: Image.Image
    inputs: Mapping[str, Tensor]


def predict(
    model: DenseDetector,
    processor: DenseDetectorImageProcessor,
    paths: Iterable[str | os.PathLike[str]],
    *,
    threshold: float = 0.0,
    batch_size: int = 4,
    workers: int = 2,
    on_error: Callable[[Path, ImageError], None] | None = None,
) -> Iterator[Prediction]:
    """Detections of image files, in the order of the files, read and computed while they are asked for.

    In memory are one batch that is computed and one that is read (or an image a worker, if that is more). Each image
    gets what `processor(image)` and the model give for it alone, see `detect_images`.

    Args:
        model: on the device to compute on; it is put into evaluation mode.
        processor: the model's; its thresholds and number of detections count.
        paths: image files.
        threshold: detections with a score up to this are left out.
        batch_size: images per batch.
        workers: threads that read and prepare images; with 0 none is read before it is needed.
        on_error: called with the path and the error of an image that can't be read, which is then left out. Without
            it, the first such image ends the predictions.

    Raises:
        PredictionError: an argument is out of its range; without `on_error`, an image can't be read.
    """
    check_numbers(batch_size, workers, threshold)

    def read(path: Path) -> Sample | ImageError:
        try:
            image = load_rgb(path)
        except ImageError as error:
            return error
        return Sample(path, image, processor(image, return_tensors="pt"))

    model.eval()
    batch: list[Sample] = []
    samples = _read_ahead(map(Path, paths), read, workers, max(batch_size, workers) if workers else 0)
    with contextlib.closing(samples):  # its threads end when the caller stops asking
        for path, sample in samples:
            if isinstance(sample, Sample):
                batch.append(sample)
            elif on_error is None:
                raise unreadable(path, sample) from sample
            else:
                on_error(path, sample)
            if len(batch) == batch_size:
                yield from detect(model, processor, batch, threshold)
                batch = []
    if batch:
        yield from detect(model, processor, batch, threshold)


def _read_ahead(
    paths: Iterator[Path], read: Callable[[Path], Sample | ImageError], workers: int, ahead: int
) -> Iterator[tuple[Path, Sample | ImageError]]:
    """What `read` gives for each path, in their order; up to `ahead` are read before they are asked for."""
    pending: deque[tuple[Path, Future[Sample | ImageError]]] = deque()
    pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="crosskd-read")
    try:
        for path in paths:
            pending.append((path, pool.submit(read, path)))
            if len(pending) > ahead:
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def detect(
    model: DenseDetector, processor: DenseDetectorImageProcessor, batch: Sequence[Sample], threshold: float
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


def check_numbers(batch_size: int, workers: int, *thresholds: float) -> None:
    """Raise PredictionError if a number is out of its range."""
    for threshold in thresholds:
        if not 0 <= threshold <= 1:  # NaN fails here as well
            raise PredictionError(f"a threshold must be from 0 to 1, got {threshold}")
    for name, value, minimum in (("batch size", batch_size, 1), ("number of workers", workers, 0)):
        if value < minimum:
            raise PredictionError(f"the {name} must be at least {minimum}, got {value}")


def unreadable(path: Path, error: ImageError) -> PredictionError:
    """What ends the predictions at an image that can't be read."""
    return PredictionError(f"{printable(path)} {error}: restore or remove it.")
