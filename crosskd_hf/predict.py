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
import glob
import json
import os
import re
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoImageProcessor

from .data.images import ImageError, load_rgb
from .factory import load_detector
from .models.image_processing_dense import DenseDetectorImageProcessor
from .models.modeling_dense import DenseDetector
from .visualization import draw_boxes, label_color

RESULTS_FILE = "predictions.json"
PICTURES_FOLDER = "pictures"
# What is looked for in folders and by patterns. A file that is named itself may have any name.
IMAGE_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
PICTURE_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}

ErrorHandler = Callable[[Path, ImageError], None]


class PredictionError(ValueError):
    """Predictions that can't be made or written, and what to do about it."""


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


@dataclass(frozen=True)
class ImageEntry:
    """What an image is called in the results. `size` is the annotated (width, height), where there is one."""

    image_id: int
    file_name: str
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Annotated:
    """Images and category ids of a COCO file: its images by `file_name`, its category ids by name."""

    images: Mapping[str, ImageEntry]
    category_ids: Mapping[str, int]


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

    In memory are one batch that is computed and one that is read (or an image a worker, if that is more). Images of
    one batch that have the same size once resized and padded run through the model together, others one after
    another: padded to a larger neighbour, an image would get other predictions, since convolutions see the padding.
    So each image gets what `processor(image)` and the model give for it alone, up to the rounding of batched kernels
    (1e-6 of a score).

    Args:
        model: on the device to compute on; it is put into evaluation mode.
        processor: the model's; its thresholds and number of detections count.
        paths: image files.
        threshold: detections with a score up to this are left out.
        batch_size: images a batch.
        workers: threads that read and prepare images; 0 reads them in between.
        on_error: called with the path and the error of an image that can't be read, which is then left out. Without
            it, the first such image ends the predictions.

    Raises:
        PredictionError: an argument is out of its range; while iterating and without `on_error`, an image can't be
            read.
    """
    _check_numbers(batch_size, workers, threshold)
    return _predict(model, processor, paths, threshold, batch_size, workers, on_error)


def find_images(sources: Sequence[str], recursive: bool = False) -> list[Path]:
    """The image files that sources name, sorted and each once.

    Args:
        sources: image files; folders, whose images are taken; and glob patterns, in which `**` stands for folders.
            Folders and patterns find names that end as `IMAGE_EXTENSIONS` do, in any case, and don't begin with a dot.
        recursive: take the images in folders of folders, too.

    Raises:
        PredictionError: a source that matches no image, or a folder that can't be listed.
    """
    found: dict[str, Path] = {}
    for source in sources:
        for path in _matches(source, recursive):
            found.setdefault(os.path.abspath(path), path)
    return sorted(found.values())


def number_images(names: Sequence[str]) -> list[ImageEntry]:
    """Image ids without an annotation file.

    They are the file names' stems if all of them are different whole numbers (000000397133.jpg is image 397133), as in
    COCO; otherwise 1, 2, ... in the order of the names.
    """
    stems = [PurePath(name).stem for name in names]
    numbers = [int(stem) for stem in stems if re.fullmatch("[0-9]+", stem)]
    ids = numbers if len(set(numbers)) == len(names) else range(1, len(names) + 1)
    return [ImageEntry(image_id, name) for image_id, name in zip(ids, names, strict=True)]


def read_annotated(path: str | os.PathLike[str]) -> Annotated:
    """The images and the categories of a COCO instances file. Its annotations are not looked at.

    Raises:
        PredictionError: the file is missing, no JSON or no COCO file, or lists a name twice.
    """
    try:
        with open(path, "rb") as file:
            content = json.load(file)
    except OSError as error:
        raise PredictionError(f"the annotation file {path} can't be read ({_words(error)}).") from error
    except ValueError as error:
        raise PredictionError(f"the annotation file {path} is no JSON ({error}).") from error
    try:
        images = [
            ImageEntry(image["id"], image["file_name"], (image["width"], image["height"]))
            for image in content["images"]
        ]
        categories = [(category["name"], category["id"]) for category in content["categories"]]
    except (KeyError, TypeError) as error:
        raise PredictionError(
            f"{path} is no COCO instances file: it needs a list of images with id, file_name, width and height, and a "
            f"list of categories with id and name ({type(error).__name__}: {error})."
        ) from error
    for what, names in (
        ("file_name", [image.file_name for image in images]),
        ("category", [name for name, _ in categories]),
    ):
        if twice := _first_repeated(names):
            raise PredictionError(f"{path} lists the {what} {twice!r} twice, so that its id is open.")
    return Annotated({image.file_name: image for image in images}, dict(categories))


def match_images(paths: Sequence[Path], annotated: Annotated) -> list[ImageEntry]:
    """The annotated image of each file.

    A file is the image whose `file_name` is the end of its path; of several, the longest.

    Raises:
        PredictionError: a file that isn't annotated, or two files of one image.
    """
    entries, owners = [], {}
    for path in paths:
        parts = Path(os.path.abspath(path)).parts[1:]
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        entry = next((annotated.images[end] for end in ends if end in annotated.images), None)
        if entry is None:
            raise PredictionError(
                f"{path} is not an image of the annotation file: no file_name in it is the end of this path. "
                "Leave the image out, or name the annotation file that lists it."
            )
        if (first := owners.setdefault(entry.file_name, path)) is not path:
            raise PredictionError(f"{first} and {path} are both {entry.file_name!r} of the annotation file.")
        entries.append(entry)
    return entries


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
        help="what an image that can't be read does: end the command, or be named at the end (default: skip)",
    )


def run(arguments: argparse.Namespace) -> None:
    """`crosskd predict`: see the module, and `add_arguments`.

    Raises:
        PredictionError: wrong arguments, no image to read, an image that can't be read (with `--on-error stop`), or
            results that can't be written. `predictions.json` is then as it was before.
        CheckpointError: the model can't be loaded.
    """
    _check_numbers(arguments.batch_size, arguments.workers, arguments.threshold, arguments.json_threshold)
    paths = find_images(arguments.sources, arguments.recursive)
    names = _relative_names(paths)
    output = Path(arguments.output_dir)
    pictures = None if arguments.no_pictures else output / PICTURES_FOLDER
    _check_output(output, pictures, paths)
    annotated = read_annotated(arguments.annotations) if arguments.annotations else None
    entries = match_images(paths, annotated) if annotated else number_images(names)
    model, processor = _load(arguments.model, arguments.device)
    id2label = model.config.id2label
    writer = _Writer(
        _ResultsFile(output / RESULTS_FILE),
        pictures,
        dict(zip(paths, entries, strict=True)),
        dict(zip(paths, _picture_names(names), strict=True)),
        id2label,
        _category_ids(id2label, annotated),
        arguments.threshold,
        arguments.json_threshold,
    )
    start = time.perf_counter()
    counts, left_out = _write_all(writer, model, processor, paths, arguments)
    speed = len(counts) / (time.perf_counter() - start)
    print(f"{len(counts)} images, {sum(counts)} detections, {speed:.1f} images/s")
    print(f"written to {output / RESULTS_FILE}" + (f" and {pictures}" if pictures else ""))
    if left_out:
        print(f"{len(left_out)} of {len(paths)} images were left out:\n  " + "\n  ".join(left_out))


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
    samples = _read_ahead(map(Path, paths), read, workers, max(batch_size, workers))
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
    if workers == 0:
        for path in paths:
            yield path, read(path)
        return
    pending: deque[tuple[Path, Future[_Sample | ImageError]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="crosskd-read")
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
    """Predictions of a batch, in its order; images of one padded size go through the model together."""
    groups: dict[torch.Size, list[int]] = defaultdict(list)
    for index, sample in enumerate(batch):
        groups[sample.inputs["pixel_values"].shape].append(index)
    found: dict[int, Prediction] = {}
    for indices in groups.values():
        group = [batch[index] for index in indices]
        inputs = {
            name: torch.cat([sample.inputs[name] for sample in group]).to(model.device)
            for name in ("pixel_values", "pixel_mask")
        }
        with torch.inference_mode():
            outputs = model(**inputs)
            sizes = [(sample.image.height, sample.image.width) for sample in group]
            detections = processor.post_process_object_detection(outputs, threshold, sizes)
        for index, sample, detected in zip(indices, group, detections, strict=True):
            scores, labels, boxes = (detected[name].cpu() for name in ("scores", "labels", "boxes"))
            found[index] = Prediction(sample.path, sample.image, scores, labels, boxes)
    return [found[index] for index in range(len(batch))]


def _load(source: str, device: str | None) -> tuple[DenseDetector, DenseDetectorImageProcessor]:
    model = load_detector(source, None, ())
    try:
        processor = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise PredictionError(
            f"{source!r} has no image processor that can be read ({_words(error)}). Save it beside the model with "
            "DenseDetectorImageProcessor.for_model(model.config).save_pretrained(...)."
        ) from error
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(torch.device(name)), processor
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise PredictionError(f"the device {name!r} can't be used ({reason}). Try --device cpu.") from error


def _write_all(
    writer: "_Writer",
    model: DenseDetector,
    processor: DenseDetectorImageProcessor,
    paths: Sequence[Path],
    arguments: argparse.Namespace,
) -> tuple[list[int], list[str]]:
    """The number of results of each written image, and the name and reason of each that was left out."""
    counts: list[int] = []
    left_out: list[str] = []

    def leave_out(path: Path, error: ImageError) -> None:
        if arguments.on_error == "stop":
            raise _unreadable(path, error) from error
        left_out.append(f"{path} {error}")
        bar.update()

    # The bar is for terminals; in a log file, the summary says the same.
    with writer.results, tqdm(total=len(paths), unit="img", desc="predict", disable=None) as bar:
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
            raise PredictionError("none of the images could be used:\n  " + "\n  ".join(left_out))
    return counts, left_out


def _category_ids(id2label: Mapping[int, str], annotated: Annotated | None) -> dict[int, int]:
    """The COCO category id of each label."""
    if annotated is None:
        return {label: label for label in id2label}
    known = annotated.category_ids
    if unknown := [name for name in id2label.values() if name not in known]:
        raise PredictionError(
            f"the model has {len(unknown)} labels that aren't categories of the annotation file, such as "
            f"{unknown[0]!r}; its categories are {', '.join(list(known)[:8])}. Leave --annotations out, or rename one."
        )
    return {label: known[name] for label, name in id2label.items()}


def _matches(source: str, recursive: bool) -> list[Path]:
    path = Path(source).expanduser()
    endings = " ".join(IMAGE_EXTENSIONS)
    if path.is_dir():
        images = _images_in(path, recursive)
        hint = "" if recursive else "; --recursive looks into its folders, too"
        if not images:
            raise PredictionError(f"the folder {source} holds no images ({endings}){hint}.")
        return images
    if path.exists():
        return [path]
    if not glob.has_magic(source):
        raise PredictionError(f"there is no file or folder {source}: give an image, a folder, or a pattern in quotes.")
    images = [Path(match) for match in glob.glob(str(path), recursive=True) if _is_image_name(match)]
    images = [image for image in images if image.is_file()]
    if not images:
        raise PredictionError(f"the pattern {source} matches no images ({endings}).")
    return images


def _images_in(folder: Path, recursive: bool) -> list[Path]:
    def fail(error: OSError) -> None:
        raise PredictionError(f"the folder {error.filename} can't be listed ({_words(error)}).") from error

    images: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=fail):
        images += [Path(place, name) for name in files if _is_image_name(name)]
        if not recursive:
            folders.clear()
    return images


def _is_image_name(name: str) -> bool:
    path = PurePath(name)
    return path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")


def _relative_names(paths: Sequence[Path]) -> list[str]:
    """Names from the deepest folder on that all files share: different, since the paths are."""
    absolute = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [Path(os.path.relpath(path, root)).as_posix() for path in absolute]


def _picture_names(names: Sequence[str]) -> list[str]:
    """The names of pictures: those of the images, with .png added where it isn't a format that pictures have."""
    taken = set(names)
    pictures = []
    for name in names:
        picture = name
        if PurePath(name).suffix.lower() not in PICTURE_FORMATS:
            picture += ".png"
            while picture in taken:  # x.bmp beside an image x.bmp.png
                picture += ".png"
            taken.add(picture)
        pictures.append(picture)
    return pictures


def _save(picture: Image.Image, path: Path) -> None:
    """Write a picture; a file is there complete or not at all."""
    temporary = _temporary(path)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            picture.save(temporary, format=PICTURE_FORMATS[path.suffix.lower()])
            os.replace(temporary, path)  # also takes the place of a link, instead of writing to what it points to
        finally:
            temporary.unlink(missing_ok=True)  # there only if one of these failed


class _ResultsFile:
    """A JSON list that is written item by item, and takes its place when the block ends without an error."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = _temporary(path)
        self._separator = "[\n"

    def __enter__(self) -> "_ResultsFile":
        with _writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("w", encoding="utf-8")
        return self

    def add(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Append items."""
        with _writing(self._path):
            for item in items:
                self._file.write(self._separator + json.dumps(item))
                self._separator = ",\n"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with _writing(self._path):
                    self._file.write("[]\n" if self._separator == "[\n" else "\n]\n")
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._file.close()
                    os.replace(self._temporary, self._path)
        finally:
            with contextlib.suppress(OSError):  # a full disk fails again here
                self._file.close()
            self._temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Writer:
    """Where predictions go.

    Attributes:
        results: open while `write` is called.
        pictures: folder, or None for no pictures.
        entries, picture_names: of each image.
        id2label, category_ids: names and COCO category ids of the model's labels.
        threshold, json_threshold: of what is drawn, and of what goes into the results.
    """

    results: _ResultsFile
    pictures: Path | None
    entries: Mapping[Path, ImageEntry]
    picture_names: Mapping[Path, str]
    id2label: Mapping[int, str]
    category_ids: Mapping[int, int]
    threshold: float
    json_threshold: float

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


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PredictionError(
            f"{path} can't be written ({_words(error)}). Make room, or name another folder with --output-dir."
        ) from error


def _check_output(output: Path, pictures: Path | None, paths: Sequence[Path]) -> None:
    for folder in filter(None, (output, pictures)):
        if folder.exists() and not folder.is_dir():
            raise PredictionError(f"{folder} is a file: name a folder with --output-dir.")
    if pictures is None:
        return
    place = pictures.resolve()
    for path in paths:
        if path.resolve().is_relative_to(place):
            raise PredictionError(
                f"the image {path} lies where pictures are written, and could be overwritten: name another folder "
                "with --output-dir, or use --no-pictures."
            )


def _check_numbers(batch_size: int, workers: int, *thresholds: float) -> None:
    for threshold in thresholds:
        if not 0 <= threshold <= 1:  # NaN fails here as well
            raise PredictionError(f"a threshold must be from 0 to 1, got {threshold}")
    for name, value, minimum in (("batch size", batch_size, 1), ("number of workers", workers, 0)):
        if value < minimum:
            raise PredictionError(f"the {name} must be at least {minimum}, got {value}")


def _unreadable(path: Path, error: ImageError) -> PredictionError:
    return PredictionError(f"{path} {error}: restore or remove it.")


def _first_repeated(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _words(error: Exception) -> str:
    """An error's own words, without number and file name."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]
