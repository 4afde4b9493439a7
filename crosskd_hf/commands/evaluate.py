"""COCO metrics of a saved detector."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import at_least

if TYPE_CHECKING:
    from ..data.settings import DataSection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `crosskd evaluate`. The data set is the recipe's that was saved beside the model."""
    parser.add_argument("model", help="folder or Hub id of a saved detector")
    parser.add_argument(
        "--recipe",
        help="recipe with the data section (default: recipe.yaml in the model's folder)",
    )
    parser.add_argument(
        "--data",
        help="data set of the same layout, instead of the recipe's data.path; COCO's layout if there is none",
    )
    parser.add_argument("--split", help="split to evaluate on, instead of the recipe's data.val_split")
    parser.add_argument("--output-dir", help="where metrics and COCO results go (default: the model's folder)")
    parser.add_argument("--batch-size", type=at_least(1), default=1, help="images a batch and process (default: 1)")
    parser.add_argument("--workers", type=at_least(0), default=2, help="processes that load images (default: 2)")
    parser.add_argument("--max-images", type=int, help="only the first images of the split")


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Print COCO metrics of a saved model, and write them to OUTPUT_DIR/evaluation, beside a run's own.

    Raises:
        RecipeError, CheckpointError, ValueError: if recipe, model or data can't be used.
    """
    from ..data.dataset import DetectionDataset
    from ..data.load import load_split
    from ..recipe.run_folder import check_folder
    from ..training.trainer import check_classes
    from ..utils.distributed import check_same, num_processes
    from ..weights.loading import load_detector, load_processor, weights_digest

    if arguments.max_images is not None and arguments.max_images < 1:
        raise ValueError(f"--max-images must be at least 1, got {arguments.max_images}")
    data = _data_settings(arguments)
    if arguments.output_dir is not None:
        check_folder(arguments.output_dir, "--output-dir")
    model = load_detector(arguments.model, None, ())
    if num_processes() > 1:
        check_same(f"the weights of {arguments.model}", weights_digest(model))
    processor = load_processor(arguments.model)
    # The recipe's limit is for its own validation set.
    same_images = not (arguments.data or arguments.split)
    limit = arguments.max_images or (data.max_val_images if same_images or data.layout == "shapes" else None)
    split = load_split(data, arguments.split or data.val_split, limit)
    size = processor.size
    dataset = DetectionDataset(split, train=False, short_side=size["shortest_edge"], long_side=size["longest_edge"])
    advice = f"{arguments.model} was trained on other classes. Name its own data with --data or --recipe"
    check_classes(model, dataset, "the data", advice)
    return _evaluate(model, processor, dataset, arguments)


def _data_settings(arguments: argparse.Namespace) -> "DataSection":
    """Which data set to evaluate on: that of --data, else the recipe's."""
    import dataclasses

    from accelerate import PartialState

    from ..data.settings import DataSection
    from ..hub.upload import RECIPE_FILE
    from ..recipe import RecipeError, load_recipe
    from ..utils.distributed import processes_where

    folder = Path(arguments.model)
    PartialState()  # joins the other processes, if there are some
    there, missing = (processes_where(folder.is_dir() is found) for found in (True, False))
    if there and missing:  # one on the Hub is nowhere a folder
        raise ValueError(f"{folder} is a folder on {there}, but not on {missing}: copy it to all machines.")
    saved = folder / RECIPE_FILE
    recipe = arguments.recipe or (saved if saved.is_file() else None)
    if not (recipe or arguments.data):
        raise RecipeError(
            f"{arguments.model} has no {RECIPE_FILE} that says which images to evaluate on: name a recipe with "
            "--recipe, or a data set in COCO's layout with --data."
        )
    data = load_recipe(recipe).data if recipe else DataSection()
    return dataclasses.replace(data, path=arguments.data) if arguments.data else data


def _evaluate(model, processor, dataset, arguments: argparse.Namespace) -> dict[str, float]:
    import re

    from ..training.arguments import DetectionTrainingArguments
    from ..training.evaluation import format_metrics
    from ..training.run_log import use_run_log
    from ..training.trainer import EVALUATION_FOLDER, DetectionTrainer
    from ..utils.progress import say

    folder = Path(arguments.model)
    args = DetectionTrainingArguments(
        output_dir=str(arguments.output_dir or (folder if folder.is_dir() else ".")),
        per_device_eval_batch_size=arguments.batch_size,
        dataloader_num_workers=arguments.workers,
    )
    trainer = DetectionTrainer(model, args, eval_dataset=dataset, processing_class=processor)
    use_run_log(trainer)
    # A run's own are called eval.
    prefix = f"evaluate_{re.sub(r'[^a-zA-Z0-9.-]', '_', dataset.split.name)}_{len(dataset)}"
    metrics = trainer.evaluate(metric_key_prefix=prefix)
    if trainer.is_world_process_zero():
        print(f"{len(dataset)} images")
        print(format_metrics({name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}))
        say(f"written to {Path(args.output_dir) / EVALUATION_FOLDER / prefix}_metrics.json")
    return metrics
