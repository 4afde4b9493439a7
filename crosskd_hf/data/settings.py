"""Settings of a data set: where it lies, how its boxes are written, and how its images are resized."""

import string
from dataclasses import dataclass
from typing import Any

from ..utils.recipe_fields import MOST_PIXELS, Problem, default_of, setting, settings_of
from .augment import augmentation
from .box_formats import FORMATS, UNITS


@dataclass
class DataSection:
    """A data set, and how its images are resized."""

    layout: str = setting(
        "auto",
        "coco: annotation files and image folders; yolo: data.yaml and label files; voc: XML files; datasets: a Hub "
        "id, or a folder of Parquet files, of save_to_disk or of images with metadata.jsonl; auto: which of these it "
        "is; shapes: generated images",
        ("auto", "coco", "yolo", "voc", "datasets", "shapes"),
    )
    path: str = setting("data/coco", "folder of the data set, or its Hub id")
    train_split: str = setting("train2017", "split to train on")
    val_split: str = setting("val2017", "split to evaluate on")
    annotations: str = setting("annotations/instances_{split}.json", "layout coco: annotation file inside the folder")
    images: str = setting("{split}", "layout coco: image folder inside the folder")
    config: str | None = setting(None, "layout datasets: configuration of a Hub data set that has several")
    columns: dict[str, str] = setting(  # noqa: RUF009
        {},
        "layout datasets: boxes, labels, image, area, iscrowd, image_id, file_name -> the column that holds it, or "
        "column.key; empty: image and objects",
    )
    streaming: bool = setting(
        False, "layout datasets: read training images while they are trained on; needs training.max_steps"
    )
    shuffle_buffer: int = setting(
        1000, "layout datasets, streaming: images that each worker shuffles at a time", minimum=0
    )
    box_format: str = setting("xywh", "layout datasets: order of a box's numbers", FORMATS)
    box_unit: str = setting("pixel", "layout datasets: pixel, or relative to the image (0..1)", UNITS)
    # setting() copies a list.
    label_names: list[str] = setting(  # noqa: RUF009
        [], "layout datasets or voc: class names by label, where the data has none"
    )
    category_ids: list[int] = setting([], "layout datasets: the data's number of each of label_names")  # noqa: RUF009
    first_pixel: int = setting(
        1, "layout voc: number of the first pixel; some tools count from 0", minimum=0, maximum=1
    )
    on_error: str = setting(
        "stop", "an unreadable image or impossible box: stop, or skip and report", ("stop", "skip")
    )
    shapes_side: int = setting(
        128, "layout shapes: longer side of a generated image, in pixels", minimum=32, maximum=MOST_PIXELS
    )
    shapes_difficulty: float = setting(0.5, "layout shapes: 0 is easy, 1 hard", minimum=0, maximum=1)
    shapes_seed: int = setting(0, "layout shapes: seed of the generated images", minimum=0)
    short_side: int = setting(800, "pixels that an image's short side is resized to", minimum=1, maximum=MOST_PIXELS)
    long_side: int = setting(1333, "pixels that its long side doesn't exceed", minimum=1, maximum=MOST_PIXELS)
    # setting() copies a list.
    size: list[int] | None = setting(  # noqa: RUF009
        None,
        "detectors of transformers: [height, width] of every image, whose ratio isn't kept; null: as their processor",
        minimum=32,
        maximum=MOST_PIXELS,
    )
    multiscale: str = setting(
        "none",
        "training short side: fixed, of a range, of a list; batch: height and width of a batch, of a list (detectors "
        "of transformers)",
        ("none", "range", "choice", "batch"),
    )
    # setting() copies a list.
    multiscale_short_sides: list[int] = setting(  # noqa: RUF009
        [], "pixels: the range's two ends, or the list", minimum=1, maximum=MOST_PIXELS
    )
    flip_probability: float = setting(
        0.5, "probability of a horizontal flip; with augment the list says it", minimum=0, maximum=1
    )
    augment: list[str | dict[str, Any]] | None = setting(  # noqa: RUF009
        None,
        "augmentations in their order: flip, photometric_distort, zoom_out, iou_crop, each a name or {name: options}; "
        "null: a flip of flip_probability",
    )
    plain_epochs: int = setting(0, "of augment, only flip is applied in this many last epochs", minimum=0)
    filter_empty: bool = setting(True, "leave training images without any annotation out")
    min_image_side: int = setting(32, "pixels; training images with a shorter side are left out", minimum=0)
    max_train_images: int | None = setting(None, "train on the first images only", minimum=1)
    max_val_images: int | None = setting(None, "evaluate on the first images only", minimum=1)
    unlabeled: str | None = setting(
        None, "unlabelled images that are distilled on, too: folder of images, or a data set's folder or Hub id"
    )
    unlabeled_ratio: float = setting(1.0, "unlabelled batches per labelled batch", minimum=0, maximum=1000)
    unlabeled_split: str = setting("train", "split of such a data set")
    unlabeled_images: str | None = setting(
        None, "COCO file inside the folder, whose boxes are ignored: only the images that it lists; null: all"
    )
    cache_dir: str | None = setting(None, "folder of the Arrow cache; null: that of datasets")


def data_problems(data: DataSection) -> list[Problem]:
    """Combinations of settings that can't be."""
    problems = [*_layout_problems(data), *_augment_problems(data), *_streaming_problems(data)]
    sides = data.multiscale_short_sides
    names = ("data.multiscale", "data.multiscale_short_sides")
    if data.multiscale == "range" and not (len(sides) == 2 and sides[0] < sides[1]):
        problems.append((names, f"data.multiscale range needs multiscale_short_sides [lowest, highest], not {sides}."))
    if data.multiscale == "choice" and not sides:
        problems.append((names, "data.multiscale choice needs values in multiscale_short_sides."))
    if data.multiscale == "batch" and not sides:
        problems.append((names, "data.multiscale batch needs sides in multiscale_short_sides, such as [480, 640]."))
    if data.size is not None and len(data.size) != 2:
        problems.append((("data.size",), f"data.size {data.size} must be [height, width]."))
    if data.multiscale == "none" and sides:
        text = f"data.multiscale is none, but multiscale_short_sides is {sides}: set range, choice or batch."
        problems.append((names, text))
    if data.long_side < data.short_side:
        text = f"data.long_side {data.long_side} is below data.short_side {data.short_side}."
        problems.append((("data.long_side", "data.short_side"), text))
    if sides and max(sides) > data.long_side and data.multiscale != "batch":
        text = f"data.multiscale_short_sides goes up to {max(sides)}, above data.long_side {data.long_side}."
        problems.append((("data.multiscale_short_sides", "data.long_side"), text))
    for name in ("annotations", "images"):
        try:
            placeholders = {field for _, field, _, _ in string.Formatter().parse(getattr(data, name))} - {None}
        except ValueError:
            placeholders = {"?"}
        if not placeholders <= {"split"}:
            text = f"data.{name} {getattr(data, name)!r} may only have the placeholder {{split}}."
            problems.append(((f"data.{name}",), text))
    return problems


def _streaming_problems(data: DataSection) -> list[Problem]:
    if not data.streaming:
        return []
    reasons = {
        "plain_epochs": data.plain_epochs and "a stream has no last epochs",
        "unlabeled": data.unlabeled is not None and "unlabelled images can't be mixed into a stream",
        "max_train_images": data.max_train_images is not None and "a stream is read from its beginning to its end",
        "layout": data.layout not in ("auto", "datasets") and "only layout datasets can be streamed",
    }
    return [
        (
            (f"data.{name}", "data.streaming"),
            f"data.{name} is {getattr(data, name)}, but data.streaming true: {reason}.",
        )
        for name, reason in reasons.items()
        if reason
    ]


def _augment_problems(data: DataSection) -> list[Problem]:
    problems: list[Problem] = []
    for item in data.augment or []:
        try:
            augmentation(item)
        except ValueError as error:
            problems.append((("data.augment",), f"data.augment: {error}."))
    if data.augment is not None and data.flip_probability != DataSection.flip_probability:
        text = (
            f"data.flip_probability is {data.flip_probability}, but with data.augment the list says it: leave "
            f"flip_probability out, and write {{flip: {{probability: {data.flip_probability}}}}} there."
        )
        problems.append((("data.augment", "data.flip_probability"), text))
    if data.plain_epochs and not data.augment:
        text = f"data.plain_epochs is {data.plain_epochs}, but data.augment is {data.augment}: it has nothing to stop."
        problems.append((("data.plain_epochs", "data.augment"), text))
    return problems


def _layout_problems(data: DataSection) -> list[Problem]:
    problems: list[Problem] = []
    if data.layout == "shapes":
        for name in ("max_train_images", "max_val_images"):
            if getattr(data, name) is None:
                text = f"data.{name} is missing: layout shapes generates that many images."
                problems.append(((f"data.{name}",), text))
    for f in settings_of(DataSection):
        before, colon, _ = f.metadata["help"].partition(":")
        layouts = before.removeprefix("layout ").split(" or ") if colon and before.startswith("layout ") else []
        if layouts and data.layout not in (*layouts, "auto") and getattr(data, f.name) != default_of(f):
            text = f"data.{f.name} is for layout {' or '.join(layouts)}, but data.layout is {data.layout}."
            problems.append(((f"data.{f.name}", "data.layout"), text))
    if data.category_ids and len(data.category_ids) != len(data.label_names):
        text = (
            f"data.category_ids has {len(data.category_ids)} numbers, but label_names {len(data.label_names)} names."
        )
        problems.append((("data.category_ids", "data.label_names"), text))
    for name in ("category_ids", "label_names"):
        values = getattr(data, name)
        if len(set(values)) != len(values):
            problems.append(((f"data.{name}",), f"data.{name} has a value twice: {values}."))
    return problems
