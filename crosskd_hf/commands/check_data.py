"""What is in a recipe's data and what is wrong with it, before any training."""

import argparse
from pathlib import Path

from .arguments import add_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `crosskd check-data`."""
    add_recipe(parser)
    parser.add_argument("--output-dir", default="data_report", help="where report.txt and PNGs go")


def run(arguments: argparse.Namespace) -> None:
    """Report on both splits; ends with status 1 if training would refuse the data.

    Raises:
        RecipeError, FileNotFoundError, DataError: there is no data to report on.
        SystemExit: the data has problems that stop training.
    """
    from ..recipe import load_recipe
    from ..recipe.run_folder import check_folder
    from ..studies.data_report import check_data

    data = load_recipe(arguments.recipe, arguments.overrides).data
    check_folder(arguments.output_dir, "--output-dir")
    if problem := check_data(data, Path(arguments.output_dir)):
        raise SystemExit(problem)
