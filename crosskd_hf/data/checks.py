"""Records of images and boxes, checked against the image files, and written to the Arrow cache."""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np

from ..utils.escaping import printable
from ..utils.images import ImageError, ImageSource, inspect_image
from ..utils.progress import Progress
from .box_formats import check_format, is_box, is_finite, note_box, to_xywh
from .errors import DataError, Kind, Problems

logger = logging.getLogger(__name__)
CHUNK = 256  # images that are in memory at once while they are inspected


@dataclass(frozen=True)
class ObjectRecord:
    """One annotation: its box as the source has it, its class 0..C-1, area in pixels^2 (None: of the box).

    `iscrowd` is the source's, too, until it is checked: 0, 1, False, True, or None for no.
    """

    id: int
    bbox: Any
    category: int
    area: Any = None
    iscrowd: Any = False


@dataclass(frozen=True)
class ImageRecord:
    """One image: `width` and `height` are what the source says, None if it doesn't."""

    id: int
    file_name: str
    width: int | None
    height: int | None
    objects: list[ObjectRecord] = field(default_factory=list)


def check_records(
    records: list[ImageRecord],
    sources: Iterable[ImageSource],
    problems: Problems,
    where: str,
    on_error: str,
    box_format: str = "xywh",
    unit: str = "pixel",
) -> list[tuple[int, ImageRecord]]:
    """Decode every image once and check every box.

    Args:
        records: of a split.
        sources: the image of each record.
        problems: takes what is wrong.
        where: what messages call the data.
        on_error: `stop` at problems, or `skip` and note what is left out.
        box_format, unit: see `to_xywh`.

    Returns:
        (position in `records`, record with its real size and boxes [x, y, w, h] in pixels) of what can be used.

    Raises:
        DataError: most boxes don't fit their images, but would in another format; there are problems that stop, or
            no image is left.
    """
    sized = list(_sized(records, sources, problems))
    boxes = [
        (*obj.bbox, record.width, record.height) for _, record in sized for obj in record.objects if is_box(obj.bbox)
    ]
    if boxes:
        columns = np.array(boxes, dtype=np.float64)
        check_format(columns[:, :4], columns[:, 4:], box_format, unit, where)
    checked = [(position, check_objects(record, box_format, unit, problems)) for position, record in sized]
    if on_error == "stop":
        problems.raise_if_stopping(where)
    if not checked:
        raise DataError(f"{where}: no image is left: {problems.lines(stopping=True)[0]}")
    return checked


def _sized(
    records: list[ImageRecord], sources: Iterable[ImageSource], problems: Problems
) -> Iterator[tuple[int, ImageRecord]]:
    """The records whose image can be read and is of the size that the source claims, with that size."""
    for position, (record, size) in enumerate(zip(records, _inspect(sources, len(records)), strict=True)):
        if (sized := with_size(record, size, problems)) is not None:
            yield position, sized


def with_size(record: ImageRecord, size: tuple[int, int] | str, problems: Problems) -> ImageRecord | None:
    """A record with the size of its image; None, and a problem, if there is none or another one is claimed.

    Args:
        size: (width, height) in pixels, or why the image can't be read.
    """
    name = f"{record.file_name} (image id {record.id})"
    if isinstance(size, str):
        problems.add(Kind.IMAGE, f"{name} {size}")
        return None
    if None not in (record.width, record.height) and size != (record.width, record.height):
        turned = size == (record.height, record.width)
        hint = ", a quarter turn: boxes belong to the image as people see it (EXIF orientation)" if turned else ""
        problems.add(
            Kind.IMAGE_SIZE,
            f"{name} is {size[0]} x {size[1]} pixels, annotated as {record.width} x {record.height}{hint}",
        )
        return None
    return replace(record, width=size[0], height=size[1])


def _inspect(sources: Iterable[ImageSource], total: int) -> Iterator[tuple[int, int] | str]:
    """Size of each image, or what is wrong with it."""

    def inspect(source: ImageSource) -> tuple[int, int] | str:
        try:
            return inspect_image(source)
        except ImageError as error:
            return str(error)

    iterator = iter(sources)
    with (
        # Pillow decodes without holding Python's lock.
        ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool,
        Progress("check images", total, "images") as progress,
    ):
        while chunk := [source for _, source in zip(range(CHUNK), iterator, strict=False)]:
            yield from pool.map(inspect, chunk)
            progress.update(len(chunk))


def check_objects(record: ImageRecord, box_format: str, unit: str, problems: Problems) -> ImageRecord:
    """A record with its boxes [x, y, w, h] in pixels; `problems` takes those that can't be, which are left out."""
    objects = []
    size = np.array([[record.width, record.height]], dtype=np.float64)
    for obj in record.objects:
        name = f"annotation {obj.id} of {record.file_name} (image id {record.id})"
        area = obj.area
        if not is_box(obj.bbox):
            problems.add(Kind.BOX, f"{name}: bbox {repr(obj.bbox)[:200]}")
        elif not (area is None or is_finite(area)):
            problems.add(Kind.AREA_NUMBER, f"{name}: area {repr(area)[:100]}")
        elif not (obj.iscrowd is None or (isinstance(obj.iscrowd, (bool, int, float)) and obj.iscrowd in (0, 1))):
            problems.add(Kind.CROWD, f"{name}: iscrowd {repr(obj.iscrowd)[:100]}")
        else:
            xywh = to_xywh([obj.bbox], size, box_format, unit)[0].tolist()
            if not note_box(xywh, record.width, record.height, name, problems):
                continue
            # An area in parts of the image isn't told apart from pixels: the box's stands.
            if area is None or unit != "pixel":
                area = xywh[2] * xywh[3]
            elif area <= 0 < xywh[2] * xywh[3]:
                problems.add(Kind.AREA, name)
            objects.append(replace(obj, bbox=xywh, area=float(area), iscrowd=bool(obj.iscrowd)))
    return replace(record, objects=objects)


def arrow_row(record: ImageRecord) -> dict[str, Any]:
    """A checked record as the columns of `annotation_features`."""
    return {
        "image_id": record.id,
        "file_name": record.file_name,
        "width": record.width,
        "height": record.height,
        "objects": {
            key: [getattr(obj, key) for obj in record.objects] for key in ("id", "bbox", "category", "area", "iscrowd")
        },
    }


def cache_note(category_ids: Iterable[int], problems: Problems) -> str:
    """What is kept beside an Arrow cache, in the one free text that `datasets` saves and reads back."""
    return json.dumps({"category_ids": list(category_ids), "problems": problems.to_dict()})


def read_cache_note(info: datasets.DatasetInfo, where: str) -> tuple[tuple[int, ...], Problems]:
    """The category ids and problems of a cache; what was left out is told again at every load."""
    note = json.loads(info.description)
    problems = Problems.from_dict(note["problems"])
    for line in problems.lines(stopping=True):
        logger.warning("%s: left out: %s", printable(where), line)
    return tuple(note["category_ids"]), problems
