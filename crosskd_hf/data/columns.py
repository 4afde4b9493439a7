"""Any `datasets` data set with the columns `image` and `objects`: Hub, Parquet, `save_to_disk`, image folders.

`objects` holds the boxes of an image: `bbox`, and `category` or `category_id`; `id`, `area` and `iscrowd` may be
there. It is a dict of lists (as in cppe-5 and detection-datasets/coco) or a list of dicts. Other columns that are read
if there are any: `image_id`, `file_name`, `width`, `height`.
"""

import collections
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
from huggingface_hub.constants import HF_HUB_CACHE

from ..utils.escaping import printable
from ..utils.files import CacheError, sha256
from ..utils.images import IMAGE_EXTENSIONS, ImageSource
from ..utils.text import nearest
from .cache import CheckedBuilder, open_cache
from .checks import ImageRecord, ObjectRecord, arrow_row, cache_note, check_records, read_cache_note
from .coco import LARGEST_INTEGER, files_hash, leaves_folder, unique_keys
from .errors import DataError, Kind, Problems
from .split import SPLIT_NAME, DetectionSplit, annotation_features, no_such_split, split_and_part, take_part

CATEGORY_KEYS = ("category", "category_id")
METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Vocabulary:
    """The classes of a data set: names and COCO ids by label, and what the `category` column holds -> label."""

    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    labels: dict[int | str, int]


@dataclass
class ColumnsConfig(datasets.BuilderConfig):
    """What one Arrow cache is made from; `fingerprint` is that of the data set, and of files that it may leave out."""

    fingerprint: str = ""
    where: str = ""
    box_format: str = "xywh"
    box_unit: str = "pixel"
    names: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()
    on_error: str = "stop"


class ColumnAnnotations(CheckedBuilder):
    """Writes the checked annotations of a data set to Arrow, without the images, which stay where they are.

    `source` and `vocabulary` must be set before it prepares; the configuration's fingerprint stands for them.
    """

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = ColumnsConfig
    source: datasets.Dataset
    vocabulary: Vocabulary

    def _info(self) -> datasets.DatasetInfo:
        names = (*self.config.names,)
        row = {"row": datasets.Value("int64")}
        return datasets.DatasetInfo(features=datasets.Features({**annotation_features(names), **row}))

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        config, problems = self.config, Problems()
        records = _records(self.source, self.vocabulary, config.where, problems)
        checked = check_records(
            records, _sources(self.source), problems, config.where, config.box_format, config.box_unit
        )
        if config.on_error == "stop":
            problems.raise_if_stopping(config.where)
        if not checked:
            raise DataError(f"{config.where}: no image is left: {problems.lines(stopping=True)[0]}")
        self.info.description = cache_note(config.category_ids, problems)
        return [datasets.SplitGenerator(name=SPLIT_NAME, gen_kwargs={"checked": checked})]

    def _generate_examples(self, checked: list[tuple[int, ImageRecord]]) -> Iterator[tuple[int, dict[str, Any]]]:
        for position, record in checked:
            yield position, {**arrow_row(record), "row": position}


def load_columns(
    path: str,
    split: str,
    *,
    other_splits: Sequence[str] = (),
    config: str | None = None,
    box_format: str = "xywh",
    box_unit: str = "pixel",
    label_names: Sequence[str] = (),
    category_ids: Sequence[int] = (),
    on_error: str = "stop",
    cache_dir: str | os.PathLike[str] | None = None,
) -> DetectionSplit:
    """Load one split of a `datasets` data set.

    Args:
        path: Hub id; or a folder of Parquet files, of `save_to_disk`, or of images with `metadata.jsonl`.
        split: its name, or a slice such as "train[:80%]".
        other_splits: whose categories count too where the data set has no class names of its own.
        config: configuration of a Hub data set that has several.
        box_format, box_unit: see `to_xywh`; compared with the images.
        label_names: class names by label, if the data set has none; they also fix the order of named categories.
        category_ids: what the `category` column holds for each of `label_names`; by default 0, 1, 2, ...
        on_error: `stop` at images that can't be read and boxes that can't be, or `skip` and report them.
        cache_dir: where Arrow files go; by default the cache of `datasets`.

    Raises:
        DataError: no such data set, split or column; unknown categories; images or boxes that can't be used.
        CacheError: see `open_cache`.
    """
    where = f"{path}, split {split!r}"
    cache = None if cache_dir is None else str(cache_dir)
    source = _with_image_column(_open(path, split, config, cache), where)
    if not len(source):
        raise DataError(f"{where} is empty: it has no image")
    category_key(source, where)
    _refuse_foreign_paths(source, where, [path, cache or datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE])
    named = bool(label_names) or isinstance(_category_feature(source, where), datasets.ClassLabel)
    sources = {where: source}
    for other in () if named else other_splits:
        if other != split:
            name = f"{path}, split {other!r}"
            sources[name] = _with_image_column(_open(path, other, config, cache), name)
    vocabulary = _vocabulary(sources, label_names, category_ids, where)
    fingerprint, folder = source._fingerprint, Path(path).expanduser() / split_and_part(split)[0]
    if on_error == "skip" and (folder / METADATA).is_file():  # images that were left out may be put right later
        fingerprint += f"-{files_hash(folder)}"

    def make() -> ColumnAnnotations:
        builder = ColumnAnnotations(
            cache_dir=cache,
            dataset_name="crosskd_columns",
            fingerprint=fingerprint,
            where=where,
            box_format=box_format,
            box_unit=box_unit,
            names=vocabulary.names,
            category_ids=vocabulary.category_ids,
            on_error=on_error,
        )
        builder.source, builder.vocabulary = source, vocabulary
        return builder

    builder = open_cache(make, cache)
    annotations = builder.as_dataset(split=SPLIT_NAME)
    ids, problems = read_cache_note(annotations.info, where)
    images = source.select_columns(["image"])
    if len(annotations) != len(images):
        images = images.select(annotations["row"][:])
    both = datasets.concatenate_datasets([annotations.remove_columns(["row"]), images], axis=1)
    both = both.cast_column("image", datasets.Image())
    return DetectionSplit(both, vocabulary.names, ids, problems, split, path)


def _open(path: str, split: str, config: str | None, cache_dir: str | None) -> datasets.Dataset:
    folder = Path(path).expanduser()
    base, part = split_and_part(split)
    try:
        if folder.is_dir():
            if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
                return take_part(_from_disk(folder, base), part)
            _check_metadata(folder)
            if base in {file.parent.name for file in folder.glob(f"*/{METADATA}")}:
                return take_part(_from_image_folder(folder / base, cache_dir), part)
            path = str(folder)  # `datasets` knows more names of splits, such as validation for val/, and sums of them
        elif Path(path).expanduser().is_absolute() or (folder.parent.is_dir() and folder.parent != Path()):
            raise FileNotFoundError("there is no such folder")  # before the Hub is asked for it, again and again
        builder = open_cache(lambda: datasets.load_dataset_builder(path, config, cache_dir=cache_dir), cache_dir)
        if base not in (*builder.info.splits, "all") and "+" not in split:
            raise DataError(no_such_split(path, split, list(builder.info.splits)))
        return builder.as_dataset(split=split)
    except (DataError, CacheError):
        raise
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise DataError(f"{path}, split {split!r} can't be read: {cause}") from error
    except Exception as error:  # the library raises a dozen kinds of its own
        text = str(error).splitlines()[0] if str(error) else repr(error)
        if not (folder.is_dir() or isinstance(error, FileNotFoundError)):
            text = f"there is no such folder here, and as a Hub id: {text}"
        raise DataError(
            f"{path}, split {split!r} can't be opened as a data set ({text}). data.path "
            "must be a Hub id, or a folder of Parquet files, of save_to_disk, or of images with metadata.jsonl; for a "
            "folder with annotations/ set data.layout=coco."
        ) from error


def _from_disk(folder: Path, split: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.Dataset):
        if split != "train":
            raise DataError(f"{no_such_split(folder, split, ['train'])} (a data set without splits is called train)")
        return saved
    if split not in saved:
        raise DataError(no_such_split(folder, split, list(saved)))
    return saved[split]


def _from_image_folder(folder: Path, cache_dir: str | None) -> datasets.Dataset:
    """The rows of a `metadata.jsonl`. An image that isn't there is one that can't be read, found later with others."""
    file = folder / METADATA
    # The name is a part of the cache's: `datasets` itself knows a file by its time of modification.
    name = f"metadata-{sha256(file)[:16]}"
    builder = open_cache(
        lambda: datasets.load_dataset_builder("json", name, data_files=str(file), cache_dir=cache_dir), cache_dir
    )
    rows = builder.as_dataset(split="train")
    names = rows["file_name"]
    images = datasets.Dataset.from_dict({"image": [str(folder / name) for name in names]})
    images = images.cast_column("image", datasets.Image(decode=False))
    return datasets.concatenate_datasets([images, rows], axis=1)


def _check_metadata(folder: Path) -> None:
    """Name all lines of an image folder's metadata that are wrong; `datasets` names neither line nor file."""
    wrong = []
    for file in sorted(folder.rglob(METADATA)):
        lines = file.read_text(encoding="utf-8").splitlines()
        found = ((number, _metadata_fault(line)) for number, line in enumerate(lines, start=1))
        wrong += [f"{file}, line {number}{fault}" for number, fault in found if fault]
        if not any(map(str.strip, lines)):
            wrong.append(f"{file} is empty: it needs a line for each image, with file_name and objects")
    if wrong:
        more = f"\n  - and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DataError(f"{folder} cannot be used as it is:\n  - " + "\n  - ".join(wrong[:5]) + more)


def images_without_row(path: str, split: str) -> list[str]:
    """Image files in a split's folder that its metadata doesn't name; none where it isn't such a folder."""
    folder = Path(path).expanduser() / split_and_part(split)[0]
    if not (folder / METADATA).is_file():
        return []
    lines = (folder / METADATA).read_text(encoding="utf-8").splitlines()
    named = {os.path.normpath(json.loads(line)["file_name"]) for line in lines if line.strip()}
    files = (file for file in sorted(folder.rglob("*")) if file.suffix.lower() in IMAGE_EXTENSIONS)
    return [name for name in (str(file.relative_to(folder)) for file in files) if name not in named]


def _metadata_fault(line: str) -> str | None:
    """What is wrong with a line, worded to follow its number."""
    if not line.strip():
        return None
    try:
        name = json.loads(line, object_pairs_hook=unique_keys).get("file_name")
    except DataError as error:
        return f": {error}"
    except (ValueError, AttributeError) as error:
        return f" is no JSON object: {error}"
    if not isinstance(name, str) or not name:
        return f" has no file_name, the image's path relative to {METADATA}"
    if leaves_folder(name):
        return f": file_name {name!r} leaves the image folder; make it relative, without .."
    return None


def _with_image_column(source: datasets.Dataset, where: str) -> datasets.Dataset:
    """The data set with undecoded images in the column `image`."""
    for name in ("image", "objects"):
        if name not in source.column_names:
            raise DataError(
                f"{where} has no column {name!r}, but {', '.join(source.column_names)}. A detection data set has "
                "`image` and `objects` with bbox and category: rename the columns."
            )
    feature = source.features["image"]
    if isinstance(feature, datasets.Value) and feature.dtype not in ("binary", "large_binary"):
        raise DataError(f"{where}: the column image holds {feature.dtype}; cast it with cast_column('image', Image())")
    return source.with_format(None).cast_column("image", datasets.Image(decode=False))


def _objects_feature(source: datasets.Dataset) -> dict[str, Any]:
    """Key -> feature of one object, for a dict of lists and for a list of dicts."""
    feature = source.features["objects"]
    inner = getattr(feature, "feature", feature)
    return inner if isinstance(inner, dict) else {}


def category_key(source: datasets.Dataset, where: str) -> str:
    """The key of `objects` that holds the category.

    Raises:
        DataError: there is neither, or no bbox.
    """
    keys = _objects_feature(source)
    found = [key for key in CATEGORY_KEYS if key in keys]
    if not found or "bbox" not in keys:
        raise DataError(
            f"{where}: objects must have bbox and category (or category_id), but has {', '.join(keys) or 'no keys'}"
        )
    return found[0]


def _category_feature(source: datasets.Dataset, where: str) -> Any:
    feature = _objects_feature(source)[category_key(source, where)]
    return getattr(feature, "feature", feature)


def _refuse_foreign_paths(source: datasets.Dataset, where: str, roots: Sequence[str | os.PathLike[str]]) -> None:
    """A row may name an image instead of holding it; only files of the data set itself are opened."""
    allowed = [Path(root).expanduser().resolve() for root in roots]
    for batch in source.select_columns(["image"]).with_format("arrow").iter(1000):
        column = batch["image"].combine_chunks()
        outside = pc.and_(pc.is_valid(column.field("path")), pc.is_null(column.field("bytes")))
        for name in pc.filter(column.field("path"), outside).to_pylist():
            if not any(Path(name).resolve().is_relative_to(root) for root in allowed):
                raise DataError(
                    f"{where}: the image {printable(name)} lies outside the data set: put it there, or embed its bytes"
                )


def _vocabulary(
    sources: Mapping[str, datasets.Dataset], label_names: Sequence[str], category_ids: Sequence[int], where: str
) -> Vocabulary:
    """The classes of `sources[where]`, and of the other splits too where the data has no names of its own."""
    key, feature = category_key(sources[where], where), _category_feature(sources[where], where)
    if isinstance(feature, datasets.ClassLabel):
        own = list(feature.names)
        names = list(label_names) or own
        if sorted(names) != sorted(own):
            raise DataError(f"{where}: the data's classes are {own}, but data.label_names says {names}")
        ids = list(category_ids) or list(range(len(names)))
        return Vocabulary(tuple(names), tuple(ids), {own.index(name): label for label, name in enumerate(names)})
    if not isinstance(feature, datasets.Value):
        raise DataError(f"{where}: {key} must hold whole numbers or names, one an object, but holds {feature}")
    values = set()
    kinds: dict[type, str] = {}
    for name, source in sources.items():
        own_key = category_key(source, name)
        own_values = {value for row in _object_rows(source) for value in _values(row, own_key)} - {None}
        if odd := sorted({type(value).__name__ for value in own_values} - {"int", "str"}):
            raise DataError(f"{name}: {own_key} must hold whole numbers or names, but holds {', '.join(odd)}")
        kinds.update((type(value), f"{name} ({value!r})") for value in own_values)
        values |= own_values
    if len(kinds) > 1:
        raise DataError(
            f"{key} holds whole numbers in {kinds[int]}, but names in {kinds[str]}: use one of them in all splits"
        )
    if not values:
        raise DataError(f"{where}: no object has a {key}, so that there are no classes")
    if all(isinstance(value, str) for value in values):
        names = list(label_names) or sorted(values)
        labels: dict[int | str, int] = {name: label for label, name in enumerate(names)}
        ids = list(category_ids) or list(range(len(names)))
    else:
        ids = list(category_ids) or (list(range(len(label_names))) if label_names else sorted(values))
        names = list(label_names) or [str(value) for value in ids]
        labels = {value: label for label, value in enumerate(ids)}
    if unknown := sorted(values - set(labels)):
        fields = "data.label_names" if isinstance(unknown[0], str) else "data.label_names and data.category_ids"
        raise DataError(
            f"{where}: objects have the categories {unknown[:5]}, which aren't among {list(labels)[:10]} of {fields}. "
            f"{nearest(str(unknown[0]), list(map(str, labels)))} Add what is missing; data.category_ids gives the "
            "data's number of each name."
        )
    return Vocabulary(tuple(names), tuple(ids), labels)


def _object_rows(source: datasets.Dataset) -> Iterator[Any]:
    for batch in source.select_columns(["objects"]).with_format("arrow").iter(1000):
        yield from batch["objects"].to_pylist()


def _values(row: Any, key: str) -> list[Any]:
    """A key of all objects of an image; None where it is missing."""
    if isinstance(row, dict):
        return list(row.get(key) or [])
    return [obj.get(key) for obj in row or []]


def _records(source: datasets.Dataset, vocabulary: Vocabulary, where: str, problems: Problems) -> list[ImageRecord]:
    key = category_key(source, where)
    optional = [name for name in ("image_id", "file_name", "width", "height") if name in source.column_names]
    columns = {name: source.with_format("arrow", columns=[name])[:][name].to_pylist() for name in optional}
    ids = columns.get("image_id", [])
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        ids = list(range(len(source)))
    if large := [i for i in ids if abs(i) > LARGEST_INTEGER]:
        raise DataError(f"{where}: image_id must have at most 64 bits, got one of {large[0].bit_length()} bits")
    if len(set(ids)) != len(ids):
        twice = collections.Counter(ids).most_common(1)[0][0]
        raise DataError(f"{where}: image id {twice} appears twice; image ids must be unique")
    names = columns.get("file_name") or _file_names(source)
    records, number = [], 0
    for position, row in enumerate(_object_rows(source)):
        objects = []
        boxes, categories = _values(row, "bbox"), _values(row, key)
        given = _values(row, "id") or range(number + 1, number + 1 + len(boxes))
        areas = _values(row, "area") or [None] * len(boxes)
        crowds = _values(row, "iscrowd") or [False] * len(boxes)
        for key_name, values in (("categories", categories), ("id", given), ("area", areas), ("iscrowd", crowds)):
            if len(values) != len(boxes):
                raise DataError(
                    f"{where}: {printable(names[position])} has {len(boxes)} boxes, but {len(values)} {key_name}: "
                    "each list of objects has an entry a box; mend that row"
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


def _file_names(source: datasets.Dataset) -> list[str]:
    names = []
    for batch in source.select_columns(["image"]).with_format("arrow").iter(1000):
        paths = batch["image"].combine_chunks().field("path").to_pylist()
        names += [os.path.basename(path) if path else f"row {len(names) + i}" for i, path in enumerate(paths)]
    return names


def _sources(source: datasets.Dataset) -> Iterable[ImageSource]:
    for row in source.select_columns(["image"]):
        image = row["image"] or {"bytes": b"", "path": None}  # a missing image is an empty file
        yield image["path"] if image["bytes"] is None else image["bytes"]
