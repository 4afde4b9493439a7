"""Images, rows and boxes that are there twice, in one split or in two: found by content, so every image is read."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..utils.files import sha256
from ..utils.progress import Progress
from .errors import Kind, Problems
from .split import DetectionSplit

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Entry:
    """One row of a split: its name for messages, the image's SHA-256 and file (None: in the data), and its boxes."""

    name: str
    digest: str
    file: str | None
    boxes: list[tuple[Any, ...]]


def read_entries(split: DetectionSplit) -> list[Entry]:
    """Every row of a split; hashes all images.

    Raises:
        OSError: an image can't be read any more.
    """
    rows = split.dataset.select_columns(["image_id", "file_name", "image", "objects"]).with_format("arrow")
    entries: list[Entry] = []
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool, Progress("hash images", len(rows), "images") as bar:
        for batch in rows.iter(ROWS_AT_ONCE):
            entries += pool.map(_entry, batch.to_pylist())
            bar.update(len(batch))
    return entries


def _entry(row: Mapping[str, Any]) -> Entry:
    content, path, objects = row["image"]["bytes"], row["image"]["path"], row["objects"]
    name = f"{row['file_name']} (image id {row['image_id']})"
    boxes = [(label, *box) for label, box in zip(objects["category"], objects["bbox"], strict=True)]
    if content is None:
        return Entry(name, sha256(path), os.path.realpath(path), boxes)
    return Entry(name, hashlib.sha256(content).hexdigest(), None, boxes)


def find_duplicates(entries: Sequence[Entry]) -> Problems:
    """Rows, image files, image contents and boxes that a split holds more than once."""
    problems = Problems()
    for entry in entries:
        for box, count in Counter(entry.boxes).items():
            if count > 1:
                problems.add(Kind.BOX_TWICE, f"{entry.name}: {list(box[1:])}")
    for first, again in _pairs(entries, entries):
        same_boxes, same_file = sorted(first.boxes) == sorted(again.boxes), first.file == again.file
        kind = Kind.ROW_TWICE if same_boxes and same_file else Kind.CONTENT_TWICE
        if same_file and first.file and not same_boxes:
            kind = Kind.FILE_TWICE
        problems.add(kind, f"{again.name} as {first.name}")
    return problems


def find_shared(train: Sequence[Entry], evaluated: Sequence[Entry]) -> Problems:
    """Images of a split whose content another one has, too."""
    problems = Problems()
    for first, again in _pairs(train, evaluated):
        problems.add(Kind.IN_BOTH, f"{again.name} as {first.name}")
    return problems


def _pairs(one: Sequence[Entry], other: Sequence[Entry]) -> Iterator[tuple[Entry, Entry]]:
    """(First entry of `one` with an image, each other entry of `other` with the same image)."""
    first: dict[str, Entry] = {}
    for entry in one:
        first.setdefault(entry.digest, entry)
    for entry in other:
        if entry.digest in first and first[entry.digest] is not entry:
            yield first[entry.digest], entry
