"""What finished runs left behind, read for reports: curves, metrics, predictions, settings."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ..data.load import load_split
from ..data.split import DetectionSplit
from ..hub.upload import METRICS_FILE, RECIPE_FILE, read_recipe
from ..recipe.load import load_data_section
from ..recipe.run_folder import STATE_FILE, WEIGHTS
from ..training.coco_metrics import SETTINGS, SUMMARY_NAMES, ClassResult, CocoEvaluator
from ..training.evaluation_loop import EVALUATION_FOLDER
from ..utils.redact import public

PREDICTIONS_FILE = "eval_predictions.json"
SAME_IMAGES = ("data", "split", "images")  # settings of an evaluation that two comparable runs have in common


class ReportError(ValueError):
    """A run can't be reported on."""


@dataclass(frozen=True)
class RunResults:
    """A finished run.

    Attributes:
        name: of its folder.
        folder: of the run.
        recipe: section -> key -> value, as others may read it.
        metrics: the last evaluation's, 0..1; -1 where no ground truth speaks for a number.
        classes: the same for each class.
        curve: (epoch, AP) of each evaluation.
        losses: name of a loss term -> (epoch, value) of each log.
        evaluator: holds all detections.
        evaluation: of which images, and how.
        megabytes: of the weights' file.
    """

    name: str
    folder: Path
    recipe: dict[str, Any]
    metrics: dict[str, float]
    classes: list[ClassResult]
    curve: list[tuple[float, float]]
    losses: dict[str, list[tuple[float, float]]]
    evaluator: CocoEvaluator
    evaluation: dict[str, Any]
    megabytes: float

    @property
    def detector(self) -> str:
        """What the recipe builds."""
        section = self.recipe.get("model") or {}
        return str(section.get("detector") or section.get("pretrained") or "")

    @property
    def backbone(self) -> str:
        """The backbone, if the recipe names it."""
        section = self.recipe.get("model") or {}
        inner = (section.get("config") or {}).get("backbone_config") or {}
        return str(section.get("backbone") if not inner else inner.get("backbone", ""))

    @property
    def teacher(self) -> Path | None:
        """The folder of the run's teacher, if it is one."""
        checkpoint = (self.recipe.get("teacher") or {}).get("checkpoint")
        return Path(str(checkpoint)) if checkpoint and Path(str(checkpoint)).is_dir() else None

    @property
    def settings(self) -> str:
        """The recipe as YAML."""
        return yaml.safe_dump(public(self.recipe), sort_keys=False, allow_unicode=True)


def ground_truth(folder: Path) -> DetectionSplit:
    """The images that a run was evaluated on.

    Raises:
        ReportError: the folder has no evaluation.
        RecipeError, DataError, OSError: the data can't be read.
    """
    evaluation = _metrics(folder)[SETTINGS]
    recipe = folder / RECIPE_FILE
    if not recipe.is_file():
        raise ReportError(f"{folder} has no {RECIPE_FILE}: a report needs the folder of a run of `crosskd train`")
    data = load_data_section(str(recipe))
    split = load_split(data, evaluation.get("split", data.val_split), data.max_val_images)
    if "images" in evaluation and len(split) != evaluation["images"]:
        raise ReportError(
            f"{folder} was evaluated on {evaluation['images']} images, but its data has {len(split)} now: evaluate it "
            f"again with `crosskd evaluate {folder}`"
        )
    return split


def read_run(folder: Path, split: DetectionSplit, name: str | None = None) -> RunResults:
    """Read a run.

    Args:
        folder: of the run.
        split: see `ground_truth`.
        name: to call it by; None: its folder's.

    Raises:
        ReportError: the run isn't finished, or its predictions are of other images or classes.
    """
    metrics = _metrics(folder)
    evaluation = metrics.pop(SETTINGS)
    evaluator = CocoEvaluator(split)
    try:
        _add_predictions(evaluator, split, _read(folder / EVALUATION_FOLDER / PREDICTIONS_FILE, list))
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(
            f"the predictions of {folder} aren't of the images and classes of this report ({error}): report on runs "
            "that were evaluated on the same split"
        ) from error
    history = _read(folder / STATE_FILE, dict).get("log_history", []) if (folder / STATE_FILE).is_file() else []
    weights = folder / WEIGHTS
    return RunResults(
        name=name or folder.name,
        folder=folder,
        recipe=read_recipe(folder) or {},
        metrics={key.removeprefix("eval_"): value for key, value in metrics.items()},
        classes=evaluator.class_results(),
        curve=[(entry["epoch"], entry["eval_AP"]) for entry in history if "eval_AP" in entry],
        losses=_losses(history),
        evaluator=evaluator,
        evaluation=evaluation,
        megabytes=weights.stat().st_size / 1e6 if weights.is_file() else 0.0,
    )


def check_comparable(runs: list[RunResults]) -> None:
    """Raise ReportError if runs were evaluated on other images or classes than the first."""
    first = runs[0]
    for run in runs[1:]:
        for key in SAME_IMAGES:
            if run.evaluation.get(key) != first.evaluation.get(key):
                raise ReportError(
                    f"{run.folder} and {first.folder} can't be compared: {key} of their evaluations is "
                    f"{run.evaluation.get(key)!r} and {first.evaluation.get(key)!r}"
                )


def summary(run: RunResults) -> list[tuple[str, float]]:
    """The first six of COCO's numbers."""
    return [(name, run.metrics.get(name, -1.0)) for name in SUMMARY_NAMES[:6]]


def _losses(history: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    losses: dict[str, list[tuple[float, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            if name.startswith(("loss_", "kd_", "mimic_", "unlabeled_")) and isinstance(value, float):
                losses.setdefault(name, []).append((entry["epoch"], value))
    return losses


def _add_predictions(evaluator: CocoEvaluator, split: DetectionSplit, results: list[dict[str, Any]]) -> None:
    labels = {category: label for label, category in enumerate(map(int, split.category_ids))}
    rows: dict[int, list[tuple[float, int, list[float]]]] = {}
    for one in results:
        x, y, width, height = one["bbox"]
        row = one["score"], labels[one["category_id"]], [x, y, x + width, y + height]
        rows.setdefault(one["image_id"], []).append(row)
    for image_id, found in rows.items():
        scores, classes, boxes = zip(*found, strict=True)
        detection = {"scores": torch.tensor(scores), "labels": torch.tensor(classes), "boxes": torch.tensor(boxes)}
        evaluator.update([image_id], [detection])


def _metrics(folder: Path) -> dict[str, Any]:
    """The last evaluation's metrics, and of which images they are."""
    metrics = _read(folder / METRICS_FILE, dict)
    if not isinstance(metrics.get(SETTINGS), dict):
        raise ReportError(f"{folder / METRICS_FILE} doesn't say of which images it is: evaluate the run again")
    return metrics


def _read(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        run = path.parent.parent if path.parent.name == "evaluation" else path.parent
        what = f"{path} is missing" if run.is_dir() else f"there is no folder {run}"
        raise ReportError(f"{what}: a report needs the folder of a finished run") from error
    except ValueError as error:
        raise ReportError(f"{path} is no JSON ({error})") from error
    if not isinstance(content, kind):
        raise ReportError(f"{path} holds no {kind.__name__}: it isn't of `crosskd train`")
    return content
