"""Settings of a data set -> splits and data sets."""

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow.compute as pc

from ..utils.label_names import loosely
from .coco import load_coco
from .columns import load_columns
from .dataset import DetectionDataset
from .errors import DataError
from .layouts import with_layout
from .settings import DataSection
from .shapes import load_shapes
from .split import DetectionSplit, keep_for_training, split_and_part
from .stream import DetectionStream, StreamedSplit, load_stream
from .unlabeled import load_unlabeled
from .voc import load_voc
from .yolo import load_yolo


def load_split(data: DataSection, name: str, limit: int | None = None) -> DetectionSplit:
    """A split of a recipe's data set.

    Args:
        data: the recipe's section.
        name: of the split, or a slice such as "train[:80%]".
        limit: only the first images; layout shapes generates this many. Its slices are of `max_train_images`, whoever
            asks, so that "train[:80%]" and "train[80%:]" have no image in common.

    Raises:
        FileNotFoundError, ValueError: the data can't be used; all that is wrong is told together.
        CacheError: see `open_cache`.
    """
    data = with_layout(data)
    if data.layout == "shapes":
        is_slice = bool(split_and_part(name)[1])
        whole = load_shapes(
            name,
            (data.max_train_images if is_slice else limit) or 0,
            side=data.shapes_side,
            difficulty=data.shapes_difficulty,
            seed=data.shapes_seed,
            cache_dir=data.cache_dir,
        )
    elif data.layout == "datasets":
        whole = _load_columns(data, name, limit)
    elif data.layout == "yolo":
        whole = load_yolo(data.path, name, on_error=data.on_error, cache_dir=data.cache_dir)
    elif data.layout == "voc":
        whole = load_voc(
            data.path,
            name,
            label_names=data.label_names,
            first_pixel=data.first_pixel,
            on_error=data.on_error,
            cache_dir=data.cache_dir,
        )
    else:
        whole = load_coco(
            data.path,
            name,
            annotations=data.annotations,
            images=data.images,
            on_error=data.on_error,
            cache_dir=data.cache_dir,
        )
    return whole.first(limit)


def _load_columns(data: DataSection, name: str, limit: int | None) -> DetectionSplit:
    return load_columns(
        data.path,
        name,
        columns=data.columns,
        other_splits=(data.train_split, data.val_split),
        config=data.config,
        box_format=data.box_format,
        box_unit=data.box_unit,
        label_names=data.label_names,
        category_ids=data.category_ids,
        on_error=data.on_error,
        cache_dir=data.cache_dir,
        streamed=data.streaming,
        limit=limit,
    )


def load_datasets(data: DataSection, seed: int) -> tuple[DetectionDataset | DetectionStream, DetectionDataset]:
    """The training and the evaluation set of a recipe. Only the first can be a stream.

    Args:
        data: the recipe's section.
        seed: of the augmentation.

    Raises:
        FileNotFoundError, ValueError: the data can't be used, or there is nothing to train or evaluate on.
    """
    evaluated = load_split(data, data.val_split, data.max_val_images)
    check_evaluable(evaluated, data.val_split)
    return (
        load_training_set(data, evaluated, seed),
        DetectionDataset(evaluated, train=False, short_side=data.short_side, long_side=data.long_side),
    )


def load_training_set(data: DataSection, evaluated: DetectionSplit, seed: int) -> DetectionDataset | DetectionStream:
    """The training set of a recipe, with the classes of its evaluation set.

    Args:
        data: the recipe's section.
        evaluated: the evaluation set.
        seed: of the augmentation.

    Raises:
        FileNotFoundError, ValueError: the data can't be used, or there is nothing to train on.
    """
    names = (data.train_split, data.val_split)
    options = {"train": True, "seed": seed, **_training_options(data)}
    if data.streaming:
        stream = _open_stream(data)
        check_same_classes(stream.label_names, evaluated.label_names, names)
        return DetectionStream(stream, **options)
    generated = data.layout == "shapes"
    whole = load_split(data, data.train_split, data.max_train_images if generated else None)
    check_same_classes(whole.label_names, evaluated.label_names, names)
    # The limit counts images that are trained on.
    train = keep_for_training(whole, filter_empty=data.filter_empty, min_image_side=data.min_image_side)
    return DetectionDataset(train if generated else train.first(data.max_train_images), **options)


def _open_stream(data: DataSection) -> StreamedSplit:
    if (layout := with_layout(data).layout) != "datasets":
        raise DataError(f"data.streaming is for layout datasets; {data.path} has layout {layout}: set it to false")
    return load_stream(
        data.path,
        data.train_split,
        columns=data.columns,
        config=data.config,
        box_format=data.box_format,
        box_unit=data.box_unit,
        label_names=data.label_names,
        category_ids=data.category_ids,
        on_error=data.on_error,
        filter_empty=data.filter_empty,
        min_image_side=data.min_image_side,
        shuffle_buffer=data.shuffle_buffer,
    )


def load_unlabeled_dataset(data: DataSection, seed: int) -> DetectionDataset | None:
    """The unlabelled images of a recipe, augmented as the labelled ones; None if there are none.

    Args:
        data: the recipe's section.
        seed: of the augmentation.

    Raises:
        FileNotFoundError, ValueError: the data can't be used.
    """
    if data.unlabeled is None:
        return None
    split = load_unlabeled(
        data.unlabeled,
        data.unlabeled_split,
        data.unlabeled_images,
        on_error=data.on_error,
        cache_dir=data.cache_dir,
    )
    split = keep_for_training(split, filter_empty=False, min_image_side=data.min_image_side)
    return DetectionDataset(split, train=True, seed=seed, **_training_options(data))


def _training_options(data: DataSection) -> dict[str, Any]:
    names = ("short_side", "long_side", "multiscale", "multiscale_short_sides", "flip_probability", "augment")
    return {name: getattr(data, name) for name in (*names, "plain_epochs")}


def check_same_classes(one: Sequence[str], other: Sequence[str], names: tuple[str, str]) -> None:
    """Raise DataError if two splits don't have the same classes in the same order: a label would mean two things.

    Args:
        one, other: class names of the training and of the evaluation set.
        names: what they are called.
    """
    if list(one) == list(other):
        return
    texts = []
    for name, classes, others in ((names[0], one, other), (names[1], other, one)):
        if only := [repr(label) for label in classes if label not in others]:
            texts.append(f"only {name!r} has {', '.join(only[:10])}")
    texts += [f"{' and '.join(map(repr, group))} differ only by case or blanks" for group in alike([*one, *other])]
    order = f"another order, {', '.join(one[:5])} and {', '.join(other[:5])}"
    raise DataError(f"the splits {names[0]!r} and {names[1]!r} have different classes: {'; '.join(texts) or order}")


def alike(names: Iterable[str]) -> list[list[str]]:
    """Groups of different class names that are the same one but for case, blanks, underscores and hyphens."""
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        groups.setdefault(loosely(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def check_evaluable(split: DetectionSplit, name: str) -> None:
    """Raise DataError if a split has no box to find: every metric would be undefined."""
    objects = split.dataset.with_format("arrow", columns=["objects"])[:]["objects"]
    crowds = pc.list_flatten(pc.struct_field(objects, "iscrowd"))
    if len(crowds) == (pc.sum(crowds).as_py() or 0):
        raise DataError(
            f"the split {name!r} has {len(split)} images, but no box (crowds don't count): there is nothing to "
            "evaluate on. Set data.val_split to a split with boxes."
        )
