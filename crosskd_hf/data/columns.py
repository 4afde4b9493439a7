"""Any `datasets` data set with the columns `image` and `objects`: Hub, Parquet, `save_to_disk`, image folders.

`objects` holds the boxes of an image: `bbox`, and `category` or `category_id`; `id`, `area` and `iscrowd` may be
there. It is a dict of lists (as in cppe-5 and detection-datasets/coco) or a list of dicts. Other columns that are read
if there are any: `image_id`, `file_name`, `width`, `height`.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
from huggingface_hub.constants import HF_HUB_CACHE

from ..utils.escaping import printable
from ..utils.images import ImageSource
from .annotation_files import files_hash
from .cache import CacheDir, cached_rows
from .checks import ImageRecord, ObjectRecord, arrow_row, cache_note, check_records, read_cache_note
from .coco import LARGEST_INTEGER
from .column_classes import Vocabulary, build_vocabulary, category_feature, category_key, object_rows, object_values
from .column_names import with_usual_names
from .errors import DataError, Kind, Problems
from .image_folder import METADATA
from .opening import open_whole, read_stream, split_of
from .split import DetectionSplit, annotation_features, split_and_part, take_part

IN_MEMORY = (datasets.Dataset, datasets.DatasetDict)
Source = str | datasets.Dataset | datasets.DatasetDict  # Hub id or folder; or what is loaded already


def load_columns(
    path: Source,
    split: str = "train",
    *,
    columns: Mapping[str, str] | None = None,
    other_splits: Sequence[str] = (),
    config: str | None = None,
    box_format: str = "xywh",
    box_unit: str = "pixel",
    label_names: Sequence[str] = (),
    category_ids: Sequence[int] = (),
    on_error: str = "stop",
    cache_dir: CacheDir = None,
    streamed: bool = False,
    limit: int | None = None,
) -> DetectionSplit:
    """Load one split of a `datasets` data set.

    Args:
        path: Hub id; folder of Parquet files, of `save_to_disk`, or of images with `metadata.jsonl`; or a data set in
            memory.
        split: its name, or a slice such as "train[:80%]"; of a `Dataset` in memory it is train.
        columns: where boxes and labels are, if not in `objects`; see `with_usual_names`.
        other_splits: whose categories count too where the data set has no class names of its own.
        config: configuration of a Hub data set that has several.
        box_format, box_unit: see `to_xywh`; compared with the images.
        label_names: class names by label, if the data set has none; they also fix the order of named categories.
        category_ids: what the `category` column holds for each of `label_names`; by default 0, 1, 2, ...
        on_error: `stop` at images that can't be read and boxes that can't be, or `skip` and report them.
        cache_dir: where Arrow files go; by default the cache of `datasets`.
        streamed: read this split from a stream, without those beside it.
        limit: read the first rows of the stream only.

    Raises:
        DataError: no such data set, split or column; unknown categories; images or boxes that can't be used.
        CacheError: see `open_cache`.
    """
    name = name_of(path)
    where = f"{name}, split {split!r}"
    if streamed and not isinstance(path, IN_MEMORY):
        source = usual_split(read_stream(path, split, config, columns, limit, cache_dir), columns, where)
    else:
        source = open_split(path, split, config, cache_dir, columns)
    if not isinstance(path, IN_MEMORY):
        refuse_foreign_paths(source, where, path, cache_dir)
    splits = {where: source}
    if streamed:
        check_class_names(source, label_names, where)
    elif not (label_names or isinstance(category_feature(source, where), datasets.ClassLabel)):
        for other in sorted({*other_splits} - {split}):
            splits[f"{name}, split {other!r}"] = open_split(path, other, config, cache_dir, columns)
    vocabulary = build_vocabulary(splits, label_names, category_ids, where)
    fingerprint = source._fingerprint
    if on_error == "skip" and not isinstance(path, IN_MEMORY):  # images that were left out may be put right later
        folder = Path(path).expanduser() / split_and_part(split)[0]
        fingerprint += f"-{files_hash(folder)}" if (folder / METADATA).is_file() else ""

    def make_rows() -> tuple[datasets.Features, str, Iterator[dict[str, Any]]]:
        """The checked annotations, without the images, which stay where they are."""
        problems = Problems()
        records = records_of(source, vocabulary, where, problems)
        image_id, times = Counter(record.id for record in records).most_common(1)[0]
        if times > 1:
            raise DataError(f"{where}: image id {image_id} appears {times} times; image ids must be unique")
        checked = check_records(records, sources_of(source), problems, where, on_error, box_format, box_unit)
        columns = {**annotation_features(vocabulary.names), "row": datasets.Value("int64")}
        rows = ({**arrow_row(record), "row": position} for position, record in checked)
        return datasets.Features(columns), cache_note(vocabulary.category_ids, problems), rows

    made_from = (fingerprint, where, box_format, box_unit, vocabulary.names, vocabulary.category_ids, on_error)
    rows = cached_rows("crosskd_columns", made_from, make_rows, cache_dir)
    images = source.select_columns(["image"])
    if len(rows) != len(images):
        images = images.select(rows["row"][:])
    joined = datasets.concatenate_datasets([rows.remove_columns(["row"]), images], axis=1)
    dataset = joined.cast_column("image", datasets.Image())
    return DetectionSplit(dataset, vocabulary.names, *read_cache_note(rows.info, where), split, name)


def name_of(path: Source) -> str:
    """What messages call a data set."""
    return "the given data set" if isinstance(path, IN_MEMORY) else str(path)


def open_split(
    path: Source,
    split: str,
    config: str | None,
    cache_dir: CacheDir,
    columns: Mapping[str, str] | None = None,
    needed: Sequence[str] = ("image", "objects"),
) -> datasets.Dataset:
    """A split with undecoded images in the column `image`, that has all columns that are needed."""
    where = f"{name_of(path)}, split {split!r}"
    if isinstance(path, IN_MEMORY):
        base, part = split_and_part(split)
        source = take_part(split_of(path, base, name_of(path)), part)
    else:
        source = open_whole(path, split, config, cache_dir, where)
    return usual_split(source, columns, where, needed)


def usual_split(
    source: datasets.Dataset,
    columns: Mapping[str, str] | None,
    where: str,
    needed: Sequence[str] = ("image", "objects"),
) -> datasets.Dataset:
    """A split under the usual names of columns; see `with_usual_names` and `with_image_column`."""
    return with_image_column(with_usual_names(source, columns, where) if columns else source, where, needed)


def with_image_column(source: datasets.Dataset, where: str, needed: Sequence[str]) -> datasets.Dataset:
    """The split, if it has the columns that are needed, with undecoded images in the column `image`."""
    for name in needed:
        if name not in source.column_names:
            raise DataError(
                f"{where} has no column {name!r}, but {', '.join(source.column_names)}. A detection data set has "
                "`image` and `objects` with bbox and category: rename the columns."
            )
    if not len(source):
        raise DataError(f"{where} is empty: it has no image")
    feature = source.features["image"]
    if isinstance(feature, datasets.Value) and feature.dtype not in ("binary", "large_binary"):
        raise DataError(f"{where}: the column image holds {feature.dtype}; cast it with cast_column('image', Image())")
    return source.with_format(None).cast_column("image", datasets.Image(decode=False))


def check_class_names(source: datasets.Dataset, label_names: Sequence[str], where: str) -> None:
    """Raise DataError if neither a stream nor `label_names` has class names."""
    if not (label_names or isinstance(category_feature(source, where), datasets.ClassLabel)):
        raise DataError(
            f"{where} has no class names of its own, and a stream can't be searched for all of them: set "
            "data.label_names, and data.category_ids if its numbers aren't 0, 1, 2, ..."
        )


def refuse_foreign_paths(source: datasets.Dataset, where: str, path: str, cache_dir: CacheDir) -> None:
    """A row may name an image instead of holding it; only files of the data set itself are opened."""
    roots = [path, cache_dir or datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE]
    allowed = [Path(root).expanduser().resolve() for root in roots]
    for file, is_embedded in _paths(source):
        if file and "://" in file and not is_embedded:
            raise DataError(
                f"{where}: the image {printable(file)} is a file elsewhere, which can't be streamed: only images "
                "inside the rows can (Parquet, WebDataset). Set data.streaming=false"
            )
        if file and not (is_embedded or any(Path(file).resolve().is_relative_to(root) for root in allowed)):
            raise DataError(
                f"{where}: the image {printable(file)} lies outside the data set: put it there, or embed its bytes"
            )


def _paths(source: datasets.Dataset) -> Iterator[tuple[str | None, bool]]:
    """Path of each image, and whether its bytes are in the row."""
    for batch in source.select_columns(["image"]).with_format("arrow").iter(1000):
        column = batch["image"].combine_chunks()
        is_embedded = pc.is_valid(column.field("bytes"))
        yield from zip(column.field("path").to_pylist(), is_embedded.to_pylist(), strict=True)


def records_of(
    source: datasets.Dataset, vocabulary: Vocabulary, where: str, problems: Problems, numbered: bool = True
) -> list[ImageRecord]:
    """The annotations as they are; `problems` takes the categories that aren't known.

    Args:
        numbered: rows without a name are called by their number.
    """
    key = category_key(source, where)
    optional = [name for name in ("image_id", "file_name", "width", "height") if name in source.column_names]
    columns = {name: source.with_format("arrow", columns=[name])[:][name].to_pylist() for name in optional}
    ids = columns.get("image_id", [])
    if not ids or not all(isinstance(i, int) and abs(i) <= LARGEST_INTEGER for i in ids):
        ids = list(range(len(source)))
    names = columns.get("file_name") or [
        os.path.basename(path) if path else f"row {row}" if numbered else "an unnamed image"
        for row, (path, _) in enumerate(_paths(source))
    ]
    records, number = [], 0
    for position, row in enumerate(object_rows(source)):
        objects = []
        boxes, categories = object_values(row, "bbox"), object_values(row, key)
        given = object_values(row, "id") or range(number + 1, number + 1 + len(boxes))
        areas = object_values(row, "area") or [None] * len(boxes)
        crowds = object_values(row, "iscrowd") or [False] * len(boxes)
        for key_name, values in (("categories", categories), ("id", given), ("area", areas), ("iscrowd", crowds)):
            if len(values) != len(boxes):
                raise DataError(
                    f"{where}: {printable(names[position])} has {len(boxes)} boxes, but {len(values)} {key_name}: "
                    "each list of objects has an entry per box; mend that row"
                )
        number += len(boxes)
        for object_id, box, category, area, crowd in zip(given, boxes, categories, areas, crowds, strict=True):
            if category not in vocabulary.labels:
                problems.add(Kind.CATEGORY, f"annotation {object_id} of {names[position]}: {category!r}")
                continue
            fits = isinstance(object_id, int) and abs(object_id) <= LARGEST_INTEGER
            object_id = object_id if fits else number
            objects.append(ObjectRecord(object_id, box, vocabulary.labels[category], area, crowd))
        size = [columns[name][position] if name in columns else None for name in ("width", "height")]
        records.append(ImageRecord(ids[position], str(names[position]), *size, objects))
    return records


def sources_of(source: datasets.Dataset) -> Iterable[ImageSource]:
    """The file or the bytes of each row's undecoded image."""
    for row in source.select_columns(["image"]):
        image = row["image"] or {"bytes": b"", "path": None}  # a missing image is an empty file
        yield image["path"] if image["bytes"] is None else image["bytes"]
