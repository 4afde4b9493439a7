"""Data sets of image files and annotation files: what the readers of all formats have in common."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import datasets

from ..utils.images import IMAGE_EXTENSIONS
from .cache import CacheDir, cached_rows
from .checks import ImageRecord, arrow_row, cache_note, check_records, read_cache_note
from .errors import Problems
from .split import DetectionSplit, detection_features


@dataclass(frozen=True)
class Annotations:
    """What a reader makes of annotation files.

    Attributes:
        records: an image each.
        paths: of the image files.
        categories: the format's number of each class -> its name, by label.
    """

    records: list[ImageRecord]
    paths: list[str]
    categories: dict[int, str]


def split_of_files(
    read: Callable[[Problems], Annotations],
    split: str,
    source: Path,
    *,
    name: str,
    where: str,
    made_from: tuple,
    on_error: str,
    cache_dir: CacheDir,
    box_format: str = "xywh",
    box_unit: str = "pixel",
) -> DetectionSplit:
    """A split of checked annotations and paths of images, from the Arrow cache where nothing has changed.

    Args:
        read: reads the annotations; notes what is wrong with single ones.
        split, source: its name, and the folder that it is read from.
        name: of the cache.
        where: what messages call the annotations.
        made_from: all that they depend on, see `cached_rows`.
        on_error, box_format, box_unit: see `check_records`.
        cache_dir: see `open_cache`.

    Raises:
        DataError: see `check_records`.
        CacheError: see `open_cache`.
    """

    def make_rows() -> tuple[datasets.Features, str, Iterator[dict[str, Any]]]:
        problems = Problems()
        read_in = read(problems)
        checked = check_records(read_in.records, read_in.paths, problems, where, on_error, box_format, box_unit)
        # Paths instead of pixels.
        rows = ({**arrow_row(r), "image": {"path": read_in.paths[i], "bytes": None}} for i, r in checked)
        names = list(read_in.categories.values())
        return detection_features(names), cache_note(read_in.categories, problems), rows

    dataset = cached_rows(name, (*made_from, where, on_error), make_rows, cache_dir)
    names = tuple(dataset.features["objects"]["category"].feature.names)
    category_ids, problems = read_cache_note(dataset.info, where)
    return DetectionSplit(dataset, names, category_ids, problems, split, str(source))


def files_hash(folder: Path) -> str:
    """Changes when a file below the folder is written, added or removed."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        status = path.stat()
        digest.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def contents_hash(contents: Iterable[tuple[str, bytes]]) -> str:
    """Of files' names and contents."""
    digest = hashlib.blake2b(digest_size=16)
    for name, content in contents:
        digest.update(f"{name} {len(content)}\n".encode(errors="surrogatepass"))
        digest.update(content)
    return digest.hexdigest()


def leaves_folder(file_name: str) -> bool:
    """Whether a relative name is none, on any system; one that no system can open isn't either."""
    paths = PurePosixPath(file_name), PureWindowsPath(file_name)
    return "\0" in file_name or any(path.is_absolute() or ".." in path.parts for path in paths)


def images_in(folder: Path) -> list[Path]:
    """Image files in a folder and its folders, sorted; hidden ones aren't counted."""
    files = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    return sorted(f for f in files if f.suffix.lower() in IMAGE_EXTENSIONS and not f.name.startswith("."))


def images_by_stem(folder: Path) -> dict[str, Path]:
    """The image files right in a folder by their names without the extension; of two with one name the first."""
    files = sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []
    return {path.stem: path for path in files if path.suffix.lower() in IMAGE_EXTENSIONS}
