"""`crosskd report`: runs side by side in one HTML file that needs nothing else, to look at and to send."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined
from PIL import Image

from ..data.dataset import DetectionDataset
from ..data.split import DetectionSplit
from ..training.evaluation_pictures import example, predicted_boxes, with_boxes
from ..training.metric_table import percent
from ..utils.escaping import printable
from ..utils.files import write_atomically
from ..utils.plots import as_svg, new_figure
from ..weights.loading import load_detector, load_processor
from .matching import Matches, confusion, match
from .model_info import describe_model
from .run_results import ReportError, RunResults, check_comparable, ground_truth, read_run, summary

TEMPLATE = Path(__file__).with_name("report.html")
REPORT_FILE = "report.html"
MOST_CLASSES = 20  # in the table of confusions: the most frequent ones
PICTURES = 6  # of the worst images, and of the best
PICTURE_SIDE = 420  # pixels
POINTS = np.linspace(0, 1, 101)  # recalls of COCO's precisions


@dataclass(frozen=True)
class Cost:
    """What a model costs on this machine."""

    parameters: float
    milliseconds: float
    device: str


def write_report(
    folders: Sequence[Path], output: Path | None = None, threshold: float = 0.3, costs: bool = True
) -> tuple[Path, list[RunResults]]:
    """Compare finished runs in an HTML file.

    Args:
        folders: of the runs; the last one is looked at closely. A teacher that was evaluated on the same images is
            added in front.
        output: of the file; None is `report.html` in the last run's folder.
        threshold: score from which on a detection counts in pictures and confusions.
        costs: load the models, and measure how long an image takes.

    Returns:
        the file, and the runs in it.

    Raises:
        ReportError: a run isn't finished, or two were evaluated on other images.
        RecipeError, DataError, CheckpointError, OSError: data or models can't be read.
    """
    split = ground_truth(folders[-1])
    runs = [read_run(folder, split, name) for folder, name in zip(folders, _names(folders), strict=True)]
    check_comparable([runs[-1], *runs[:-1]])
    runs = [*_teachers(runs, split), *runs]
    path = folders[-1] / REPORT_FILE if output is None else output
    context = {
        "title": f"{runs[-1].name}: report",
        "runs": runs,
        "evaluation": runs[-1].evaluation,
        "threshold": threshold,
        "summary": _summary_rows(runs, [_cost(run) if costs else None for run in runs]),
        "curves": _curves(runs),
        "losses": _loss_curves(runs[-1]),
        "precision": _precision_recall(runs),
        "classes": _class_rows(runs),
        **_looked_at(runs, split, threshold),
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = percent
    environment.filters["printable"] = printable
    write_atomically(path, environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(context))
    return path, runs


def _names(folders: Sequence[Path]) -> list[str]:
    """Names of the folders, with their parents' where they are the same."""
    short = [folder.resolve().name for folder in folders]
    long = ["/".join(folder.resolve().parts[-2:]) for folder in folders]
    return [whole if short.count(name) > 1 else name for name, whole in zip(short, long, strict=True)]


def _teachers(runs: list[RunResults], split: DetectionSplit) -> list[RunResults]:
    """The teachers of the runs, as far as they were evaluated on the same images and aren't among them."""
    known = {run.folder.resolve() for run in runs}
    found = []
    for run in runs:
        teacher = run.teacher
        if teacher is None or teacher.resolve() in known:
            continue
        known.add(teacher.resolve())
        try:
            one = read_run(teacher, split, f"teacher ({teacher.name})")
            check_comparable([runs[-1], one])
        except ReportError:
            continue  # it was trained or evaluated on something else: it can't be compared
        found.append(one)
    return found


def _cost(run: RunResults) -> Cost:
    model = load_detector(str(run.folder))
    info = describe_model(model, load_processor(str(run.folder)), str(run.folder))
    return Cost(info.parameters / 1e6, info.latency_ms, info.device)


def _summary_rows(runs: Sequence[RunResults], costs: Sequence[Cost | None]) -> list[dict[str, Any]]:
    return [
        {"run": run, "values": summary(run), "cost": cost, "gain": _gain(run, runs[-1])}
        for run, cost in zip(runs, costs, strict=True)
    ]


def _gain(run: RunResults, last: RunResults) -> str:
    """AP of the last run minus that of this one, in points."""
    first, second = run.metrics.get("AP", -1), last.metrics.get("AP", -1)
    return "" if run is last or min(first, second) < 0 else f"{100 * (second - first):+.1f}"


# Charts -------------------------------------------------------------------------------------------------------------


def _curves(runs: Sequence[RunResults]) -> str:
    figure = new_figure(6.5, 3.6)
    axes = figure.add_subplot()
    for run in runs:
        if run.curve:
            axes.plot(*_percent_points(run.curve), marker="o", markersize=3, label=_plain(run.name))
    axes.set(xlabel="epoch", ylabel="AP (%)", ylim=(0, None))
    return _finished(figure, axes)


def _loss_curves(run: RunResults) -> str:
    figure = new_figure(6.5, 3.6)
    axes = figure.add_subplot()
    for name, points in run.losses.items():
        axes.plot(*zip(*points, strict=True), label=_plain(name))
    axes.set(xlabel="epoch", ylabel="loss term", yscale="log" if run.losses else "linear")
    return _finished(figure, axes)


def _precision_recall(runs: Sequence[RunResults]) -> str:
    figure = new_figure(6.5, 3.6)
    axes = figure.add_subplot()
    for run in runs:
        known = [one.precision for one in run.classes if one.ap50 >= 0]
        if known:
            axes.plot(100 * POINTS, 100 * np.mean(np.clip(known, 0, 1), axis=0), label=_plain(run.name))
    axes.set(xlabel="recall (%)", ylabel="precision (%)", xlim=(0, 100), ylim=(0, 101))
    return _finished(figure, axes)


def _percent_points(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [100 * y for _, y in points]


def _finished(figure: Any, axes: Any) -> str:
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend(fontsize="small")
    return _data_url("image/svg+xml", as_svg(figure).encode())


def _plain(text: str) -> str:
    # Between two $ matplotlib reads a formula; it hides labels that begin with an underscore.
    return printable(text).replace("$", r"\$").lstrip("_")


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# Tables and pictures ------------------------------------------------------------------------------------------------


def _class_rows(runs: Sequence[RunResults]) -> list[dict[str, Any]]:
    rows = [
        {"name": of_runs[-1].name, "boxes": of_runs[-1].boxes, "of_runs": of_runs}
        for of_runs in zip(*(run.classes for run in runs), strict=True)
    ]
    return sorted(rows, key=lambda row: -row["boxes"])


def _looked_at(runs: Sequence[RunResults], split: DetectionSplit, threshold: float) -> dict[str, Any]:
    """Confusions, and the worst and the best images, of the last run."""
    rows = split.dataset.with_format("arrow", columns=["image_id", "file_name", "objects"])[:].to_pylist()
    outcomes = [_outcome(runs[-1], row, threshold) for row in rows]
    order = sorted(range(len(split)), key=lambda index: (-outcomes[index].errors, index))
    best = [i for i in reversed(order) if outcomes[i].errors == 0 and len(outcomes[i].labels)]
    best.sort(key=lambda index: -len(outcomes[index].labels))
    worst = [index for index in order if outcomes[index].errors]
    dataset = DetectionDataset(split, train=False, short_side=PICTURE_SIDE, long_side=2 * PICTURE_SIDE)

    def shown(index: int) -> dict[str, Any]:
        outcome = outcomes[index]
        return {
            "name": rows[index]["file_name"],
            "right": outcome.right,
            "boxes": len(outcome.labels),
            "made_up": int(outcome.made_up.sum()),
            "pictures": _pictures(runs, dataset, index, threshold),
        }

    return {
        "confusion": _confusion_rows(outcomes, split.label_names),
        "counts": {
            "boxes": sum(len(one.labels) for one in outcomes),
            "right": sum(one.right for one in outcomes),
            "made_up": sum(int(one.made_up.sum()) for one in outcomes),
            "double": sum(int(one.double.sum()) for one in outcomes),
        },
        "worst": [shown(index) for index in worst[:PICTURES]],
        "best": [shown(index) for index in best[:PICTURES]],
    }


def _outcome(run: RunResults, row: dict[str, Any], threshold: float) -> Matches:
    objects = row["objects"]
    kept = [i for i, crowd in enumerate(objects["iscrowd"]) if not crowd]
    boxes = torch.tensor([objects["bbox"][i] for i in kept]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores, labels, found = run.evaluator.detections_of(row["image_id"])
    shown = scores > threshold
    labels_of = torch.tensor([objects["category"][i] for i in kept], dtype=torch.int64)
    return match(boxes, labels_of, torch.from_numpy(found[shown]), torch.from_numpy(labels[shown]).long())


def _confusion_rows(outcomes: list[Matches], names: Sequence[str]) -> dict[str, Any]:
    table = confusion(outcomes, len(names))
    frequent = table[:-1].sum(1).argsort(descending=True, stable=True)[:MOST_CLASSES].sort().values.tolist()
    shown = [*frequent, len(names)]
    rows = table[shown][:, shown]
    shares = rows / table[shown].sum(1, keepdim=True).clamp(min=1)
    return {
        "columns": [*(names[label] for label in frequent), "missed"],
        "rows": [
            {"name": name, "cells": list(zip(counts, parts, strict=True))}
            for name, counts, parts in zip(
                [*(names[label] for label in frequent), "made up"], rows.tolist(), shares.tolist(), strict=True
            )
        ],
        "left_out": len(names) - len(frequent),
    }


def _pictures(
    runs: Sequence[RunResults], dataset: DetectionDataset, index: int, threshold: float
) -> list[tuple[str, str]]:
    """Ground truth and what each run found, as (name, data URL)."""
    image_id, image, truth, factors = example(dataset, index)
    pictures = [("ground truth", with_boxes(image, truth))]
    for run in runs:
        found = predicted_boxes(run.evaluator, image_id, dataset.split.label_names, factors, threshold)
        pictures.append((run.name, with_boxes(image, found)))
    return [(name, _jpeg(picture)) for name, picture in pictures]


def _jpeg(picture: Image.Image) -> str:
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return _data_url("image/jpeg", buffer.getvalue())
