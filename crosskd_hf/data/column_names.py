"""Columns under other names: flat ones, or those of a WebDataset, as the columns `image` and `objects`."""

from collections.abc import Mapping
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from .errors import DataError

# What `data.columns` names -> where it belongs.
OBJECTS = {"boxes": "bbox", "labels": "category", "area": "area", "iscrowd": "iscrowd"}
IMAGE = ("image", "image_id", "file_name")


def with_usual_names(source: datasets.Dataset, columns: Mapping[str, str], where: str) -> datasets.Dataset:
    """The data set with the columns `image` and `objects`; the others are left out.

    Args:
        source: a split.
        columns: `boxes` and `labels`, maybe `image`, `area`, `iscrowd`, `image_id`, `file_name` -> name of the column,
            or column.key where it is a part of one (json.boxes of a WebDataset).
        where: what messages call the split.

    Raises:
        DataError: a name that isn't known or missing, or a column that isn't there.
    """
    if unknown := set(columns) - {*OBJECTS, *IMAGE}:
        raise DataError(f"data.columns has {', '.join(sorted(unknown))}; it takes {', '.join([*IMAGE, *OBJECTS])}")
    if missing := {"boxes", "labels"} - set(columns):
        raise DataError(f"data.columns lacks {' and '.join(sorted(missing))}")
    names = {"image": "image", **columns}
    found = {key: _column(source, name, f"{where}: data.columns.{key}") for key, name in names.items()}
    parts = {OBJECTS[key]: column for key, column in found.items() if key in OBJECTS}
    # Lists of numbers; images keep their place on the disk.
    arrays = [values.combine_chunks() for values, _ in parts.values()]
    table = {"objects": pa.StructArray.from_arrays(arrays, names=list(parts))}
    features: dict[str, Any] = {"objects": {name: feature for name, (_, feature) in parts.items()}}
    for key in found.keys() & set(IMAGE):
        table[key], features[key] = found[key]
    return datasets.Dataset(
        datasets.table.InMemoryTable(pa.table(table)),
        datasets.DatasetInfo(features=datasets.Features({name: features[name] for name in table})),
        fingerprint=datasets.fingerprint.Hasher.hash((source._fingerprint, sorted(names.items()))),
    )


def _column(source: datasets.Dataset, name: str, what: str) -> tuple[pa.ChunkedArray, Any]:
    """Values and feature of a column, or of a part of one."""
    top, *parts = [name] if name in source.column_names else name.split(".")
    if top not in source.column_names:
        raise DataError(f"{what} is {name}, but the columns are {', '.join(source.column_names)}")
    values, feature = source.with_format("arrow", columns=[top])[:][top], source.features[top]
    for part in parts:
        if not isinstance(feature, dict) or part not in feature:
            there = ", ".join(feature) if isinstance(feature, dict) else "no parts"
            raise DataError(f"{what} is {name}, but {top} has {there}")
        values, feature = pc.struct_field(values, part), feature[part]
    return values, feature
