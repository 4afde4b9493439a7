"""`crosskd demo`: see a student get better because of its teacher, offline, on generated images.

A student alone, and the same student with the same seed and schedule and CrossKD: ordinary runs of a recipe that the
package carries. It carries the teacher, too, which `benchmarks/demo_teacher.py` made of a `crosskd demo --full`.
That trains the teacher, too, and the students for longer. The same command resumes an interrupted demo.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..data.load import load_split
from ..hub.upload import RECIPE_FILE
from ..recipe.load import load_recipe
from ..recipe.run_folder import final_metrics
from ..recipe.sections import Recipe
from ..training.coco_metrics import SUMMARY_NAMES
from ..training.run_log import use_run_log
from ..training.trainer import DetectionTrainer
from ..utils.progress import say
from ..weights.loading import load_detector, load_processor
from .report import REPORT_FILE, write_report

TEACHER_RECIPE, STUDENT_RECIPE = "shapes_teacher", "shapes_crosskd"
TEACHER, ALONE, DISTILLED = "teacher", "student alone", "student + CrossKD"
SHIPPED_TEACHER = Path(__file__).with_name("demo_teacher")
SHORT = (
    *("training.num_train_epochs=3", "training.lr_milestones=[2.2,2.8]", "training.warmup_steps=60"),
    "training.eval_steps=366",  # once, at the end
)


@dataclass(frozen=True)
class Stage:
    """One of the runs: its name, its recipe and what it was before (`load_recipe`'s arguments)."""

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


def stages(output: Path, seed: int, overrides: list[str], full: bool = False) -> list[Stage]:
    """The demo's runs; the teacher is one if it is `full`."""
    plans: tuple[tuple[str, str, str, list[str]], ...] = (
        (TEACHER, TEACHER_RECIPE, "teacher", []),
        (ALONE, STUDENT_RECIPE, "alone", ["teacher=null", "distillation=null"]),
        (DISTILLED, STUDENT_RECIPE, "crosskd", [f"teacher.checkpoint={output / 'teacher'}"]),
    )
    common = [*([] if full else SHORT), *overrides, f"training.seed={seed}"]
    return [
        Stage(name, recipe, (*common, *more, f"training.output_dir={output / folder}"), output / folder)
        for name, recipe, folder, more in plans
        if full or name != TEACHER
    ]


def place_teacher(folder: Path, overrides: list[str]) -> dict[str, float]:
    """Put the package's teacher into a folder, evaluated there like a run of the demo.

    Args:
        folder: of a run.
        overrides: as of `run_demo`.

    Returns:
        its metrics.
    """
    recipe = load_recipe(TEACHER_RECIPE, [*overrides, f"training.output_dir={folder}"])
    model, processor = load_detector(str(SHIPPED_TEACHER)), load_processor(str(SHIPPED_TEACHER))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    recipe.save(folder / RECIPE_FILE)
    split = load_split(recipe.data, recipe.data.val_split, recipe.data.max_val_images)
    trainer = DetectionTrainer(model, recipe.training_arguments(), eval_dataset=split, processing_class=processor)
    use_run_log(trainer)
    return trainer.evaluate()


def run_demo(
    output: Path, seed: int, overrides: list[str], train: Callable[[Recipe], None], full: bool = False
) -> dict[str, dict[str, float]]:
    """Train what is not trained yet, print the table, and write the report.

    Args:
        output: folder of the runs and the report.
        seed: of weights, order and augmentation.
        overrides: `section.key=value`, of both recipes.
        train: runs a recipe, unless it is finished.
        full: train the teacher, too, and the students for longer.

    Returns:
        the metrics of each stage.

    Raises:
        RecipeError, ValueError: if a value can't be used, or the output folder holds another run.
    """
    runs = stages(output, seed, overrides, full)
    started = time.perf_counter()
    measured = {} if full else {TEACHER: place_teacher(output / "teacher", overrides)}
    for number, stage in enumerate(runs, start=1):
        say(f"\n[{number}/{len(runs)}] {stage.name}: {stage.command()}")
        train(stage.recipe())
    measured |= {stage.name: final_metrics(stage.output) for stage in runs}
    metrics = {name: {key.removeprefix("eval_"): v for key, v in one.items()} for name, one in measured.items()}
    report, _ = write_report([output / "teacher", output / "alone", output / "crosskd"], output / REPORT_FILE)
    table = format_table(metrics)
    (output / "results.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table}\n\nreport   {report}: curves, classes, pictures, costs")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes")
    return metrics


def format_table(metrics: dict[str, dict[str, float]]) -> str:
    """AP of the three models in percent, and what CrossKD gave."""
    names = [name for name in SUMMARY_NAMES[:6] if any(one[name] >= 0 for one in metrics.values())]
    lines = [f"{'':<20}{'model':<22}" + "".join(f"{name:>8}" for name in names)]
    for stage, one in metrics.items():
        section = load_recipe(TEACHER_RECIPE if stage == TEACHER else STUDENT_RECIPE).model
        values = "".join(f"{100 * one[name]:>8.1f}" for name in names)
        lines.append(f"{stage:<20}{section.detector + ' ' + section.backbone:<22}{values}")
    gains = "".join(f"{100 * (metrics[DISTILLED][n] - metrics[ALONE][n]):>+8.1f}" for n in names)
    lines.append(f"{'gain of CrossKD':<42}{gains}")
    return "\n".join(lines)
