"""COCO metrics of a saved detector."""

import argparse

from .arguments import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `crosskd evaluate`. The data set is the recipe's that was saved beside the model."""
    parser.add_argument("model", help="folder or Hub id of a saved detector")
    parser.add_argument("--recipe", help="recipe with the data section (default: recipe.yaml in the model's folder)")
    parser.add_argument(
        "--data",
        help="data set of the same layout, instead of the recipe's data.path; of any layout if there is no recipe",
    )
    parser.add_argument("--split", help="split to evaluate on, instead of the recipe's data.val_split")
    parser.add_argument("--output-dir", help="where metrics and COCO results go (default: the model's folder)")
    parser.add_argument("--batch-size", type=at_least(1), default=1, help="images per batch and process (default: 1)")
    parser.add_argument("--workers", type=at_least(0), default=2, help="processes that load images (default: 2)")
    parser.add_argument("--max-images", type=int, help="only the first images of the split")


def run(arguments: argparse.Namespace) -> None:
    """Print COCO metrics of a saved model, and write them to OUTPUT_DIR/evaluation, beside a run's own.

    Raises:
        RecipeError, CheckpointError, ValueError: if recipe, model or data can't be used.
    """
    from accelerate import PartialState

    from ..studies.evaluate_model import evaluate_model
    from ..training.metric_table import format_metrics
    from ..utils.progress import say

    if arguments.max_images is not None and arguments.max_images < 1:
        raise ValueError(f"--max-images must be at least 1, got {arguments.max_images}")
    found = evaluate_model(
        arguments.model,
        recipe=arguments.recipe,
        path=arguments.data,
        split=arguments.split,
        output=arguments.output_dir,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        max_images=arguments.max_images,
    )
    if PartialState().is_main_process:
        print(f"{found.images} images")
        print(format_metrics(found.metrics))
        say(f"written to {found.file}")
