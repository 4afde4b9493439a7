"""The `objects` column of a data set, and the classes that it holds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from ..utils.messages import nearest
from .errors import DataError

CATEGORY_KEYS = ("category", "category_id")


@dataclass(frozen=True)
class Vocabulary:
    """The classes of a data set: names and COCO ids by label, and what the `category` column holds -> label."""

    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    labels: dict[int | str, int]


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
    category_keys = [key for key in CATEGORY_KEYS if key in keys]
    if not category_keys or "bbox" not in keys:
        raise DataError(
            f"{where}: objects must have bbox and category (or category_id), but has {', '.join(keys) or 'no keys'}"
        )
    return category_keys[0]


def category_feature(source: datasets.Dataset, where: str) -> Any:
    """The feature of one category: `ClassLabel` if the data set has class names of its own."""
    feature = _objects_feature(source)[category_key(source, where)]
    return getattr(feature, "feature", feature)


def object_rows(source: datasets.Dataset) -> Iterator[Any]:
    """The `objects` of each image."""
    for batch in source.select_columns(["objects"]).with_format("arrow").iter(1000):
        yield from batch["objects"].to_pylist()


def object_values(row: Any, key: str) -> list[Any]:
    """A key of all objects of an image; None where it is missing."""
    if isinstance(row, dict):
        return list(row.get(key) or [])
    return [obj.get(key) for obj in row or []]


def build_vocabulary(
    sources: Mapping[str, datasets.Dataset], label_names: Sequence[str], category_ids: Sequence[int], where: str
) -> Vocabulary:
    """The classes of `sources[where]`, and of the other splits too where the data has no names of its own.

    Args:
        sources: splits, by what messages call them.
        label_names, category_ids: see `load_columns`.
        where: the split that is loaded.

    Raises:
        DataError: categories of no or two types, or that `label_names` and `category_ids` don't list.
    """
    key, feature = category_key(sources[where], where), category_feature(sources[where], where)
    if isinstance(feature, datasets.ClassLabel):
        names = list(label_names) or feature.names
        if sorted(names) != sorted(feature.names):
            raise DataError(f"{where}: the data's classes are {feature.names}, but data.label_names says {names}")
        labels: dict[int | str, int] = {feature.names.index(name): label for label, name in enumerate(names)}
        return Vocabulary(tuple(names), tuple(category_ids) or tuple(range(len(names))), labels)
    if not isinstance(feature, datasets.Value):
        raise DataError(f"{where}: {key} must hold whole numbers or names, one an object, but holds {feature}")
    values = _categories(sources, where)
    if all(isinstance(value, str) for value in values):
        names = list(label_names) or sorted(values)
        ids = list(category_ids) or list(range(len(names)))
        labels = {name: label for label, name in enumerate(names)}
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


def _categories(sources: Mapping[str, datasets.Dataset], where: str) -> set[Any]:
    """All categories of some splits: whole numbers only, or names only."""
    values: set[Any] = set()
    kinds: dict[type, str] = {}
    for name, source in sources.items():
        key = category_key(source, name)
        for value in {value for row in object_rows(source) for value in object_values(row, key)} - {None}:
            if type(value) not in (int, str):
                raise DataError(f"{name}: {key} must hold whole numbers or names, but holds {type(value).__name__}")
            kinds[type(value)] = f"{name} ({value!r})"
            values.add(value)
    key = category_key(sources[where], where)
    if len(kinds) > 1:
        raise DataError(
            f"{key} holds whole numbers in {kinds[int]}, but names in {kinds[str]}: use one of them in all splits"
        )
    if not values:
        raise DataError(f"{where}: no object has a {key}, so that there are no classes")
    return values
