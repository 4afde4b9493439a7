"""What is in a data set and what is wrong with it, before any training."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.duplicates import Entry, find_duplicates, find_shared, read_entries
from ..data.errors import DataError, Kind
from ..data.image_folder import images_without_row
from ..data.layouts import with_layout
from ..data.load import alike, check_same_classes, load_split, load_unlabeled_dataset
from ..data.settings import DataSection
from ..data.split import DetectionSplit, keep_for_training
from ..utils.escaping import file_name, printable, printable_lines
from ..utils.images import load_rgb, resized_size
from ..utils.plots import bars, new_figure, save_figure
from ..utils.progress import say
from ..utils.visualization import contact_sheet, draw_boxes, label_color

# Square roots of box areas, in pixels; 32 and 96 are COCO's limits of small and medium.
STREAMED = 2000  # rows of a stream that are looked at
SIZE_EDGES = (0, 8, 16, 32, 64, 96, 128, 256, 512, float("inf"))
MANY_CLASSES, SAMPLES = 30, 6


@dataclass(frozen=True)
class Report:
    """What a split holds.

    Attributes:
        name: of the split.
        lines: the report as text.
        classes: class -> number of boxes that aren't crowds.
        sizes: range of the box's side (square root of its area, in pixels as the model sees it) -> number.
        split: the data itself.
        entries: its rows with the hashes of their images.
        stopped: whether training would refuse this data because of what on_error=skip leaves out.
        empty: whether no image is left to train on.
    """

    name: str
    lines: list[str]
    classes: dict[str, int]
    sizes: dict[str, int]
    split: DetectionSplit
    entries: list[Entry]
    stopped: bool
    empty: bool


def check_data(data: DataSection, output: Path) -> str | None:
    """Report on both splits: printed, and written with charts and sample pictures.

    Args:
        data: which data set.
        output: folder of the report; it is made.

    Returns:
        why training would refuse the data; None if it wouldn't.

    Raises:
        FileNotFoundError, DataError: there is no data to report on.
    """
    reports = [report(data, data.train_split, training=True), report(data, data.val_split, training=False)]
    refused, between = compare(*reports)
    parts = [*(r.lines for r in reports), between]
    if unlabeled := load_unlabeled_dataset(data, seed=0):
        parts.append([f"unlabelled, {printable(data.unlabeled)}: {len(unlabeled)} images"])
    text = printable_lines("\n\n".join("\n".join(lines) for lines in parts))
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    for r in reports:
        draw_report(r, output / f"{file_name(r.name)}.png")
        samples(r.split).save(output / f"{file_name(r.name)}_samples.png")
    say(f"\nwritten to {output}: report.txt, and for each split a chart and sample pictures")
    unusable = refused or any(r.empty for r in reports)
    if unusable or any(r.stopped for r in reports):
        skip = "" if unusable else ", or set data.on_error=skip to leave that out"
        return f"training would stop at this data: mend it{skip}."
    return None


def report(data: DataSection, name: str, *, training: bool) -> Report:
    """Count and describe one split.

    Args:
        data: the recipe's data section. Whatever its `on_error` says, all problems are collected.
        name: of the split.
        training: whether it is trained on, which leaves some images out.
    """
    limit = data.max_train_images if training else data.max_val_images
    if data.streaming and training:
        limit = STREAMED
    split = load_split(
        replace(data, on_error="skip"), name, limit if data.layout == "shapes" or data.streaming else None
    )
    table = split.dataset.with_format("arrow", columns=["width", "height", "objects"])[:].to_pydict()
    widths, heights = np.array(table["width"]), np.array(table["height"])
    crowds = [crowd for objects in table["objects"] for crowd in objects["iscrowd"]]
    labels = np.array([label for objects in table["objects"] for label in objects["category"]], dtype=int)
    classes = {n: int(((labels == i) & ~np.array(crowds, dtype=bool)).sum()) for i, n in enumerate(split.label_names)}
    sizes = box_sizes(table, data.short_side, data.long_side)
    stopping = split.problems.lines(stopping=True)
    counts = [len(objects["id"]) for objects in table["objects"]]
    lines = [
        f"{printable(name)}: {len(split)} images, {sum(counts)} boxes ({sum(crowds)} of them crowds), "
        f"{len(classes)} classes",
        f"  images without any box: {counts.count(0)}; boxes per image: {np.mean(counts):.1f} on average, "
        f"{max(counts)} at most",
        f"  image sizes: {widths.min()} x {heights.min()} to {widths.max()} x {heights.max()} pixels; "
        f"wide {int((widths > heights).sum())}, upright {int((widths < heights).sum())}, "
        f"square {int((widths == heights).sum())}; longest side up to "
        f"{(np.maximum(widths, heights) / np.minimum(widths, heights)).max():.1f} x the other",
    ]
    if data.streaming and training:
        lines.append(f"  streamed: only its first {STREAMED} rows are looked at here")
    unusable = []
    if training:
        try:
            kept = keep_for_training(split, filter_empty=data.filter_empty, min_image_side=data.min_image_side)
            used = len(kept.first(data.max_train_images))
        except ValueError as error:  # no image is left
            unusable, used = [str(error)], 0
        lines.append(f"  trained on: {used} images (filter_empty {data.filter_empty}, min_image_side "
                     f"{data.min_image_side}, max_train_images {data.max_train_images})")  # fmt: skip
    lines += ["  boxes per class:", *_table(classes)]
    lines += [
        f"  box side at the model's input (fit into {data.short_side} x {data.long_side}), pixels:",
        *_table(sizes),
    ]
    entries = read_entries(split)
    duplicates = find_duplicates(entries)
    for file in images_without_row(data.path, name) if with_layout(data).layout == "datasets" else ():
        duplicates.add(Kind.NO_ROW, file)
    notes = [*split.problems.lines(stopping=False), *duplicates.lines()]
    lines.append("  problems:" if stopping or unusable or notes else "  problems: none")
    lines += [f"  ! {line}" for line in (*stopping, *unusable)]
    lines += [f"  - {line}" for line in notes]
    if missing := [n for n, count in classes.items() if not count]:
        lines.append(f"  - {len(missing)} classes have no box: {', '.join(map(printable, missing[:10]))}")
    stopped = bool(stopping) and data.on_error == "stop"
    return Report(name, lines, classes, sizes, split, entries, stopped, empty=bool(unusable))


def compare(train: Report, evaluated: Report) -> tuple[bool, list[str]]:
    """What is wrong with two splits together: whether training would refuse them, and the report as text."""
    name = f"{train.name} and {evaluated.name}"
    if train.name == evaluated.name:
        return False, [f"{name} are one split: what is measured on it says nothing about other images"]
    lines = []
    try:
        check_same_classes(train.split.label_names, evaluated.split.label_names, (train.name, evaluated.name))
    except DataError as error:
        lines.append(f"  ! {error}")
    refused = bool(lines)
    for one, other in ((train, evaluated), (evaluated, train)):
        if only := [n for n, count in one.classes.items() if count and not other.classes.get(n)]:
            lines.append(f"  - {len(only)} classes have boxes in {one.name} only: {', '.join(map(repr, only[:10]))}")
    ids = {n: i for r in (train, evaluated) for n, i in zip(r.split.label_names, r.split.category_ids, strict=True)}
    boxes = {n: train.classes.get(n, 0) + evaluated.classes.get(n, 0) for n in ids}
    if unused := [f"{n!r} (category id {ids[n]})" for n in ids if not boxes[n]]:
        lines.append(f"  - {len(unused)} classes have no box in any split: {', '.join(unused[:10])}")
        if len(unused) == 1 and 0 in (ids[n] for n in ids if not boxes[n]):
            lines.append("    if it is the project's name, as Roboflow writes it, remove it from both files")
    for group in alike(ids):
        lines.append(f"  - class names that differ only by case or blanks: {', '.join(map(repr, group))}")
    lines += [f"  - {line}" for line in find_shared(train.entries, evaluated.entries).lines()]
    return refused, [f"{name}:", *(lines or ["  problems: none"])]


def box_sizes(table: Mapping[str, list], short_side: int, long_side: int) -> dict[str, int]:
    """Numbers of boxes by the side of a square of their area, in pixels of the resized image."""
    sides = []
    for width, height, objects in zip(table["width"], table["height"], table["objects"], strict=True):
        new_height, new_width = resized_size(height, width, short_side, long_side)
        scale = (new_height / height * new_width / width) ** 0.5
        sides += [scale * max(0.0, w * h) ** 0.5 for _, _, w, h in objects["bbox"]]
    counts, _ = np.histogram(sides, bins=SIZE_EDGES)
    names = [f"{low}-{high}" if high != float("inf") else f"{low}-" for low, high in pairwise(SIZE_EDGES)]
    return dict(zip(names, counts.tolist(), strict=True))


def draw_report(report: Report, path: Path) -> None:
    """Class balance, box sizes and orientation as a PNG."""
    shown = dict(sorted(report.classes.items(), key=lambda item: -item[1])[:MANY_CLASSES])
    rest = len(report.classes) - len(shown)
    figure = new_figure(12, max(4.0, 0.22 * len(shown) + 1.5))
    bars(figure, (1, 3, 1), f"{report.name}: boxes per class" + (f" (and {rest} more)" if rest else ""), shown)
    bars(figure, (1, 3, 2), "box side at the input, pixels", report.sizes)
    columns = report.split.dataset.with_format("numpy", columns=["width", "height"])[:]
    axes = figure.add_subplot(1, 3, 3)
    axes.scatter(columns["width"], columns["height"], s=6, alpha=0.5)
    axes.axline((0, 0), slope=1, color="grey", linewidth=0.8)
    axes.set(xlabel="width", ylabel="height", xlim=(0, None), ylim=(0, None))
    axes.set_title("image sizes, pixels (above the line: upright)", fontsize="medium")
    save_figure(figure, path)


def samples(split: DetectionSplit) -> Image.Image:
    """A few evenly spaced images with their boxes."""
    count = min(SAMPLES, len(split))
    tiles = []
    for index in (i * len(split) // count for i in range(count)):
        row = split.dataset.with_format("arrow")[index].to_pylist()[0]
        stored = row["image"]
        image = load_rgb(stored["path"] if stored["bytes"] is None else stored["bytes"])
        labels = row["objects"]["category"]
        corners = np.array([[x, y, x + w, y + h] for x, y, w, h in row["objects"]["bbox"]]).reshape(-1, 4)
        names = [split.label_names[label] for label in labels]
        tiles.append(draw_boxes(image, corners, names, None, [label_color(label) for label in labels]))
    columns = min(3, len(tiles))
    blank = Image.new("RGB", (8, 8), "white")
    tiles += [blank] * (-len(tiles) % columns)
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    return contact_sheet(rows, [""] * columns, tile=400)


def _table(counts: Mapping[str, int]) -> list[str]:
    total = max(1, sum(counts.values()))
    rows = sorted(counts.items(), key=lambda item: -item[1]) if len(counts) > MANY_CLASSES else counts.items()
    lines = [
        f"    {printable(name):<24}{count:>8}{100 * count / total:>7.1f}%" for name, count in list(rows)[:MANY_CLASSES]
    ]
    if len(counts) > MANY_CLASSES:
        lines.append(f"    ... and {len(counts) - MANY_CLASSES} more")
    return lines
