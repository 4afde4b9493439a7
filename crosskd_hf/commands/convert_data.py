"""A data set of any layout as COCO files, checked on the way."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `crosskd convert-data`."""
    parser.add_argument("data", help="folder of the data set, or its Hub id")
    parser.add_argument(
        "output", help="new folder: annotations/instances_SPLIT.json, and a folder of images per split"
    )
    parser.add_argument("--splits", nargs="+", default=["train", "val"], metavar="SPLIT", help="default: train val")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="key=value", help="keys of a recipe's data section, such as layout=voc"
    )


def run(arguments: argparse.Namespace) -> None:
    """Convert the splits.

    Raises:
        RecipeError, FileNotFoundError, DataError: the data can't be read.
        SystemExit: the output folder isn't empty.
    """
    from ..data.coco_files import write_coco
    from ..data.load import load_split
    from ..recipe.load import parse_recipe
    from ..recipe.overrides import apply_override

    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SystemExit(f"{output} is there already: name a new folder")
    first, *_, last = [*arguments.splits, arguments.splits[-1]]
    content: dict = {"data": {"path": arguments.data, "train_split": first, "val_split": last}}
    for override in arguments.set:
        apply_override(content, f"data.{override}")
    data = parse_recipe(content, "--set").data
    splits = {name: load_split(data, name) for name in arguments.splits}
    for name, split in splits.items():
        print(f"{output / name}: {write_coco(split, output, name)} images")
