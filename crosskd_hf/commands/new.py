"""Write a recipe that fits a data set: splits, classes, image sizes, a batch for the memory there is."""

import argparse
import sys
from pathlib import Path

QUESTIONS = {
    "data": ("folder or Hub id of the data set", None),
    "student": ("student: DETECTOR/BACKBONE, or a folder or Hub id", "gfl/resnet18.tv_in1k"),
    "teacher": ("teacher: the same; one that isn't trained yet is trained first", "gfl/resnet50.tv_in1k"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `crosskd new`."""
    parser.description = f"{__doc__} What isn't given is asked for, on a terminal."
    parser.add_argument("recipe", help="the new file, such as recipes/mine.yaml")
    parser.add_argument("--data", help="folder of the data set, or its Hub id; any layout that recipes know")
    parser.add_argument(
        "--student", help="gfl/resnet18.tv_in1k and the like (gfl, retinanet, fcos, atss), or a folder or Hub id"
    )
    parser.add_argument("--teacher", help="the same; one that isn't trained yet is trained first")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="key=value", help="keys of the data section, such as val_split=test"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the recipe, and say what was chosen.

    Raises:
        RecipeError, FileNotFoundError, DataError: the data can't be read, or the recipe not run.
        SystemExit: the file is there already, or nobody says where the data is.
    """
    path = Path(arguments.recipe)
    if path.suffix not in (".yaml", ".yml"):
        raise SystemExit(f"{path} must end in .yaml")
    if path.exists():
        raise SystemExit(f"{path} is there already: name a new file")
    given = {name: getattr(arguments, name) or _asked(name) for name in QUESTIONS}
    from ..recipe.load import parse_recipe
    from ..recipe.overrides import apply_override
    from ..studies.new_recipe import write_recipe

    content: dict = {"data": {"path": given["data"]}}
    for override in arguments.set:
        apply_override(content, f"data.{override}")
    lines = write_recipe(path, parse_recipe(content, "--set").data, given["student"], given["teacher"])
    print("\n".join([*lines, f"written    {path}: its first lines say what to run"]))


def _asked(name: str) -> str:
    question, default = QUESTIONS[name]
    if not sys.stdin.isatty():
        if default is None:
            raise SystemExit(f"--{name} is missing: {question}")
        return default
    answer = input(f"{question}{f' [{default}]' if default else ''}: ").strip()
    return answer or default or _asked(name)
