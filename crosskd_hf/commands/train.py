"""Run a recipe: `accelerate launch -m crosskd_hf train RECIPE [section.key=value ...] [--dry-run]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import add_recipe

if TYPE_CHECKING:
    from ..recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a training run."""
    parser.description = __doc__
    add_recipe(parser)
    parser.add_argument("--dry-run", action="store_true", help="build everything, print it, and stop")
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="random weights for the teacher and the backbone: to try a recipe without a network",
    )
    parser.add_argument(
        "--accept-changes", action="store_true", help="resume a run although the recipe has changed since it began"
    )


def run(arguments: argparse.Namespace) -> None:
    """Everything from the recipe to the saved model.

    Raises:
        SystemExit: with one message about what the user can mend.
    """
    from ..recipe import load_recipe
    from .errors import USER_ERRORS, explained

    with explained(USER_ERRORS):
        overrides = list(arguments.overrides)
        if arguments.random_weights:
            overrides.append("model.backbone_weights=random")
            if load_recipe(arguments.recipe, arguments.overrides).teacher:
                overrides.append("teacher.checkpoint=random")
        recipe = load_recipe(arguments.recipe, overrides)
    train_recipe(recipe, arguments.dry_run, arguments.accept_changes)


def train_recipe(recipe: "Recipe", dry_run: bool = False, accept_changes: bool = False, report: bool = True) -> None:
    """Everything from the checks to the saved model. A finished run is not run again.

    Args:
        recipe: what to run.
        dry_run: build and describe it only.
        accept_changes: resume a run that was begun with another recipe, where that is possible.
        report: write a report at the end, and say what to do next.

    Raises:
        SystemExit: with one message about what the user can mend.
    """
    from ..recipe import running
    from ..recipe.run_folder import check_folder
    from .errors import USER_ERRORS, explained, run_errors

    with explained(USER_ERRORS):
        # Of this machine alone; `prepare` compares those of all processes.
        check_folder(recipe.training_values()["output_dir"], "training.output_dir")
        trainer = running.prepare(recipe, dry_run, accept_changes)
    if trainer is not None and not dry_run:
        with explained(run_errors()):
            running.run(trainer, recipe)
        if report and trainer.is_world_process_zero():
            print(_closing_lines(trainer.run_folder))


def _closing_lines(folder: Path) -> str:
    """What came of a run. It is complete, whatever keeps its report from being written."""
    from ..studies.closing import close_run

    try:
        return close_run(folder)
    except Exception as error:
        return f"model    {folder}\nno report was written: {error}"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `train.py`: that of `crosskd train`."""
    from .main import main as crosskd

    crosskd(["train", *(sys.argv[1:] if argv is None else argv)])
