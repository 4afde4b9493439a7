"""`crosskd demo`: see a student get better because of its teacher, offline, on generated images.

Three ordinary runs of two recipes that the package carries: a teacher, a student alone, and the same student with the
same seed and schedule and CrossKD. The same command resumes an interrupted demo from its last checkpoint.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..recipe.load import load_recipe
from ..recipe.run_folder import final_metrics
from ..recipe.sections import Recipe
from ..training.coco_metrics import SUMMARY_NAMES
from ..utils.progress import say
from .report import REPORT_FILE, write_report

TEACHER_RECIPE, STUDENT_RECIPE = "shapes_teacher", "shapes_crosskd"
TEACHER, ALONE, DISTILLED = "teacher", "student alone", "student + CrossKD"


@dataclass(frozen=True)
class Stage:
    """One of the three runs: its name, its recipe and what it was before (`load_recipe`'s arguments)."""

    name: str
    recipe_name: str
    overrides: tuple[str, ...]
    output: Path

    def recipe(self) -> Recipe:
        """The recipe as it runs."""
        return load_recipe(self.recipe_name, self.overrides)

    def command(self) -> str:
        """The same run without the demo."""
        return " ".join(["crosskd train", self.recipe_name, *self.overrides])


def stages(output: Path, seed: int, overrides: list[str]) -> list[Stage]:
    """The demo's three runs."""
    plans = (
        (TEACHER, TEACHER_RECIPE, "teacher", []),
        (ALONE, STUDENT_RECIPE, "alone", ["teacher=null", "distillation=null"]),
        (DISTILLED, STUDENT_RECIPE, "crosskd", [f"teacher.checkpoint={output / 'teacher'}"]),
    )
    common = [*overrides, f"training.seed={seed}"]
    return [
        Stage(name, recipe, (*common, *more, f"training.output_dir={output / folder}"), output / folder)
        for name, recipe, folder, more in plans
    ]


def run_demo(
    output: Path, seed: int, overrides: list[str], train: Callable[[Recipe], None]
) -> dict[str, dict[str, float]]:
    """Train what is not trained yet, print the table, and write the report.

    Args:
        output: folder of the three runs and the report.
        seed: of weights, order and augmentation.
        overrides: `section.key=value`, of both recipes.
        train: runs a recipe, unless it is finished.

    Returns:
        the metrics of each stage.

    Raises:
        RecipeError, ValueError: if a value can't be used, or the output folder holds another run.
    """
    runs = stages(output, seed, overrides)
    started = time.perf_counter()
    for number, stage in enumerate(runs, start=1):
        say(f"\n[{number}/{len(runs)}] {stage.name}: {stage.command()}")
        train(stage.recipe())
    metrics = {}
    for stage in runs:
        metrics[stage.name] = {key.removeprefix("eval_"): value for key, value in final_metrics(stage.output).items()}
    report, _ = write_report([stage.output for stage in runs], output / REPORT_FILE)
    table = format_table(runs, metrics)
    (output / "results.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table}\n\nreport   {report}: curves, classes, pictures, costs")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes")
    return metrics


def format_table(runs: list[Stage], metrics: dict[str, dict[str, float]]) -> str:
    """AP of the three runs in percent, and what CrossKD gave."""
    names = [name for name in SUMMARY_NAMES[:6] if any(metrics[stage.name][name] >= 0 for stage in runs)]
    lines = [f"{'':<20}{'model':<22}" + "".join(f"{name:>8}" for name in names)]
    for stage in runs:
        section = stage.recipe().model
        values = "".join(f"{100 * metrics[stage.name][name]:>8.1f}" for name in names)
        lines.append(f"{stage.name:<20}{section.detector + ' ' + section.backbone:<22}{values}")
    gains = "".join(f"{100 * (metrics[DISTILLED][n] - metrics[ALONE][n]):>+8.1f}" for n in names)
    lines.append(f"{'gain of CrossKD':<42}{gains}")
    return "\n".join(lines)
