"""An MMDetection checkpoint as a model of this package."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `crosskd convert`."""
    parser.add_argument("checkpoint", help="MMDetection .pth file, by path or URL")
    parser.add_argument("output", help="folder for the converted model and its image processor")
    parser.add_argument("--recipe", required=True, help="recipe that describes the model")
    parser.add_argument("--teacher", action="store_true", help="the file holds the recipe's teacher, not its model")


def run(arguments: argparse.Namespace) -> None:
    """Convert a checkpoint and its image processor.

    Raises:
        RecipeError, CheckpointError: if recipe or checkpoint can't be used.
    """
    from ..recipe import RecipeError, load_recipe
    from ..recipe.run_folder import check_folder
    from ..weights.loading import convert_checkpoint, count_parameters

    recipe = load_recipe(arguments.recipe)
    check_folder(arguments.output, "output")
    section = recipe.teacher if arguments.teacher else recipe.model
    if section is None:
        raise RecipeError(f"recipe {arguments.recipe} has no teacher: leave --teacher out.")
    data = recipe.data
    model = convert_checkpoint(arguments.checkpoint, Path(arguments.output), section, data.short_side, data.long_side)
    total, _ = count_parameters(model)
    print(f"{arguments.output}: {type(model).__name__}, {model.config.backbone}, {total / 1e6:.2f} M parameters")
