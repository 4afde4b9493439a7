"""Ultralytics' YOLO format, also as Roboflow exports it: `data.yaml`, folders `images` and `labels`.

A label file has a line per box, `class cx cy w h` in parts of the image as people see it (EXIF orientation), or per
outline, `class x1 y1 x2 y2 ...`, of which the bounds are taken. An image without a label file has no box.
"""

import os
from pathlib import Path
from typing import Any

import yaml

from .annotation_files import Annotations, contents_hash, files_hash, images_in, split_of_files
from .cache import CacheDir
from .checks import ImageRecord, ObjectRecord
from .errors import DataError, Kind, Problems
from .split import DetectionSplit, no_such_split, split_and_part

VALIDATION = ("val", "valid", "validation")  # names of one split


def load_yolo(
    path: str | os.PathLike[str], split: str, *, on_error: str = "stop", cache_dir: CacheDir = None
) -> DetectionSplit:
    """Load one split of a data set in YOLO format.

    Args:
        path: folder that holds `data.yaml`, or that file under any name.
        split: a key of that file, `train`, `val` or `test`; or a slice of it, such as "train[:80%]".
        on_error: `stop` at images that can't be read and boxes that can't be, or `skip` and report them.
        cache_dir: where the Arrow file goes; by default the cache of `datasets`.

    Raises:
        FileNotFoundError: no `data.yaml`, or no such image folder.
        DataError: the file is not sound, there is no such split, or images or labels can't be used.
        CacheError: see `open_cache`.
    """
    split, part = split_and_part(split)
    file = find_yaml(Path(path).expanduser())
    content = read_yaml(file)
    names = class_names(content, file)
    images = image_files(content, split, file)
    labels = [(image, label_file(image)) for image in images]
    texts = {image: label.read_bytes() for image, label in labels if label.is_file()}
    root = file.parent
    relative = {image: os.path.relpath(image, root) for image in images}
    fingerprint = contents_hash((relative[image], texts.get(image, b"")) for image in images)
    if on_error == "skip":  # images that were left out may be put right later
        fingerprint += "-".join(files_hash(folder) for folder in sorted({image.parent for image in images}))

    def read(problems: Problems) -> Annotations:
        records, count = [], 0
        for index, image in enumerate(images):
            name = relative[image]
            objects = parse(texts.get(image, b""), len(names), f"the labels of {name}", count, problems)
            count += len(objects)
            records.append(ImageRecord(index, name, None, None, objects))
        return Annotations(records, [str(image) for image in images], dict(enumerate(names)))

    made_from = (str(file), split, tuple(names), fingerprint)
    found = split_of_files(
        read,
        split,
        root,
        name="yolo_detection",
        where=f"{file}, split {split!r}",
        made_from=made_from,
        on_error=on_error,
        cache_dir=cache_dir,
        box_format="cxcywh",
        box_unit="relative",
    )
    return found.part(part)


def find_yaml(path: Path) -> Path:
    """The file that describes a data set: the path itself, or `data.yaml` or the only other YAML file in it.

    Raises:
        FileNotFoundError: there is none, or several.
    """
    if path.is_file():
        return path.resolve()
    if not path.exists():
        raise FileNotFoundError(f"there is no folder {path}")
    files = sorted(file for suffix in ("yaml", "yml") for file in path.glob(f"*.{suffix}"))
    named = [file for file in files if file.stem == "data"] or files
    if len(named) != 1:
        there = ", ".join(file.name for file in files) or "none"
        raise FileNotFoundError(
            f"{path} has no data.yaml, which describes a YOLO data set (YAML files there: {there})"
        )
    return named[0].resolve()


def read_yaml(file: Path) -> dict[str, Any]:
    """What describes a data set.

    Raises:
        DataError: it isn't YAML, or no mapping.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is no YAML file: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} must hold names and splits, but holds {str(content)[:50]!r}")
    return content


def class_names(content: dict[str, Any], file: Path) -> list[str]:
    """The class names by label: a list, or a mapping of 0, 1, 2, ...

    Raises:
        DataError: there are none, a number is missing, or a name is there twice.
    """
    names = content.get("names")
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise DataError(f"{file}: names must have the keys 0 to {len(names) - 1}, not {list(names)[:10]}")
        names = [names[label] for label in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{file} has no list of class names under names")
    texts = [str(name) for name in names]
    if content.get("nc", len(texts)) != len(texts):
        raise DataError(f"{file}: nc is {content['nc']}, but names has {len(texts)} names; correct one or the other")
    if twice := next((name for name in texts if texts.count(name) > 1), None):
        raise DataError(f"{file}: names has {twice!r} twice; rename one of them")
    return texts


def image_files(content: dict[str, Any], split: str, file: Path) -> list[Path]:
    """The images of a split, sorted: of folders, and of text files that list images.

    Args:
        content: of `file`.
        split: its name.
        file: which describes the data set; paths are relative to its `path`, or to its own folder.

    Raises:
        DataError: there is no such split, or no image in it.
        FileNotFoundError: a folder or file is missing.
    """
    splits = {key: content[key] for key in ("train", *VALIDATION, "test") if content.get(key)}
    key = next((k for k in (split, *(VALIDATION if split in VALIDATION else ())) if k in splits), None)
    if key is None:
        raise DataError(no_such_split(file, split, list(splits)))
    root = file.parent / str(content.get("path") or "")
    given = splits[key] if isinstance(splits[key], list) else [splits[key]]
    found: set[Path] = set()
    for entry in given:
        # Roboflow writes ../train/images for the folder beside the file.
        places = [root / str(entry), file.parent / str(entry), file.parent / str(entry).removeprefix("../")]
        place = next((p for p in places if p.exists()), None)
        if place is None:
            raise FileNotFoundError(f"{file}: {key} is {entry}, but {os.path.normpath(places[0])} does not exist")
        found |= set(images_in(place.resolve()) if place.is_dir() else _listed(place))
    if not found:
        raise DataError(f"{file}: there is no image in {', '.join(map(str, given))}, the split {key!r}")
    return sorted(found)


def _listed(file: Path) -> list[Path]:
    """The images that a text file lists, relative to its folder."""
    lines = file.read_text(encoding="utf-8").split("\n")
    return [(file.parent / line.strip()).resolve() for line in lines if line.strip()]


def label_file(image: Path) -> Path:
    """Where an image's labels are: in `labels` instead of the last `images`, or beside it."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def parse(text: bytes, classes: int, where: str, first_id: int, problems: Problems) -> list[ObjectRecord]:
    """The boxes of a label file, cxcywh relative to the image.

    Args:
        text: its content.
        classes: their number.
        where: what messages call it.
        first_id: of the annotations.
        problems: takes lines that can't be read.
    """
    objects: list[ObjectRecord] = []
    for number, line in enumerate(text.decode(errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            label, *values = map(float, line.split())
        except ValueError:
            label, values = -1.0, []
        name = f"line {number} of {where}: {line.strip()[:100]!r}"
        outline = len(values) >= 6 and len(values) % 2 == 0
        if not label.is_integer() or not (len(values) == 4 or outline):
            problems.add(Kind.LINE, name)
        elif not 0 <= label < classes:
            problems.add(Kind.CATEGORY, name)
        else:
            box = _bounds(values) if outline else values
            objects.append(ObjectRecord(first_id + len(objects), box, int(label)))
    return objects


def _bounds(outline: list[float]) -> list[float]:
    """cxcywh around points x1, y1, x2, y2, ..."""
    xs, ys = outline[::2], outline[1::2]
    left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
