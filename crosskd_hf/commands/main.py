"""The `crosskd` command: demo, check-data, train, evaluate, predict, info, export, convert."""

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from ..data.dataset import DetectionDataset
from ..data.load import load_split
from ..inference import export, predict
from ..recipe.run_folder import check_folder
from ..recipe.sections import RECIPE_FILE, DataSection, RecipeError, load_recipe
from ..training.arguments import DetectionTrainingArguments
from ..training.checks import check_classes
from ..training.evaluation import format_metrics
from ..training.evaluation_loop import EVALUATION_FOLDER
from ..training.run_log import use_run_log
from ..training.trainer import DetectionTrainer
from ..utils.distributed import check_same, num_processes, processes_where
from ..utils.progress import say
from ..weights.loading import convert_checkpoint, count_parameters, load_detector, load_processor, weights_digest
from . import check_data, demo, info, train
from .output import lenient_output


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument(
        "--batch-size", type=train.at_least(1), default=1, help="images a batch and process (default: 1)"
    )
    parser.add_argument("--workers", type=train.at_least(0), default=2, help="processes that load images (default: 2)")
    parser.add_argument("--max-images", type=int, help="only the first images of the split")


def evaluate(arguments: argparse.Namespace) -> dict[str, float]:
    """COCO metrics of a saved model; also written to OUTPUT_DIR/evaluation, beside what a run wrote there itself.

    Raises:
        RecipeError, CheckpointError, ValueError: if recipe, model or data can't be used.
    """
    if arguments.max_images is not None and arguments.max_images < 1:
        raise ValueError(f"--max-images must be at least 1, got {arguments.max_images}")
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
    if arguments.output_dir is not None:
        check_folder(arguments.output_dir, "--output-dir")
    model = load_detector(arguments.model, None, ())
    if num_processes() > 1:
        check_same(f"the weights of {arguments.model}", weights_digest(model))
    processor = load_processor(arguments.model)
    if arguments.data:
        data = dataclasses.replace(data, path=arguments.data)
    # The recipe's limit is for its own validation set.
    own = not (arguments.data or arguments.split)
    limit = arguments.max_images or (data.max_val_images if own or data.layout == "shapes" else None)
    split = load_split(data, arguments.split or data.val_split, limit)
    size = processor.size
    dataset = DetectionDataset(split, train=False, short_side=size["shortest_edge"], long_side=size["longest_edge"])
    advice = f"{arguments.model} was trained on other classes. Name its own data with --data or --recipe"
    check_classes(model, dataset, "the data", advice)
    args = DetectionTrainingArguments(
        output_dir=str(arguments.output_dir or (folder if folder.is_dir() else ".")),
        per_device_eval_batch_size=arguments.batch_size,
        dataloader_num_workers=arguments.workers,
    )
    trainer = DetectionTrainer(model, args, eval_dataset=dataset, processing_class=processor)
    use_run_log(trainer)
    # A run's own are called eval.
    prefix = f"evaluate_{re.sub(r'[^a-zA-Z0-9.-]', '_', split.name)}_{len(split)}"
    metrics = trainer.evaluate(metric_key_prefix=prefix)
    if trainer.is_world_process_zero():
        print(f"{len(split)} images")
        print(format_metrics({name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}))
        say(f"written to {Path(args.output_dir) / EVALUATION_FOLDER / prefix}_metrics.json")
    return metrics


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `crosskd convert`."""
    parser.add_argument("checkpoint", help="MMDetection .pth file, by path or URL")
    parser.add_argument("output", help="folder for the converted model and its image processor")
    parser.add_argument("--recipe", required=True, help="recipe that describes the model")
    parser.add_argument("--teacher", action="store_true", help="the file holds the recipe's teacher, not its model")


def convert(arguments: argparse.Namespace) -> None:
    """Convert a checkpoint and its image processor.

    Raises:
        RecipeError, CheckpointError: if recipe or checkpoint can't be used.
    """
    recipe = load_recipe(arguments.recipe)
    check_folder(arguments.output, "output")
    section = recipe.teacher if arguments.teacher else recipe.model
    if section is None:
        raise RecipeError(f"recipe {arguments.recipe} has no teacher: leave --teacher out.")
    model = convert_checkpoint(arguments.checkpoint, Path(arguments.output), section, recipe.data)
    total, _ = count_parameters(model)
    print(f"{arguments.output}: {type(model).__name__}, {model.config.backbone}, {total / 1e6:.2f} M parameters")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `crosskd`."""
    parser = argparse.ArgumentParser(prog="crosskd", description="Cross-head knowledge distillation of detectors.")
    commands = parser.add_subparsers(dest="command", required=True)
    train.add_arguments(commands.add_parser("train", help="run a recipe", description=train.__doc__))
    add_evaluate_arguments(commands.add_parser("evaluate", help="COCO metrics of a saved model"))
    add_convert_arguments(commands.add_parser("convert", help="MMDetection checkpoint to a model of this package"))
    demo.add_arguments(commands.add_parser("demo", help="teacher, student alone and distilled, offline"))
    check_data.add_arguments(commands.add_parser("check-data", help="report on a recipe's data before training"))
    predict.add_arguments(commands.add_parser("predict", help="detections of image files"))
    info.add_arguments(commands.add_parser("info", help="size, cost, labels and origin of a model"))
    export.add_arguments(commands.add_parser("export", help="a model as an ONNX or torch.export file"))
    for name, command in commands.choices.items():
        if name != "train":
            train.add_quiet(command)
    trains = (sys.argv[1:] if argv is None else argv)[:1] in (["train"], ["demo"])
    with lenient_output(results=not trains):
        _run(train.parse(parser, argv))


def _run(arguments: argparse.Namespace) -> None:
    if arguments.command == "train":
        train.launch(arguments)
        return
    functions = {
        "evaluate": evaluate,
        "convert": convert,
        "demo": demo.run,
        "check-data": check_data.run,
        "predict": predict.run,
        "info": info.run,
        "export": export.run,
    }
    try:
        hint = "the same command goes on from the last checkpoint" if arguments.command == "demo" else ""
        with train.interruptible(hint), train.explained(train.USER_ERRORS):
            functions[arguments.command](arguments)
    finally:
        PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
