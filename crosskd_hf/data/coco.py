"""COCO-format annotations as a memory-mapped Arrow dataset of image paths and boxes."""

import glob
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..utils.files import sha256
from .annotation_files import Annotations, files_hash, leaves_folder, split_of_files
from .cache import CacheDir
from .checks import ImageRecord, ObjectRecord
from .errors import DataError, Kind, Problems
from .split import DetectionSplit, no_such_split, split_and_part

LARGEST_INTEGER = 2**63 - 1  # that Arrow's int64 holds


def load_coco(
    path: str | os.PathLike[str],
    split: str,
    *,
    annotations: str = "annotations/instances_{split}.json",
    images: str = "{split}",
    on_error: str = "stop",
    cache_dir: CacheDir = None,
) -> DetectionSplit:
    """Load one split of a data set in COCO layout, from the Arrow cache when its annotation file has not changed.

    Args:
        path: folder that holds the annotations and the images.
        split: name put in place of `{split}` in the two patterns, such as "train2017"; or a slice of it, such as
            "train2017[:80%]".
        annotations: annotation file, relative to `path`.
        images: image folder, relative to `path`.
        on_error: `stop` at images that can't be read and annotations that can't be, or `skip` and report them.
        cache_dir: where the Arrow file goes; by default the cache of `datasets`.

    Raises:
        FileNotFoundError: the folder, the annotation file or the image folder is missing.
        DataError: the annotation file is not sound (see `read_annotations`), an image can't be read or has another
            size, or the boxes are in another format; all that is wrong is told together.
        CacheError: see `open_cache`.
    """
    split, part = split_and_part(split)
    root = Path(path).expanduser().resolve()
    annotation_file, image_dir = root / annotations.format(split=split), root / images.format(split=split)
    if not (root.is_dir() and annotation_file.is_file() and image_dir.is_dir()):
        raise FileNotFoundError(_what_is_missing(root, annotation_file, image_dir, split, annotations))
    fingerprint = sha256(annotation_file)
    if on_error == "skip":  # images that were left out may be put right later
        fingerprint += f"-{files_hash(image_dir)}"

    def read(problems: Problems) -> Annotations:
        records, categories = read_annotations(annotation_file, problems)
        return Annotations(records, [os.path.join(image_dir, record.file_name) for record in records], categories)

    found = split_of_files(
        read,
        split,
        root,
        name="coco_detection",
        where=str(annotation_file),
        made_from=(str(image_dir), fingerprint),
        on_error=on_error,
        cache_dir=cache_dir,
    )
    return found.part(part)


def _what_is_missing(root: Path, annotation_file: Path, image_dir: Path, split: str, annotations: str) -> str:
    hint = (
        "data.path should be the folder that holds annotations/ and the image folders; Parquet files, save_to_disk "
        "and folders with metadata.jsonl are data.layout=datasets"
    )
    if not root.is_dir():
        return f"data set folder {root} does not exist; {hint}"
    if annotation_file.is_file():
        return f"image folder {image_dir} does not exist; {hint}"
    before, placeholder, after = str(root / annotations).partition("{split}")
    if placeholder:
        files = glob.glob(f"{glob.escape(before)}*{glob.escape(after)}")
        if splits := sorted(name.removeprefix(before).removesuffix(after) for name in files):
            hint = no_such_split(root, split, splits)
    return f"annotation file {annotation_file} does not exist; {hint}"


def read_annotations(path: Path, problems: Problems) -> tuple[list[ImageRecord], dict[int, str]]:
    """Read and check a COCO annotation file; segmentations are dropped while it is parsed.

    An annotation without `iscrowd` is no crowd, one without `area` gets the area of its box.

    Args:
        path: of the JSON file.
        problems: takes what is wrong with single images and annotations; those are not returned.

    Returns:
        the images in the file's order, and the category names by increasing id.

    Raises:
        DataError: no JSON, a missing list or key, a key twice in an object, no image or category, a duplicate image or
            category id.
    """
    try:
        with path.open("rb") as file:
            content = json.load(file, object_pairs_hook=_without_segmentation)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a JSON file: {error}") from error
    lists = content if isinstance(content, dict) else {}
    keys = ("images", "annotations", "categories")
    if missing := [key for key in keys if not isinstance(lists.get(key), list)]:
        raise DataError(f"{path} has no list {', '.join(missing)}: it is not a COCO instances file")
    categories = _check_categories(content["categories"], path)
    images, listed = _check_images(content["images"], path, problems)
    labels = {category_id: label for label, category_id in enumerate(categories)}
    objects = _check_annotations(content["annotations"], listed, labels, path, problems)
    return [replace(image, objects=objects.get(image.id, [])) for image in images], categories


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of a key that is there twice, the parser would silently drop the first value.

    Raises:
        DataError: naming the key.
    """
    record = dict(pairs)
    if len(record) != len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise DataError(f"an object has the key {ascii(key)[:200]} twice; join the two values, or remove one")
    return record


def _without_segmentation(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = unique_keys(pairs)
    record.pop("segmentation", None)  # the polygons are most of COCO's 450 MB, and no detector here reads them
    return record


def _integer(record: Any, key: str, where: str) -> int:
    value = record.get(key) if isinstance(record, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
        raise DataError(f"{where}: {key} must be an integer, got {ascii(value)[:200]}")
    if abs(value) > LARGEST_INTEGER:
        raise DataError(f"{where}: {key} must have at most 64 bits, got {ascii(value)[:200]}")
    return int(value)


def is_text(value: Any) -> bool:
    """Whether a value is text that can be written: JSON may hold halves of characters, which no file can."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _check_categories(records: list[Any], path: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for position, record in enumerate(records):
        category_id = _integer(record, "id", f"{path}: category number {position}")
        if not is_text(record.get("name")):
            raise DataError(f"{path}: category {category_id} has no name, or none that is text")
        if category_id in names:
            raise DataError(f"{path}: category id {category_id} appears twice")
        if record["name"] in names.values():
            raise DataError(f"{path}: two categories are named {record['name']!r}; rename one of them")
        names[category_id] = record["name"]
    if not names:
        raise DataError(f"{path} lists no categories")
    return dict(sorted(names.items()))


def _check_images(records: list[Any], path: Path, problems: Problems) -> tuple[list[ImageRecord], set[int]]:
    """The images that can be used, and the ids of all."""
    images: list[ImageRecord] = []
    seen: set[int] = set()
    for position, record in enumerate(records):
        image_id = _integer(record, "id", f"{path}: image number {position}")
        where = f"{path}: image {image_id}"
        if image_id in seen:
            raise DataError(f"{path}: image id {image_id} appears twice; image ids must be unique")
        seen.add(image_id)
        width, height = _integer(record, "width", where), _integer(record, "height", where)
        if min(width, height) < 1:
            raise DataError(f"{where}: width and height must be at least 1, got {width} x {height}")
        file_name = record.get("file_name")
        if not is_text(file_name) or not file_name:
            raise DataError(
                f"{where}: file_name must be the image's path in the image folder, got {ascii(file_name)[:200]}"
            )
        if leaves_folder(file_name):
            problems.add(Kind.FILE_NAME, f"{file_name} (image id {image_id})")
        else:
            images.append(ImageRecord(image_id, file_name, width, height))
    if not seen:
        raise DataError(f"{path} lists no images: the split is empty")
    return images, seen


def _check_annotations(
    records: list[Any], image_ids: set[int], labels: dict[int, int], path: Path, problems: Problems
) -> dict[int, list[ObjectRecord]]:
    by_image: dict[int, list[ObjectRecord]] = {}
    seen: set[int] = set()
    for position, record in enumerate(records):
        annotation_id = _integer(record, "id", f"{path}: annotation number {position}")
        where = f"{path}: annotation {annotation_id}"
        image_id, category_id = _integer(record, "image_id", where), _integer(record, "category_id", where)
        name = f"annotation {annotation_id}"
        if annotation_id in seen:
            problems.add(Kind.ID, name)
        elif image_id not in image_ids:
            problems.add(Kind.IMAGE_ID, f"{name} of image {image_id}")
        elif category_id not in labels:
            problems.add(Kind.CATEGORY, f"{name} of category {category_id}")
        else:
            bbox, area, iscrowd = (record.get(key) for key in ("bbox", "area", "iscrowd"))
            annotation = ObjectRecord(annotation_id, bbox, labels[category_id], area, iscrowd)
            by_image.setdefault(image_id, []).append(annotation)
        seen.add(annotation_id)
    return by_image
