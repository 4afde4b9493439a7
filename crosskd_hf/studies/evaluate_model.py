"""COCO metrics of a saved detector, on the data of its run or on other data."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from ..data.load import load_split
from ..data.settings import DataSection
from ..hub.upload import RECIPE_FILE
from ..recipe import RecipeError
from ..recipe.load import load_data_section
from ..recipe.run_folder import check_folder
from ..training.arguments import DetectionTrainingArguments
from ..training.evaluation_loop import EVALUATION_FOLDER
from ..training.run_log import use_run_log
from ..training.trainer import DetectionTrainer
from ..training.trainer_inputs import as_dataset, check_classes
from ..utils.distributed import check_same, num_processes, processes_where
from ..weights.loading import load_detector, load_processor, weights_digest


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        images: their number.
        metrics: COCO's, 0..1, the same in every process.
        file: where the first process has written them.
    """

    images: int
    metrics: dict[str, float]
    file: Path


def evaluate_model(
    source: str,
    *,
    recipe: str | None = None,
    path: str | None = None,
    split: str | None = None,
    output: str | None = None,
    batch_size: int = 1,
    workers: int = 2,
    max_images: int | None = None,
) -> Evaluation:
    """Evaluate a saved model; every process is to call it.

    Args:
        source: folder or Hub id of the detector.
        recipe: whose data section counts; None is the one in the model's folder.
        path: of a data set, instead of the recipe's.
        split: instead of the recipe's validation split.
        output: folder of the results; None is the model's, or this one for a Hub id.
        batch_size: images per batch and process.
        workers: processes that load images.
        max_images: only the first images.

    Raises:
        RecipeError, CheckpointError, ValueError: if recipe, model or data can't be used.
    """
    PartialState()  # joins the other processes, if there are some
    data = _data_settings(Path(source), recipe, path)
    if output is not None:
        check_folder(output, "--output-dir")
    model = load_detector(source)
    if num_processes() > 1:
        check_same(f"the weights of {source}", weights_digest(model))
    processor = load_processor(source)
    # The recipe's limit is for its own validation set.
    same_images = not (path or split)
    limit = max_images or (data.max_val_images if same_images or data.layout == "shapes" else None)
    images = load_split(data, split or data.val_split, limit)
    dataset = as_dataset(images, processor, train=False, seed=0)
    advice = f"{source} was trained on other classes. Name its own data with --data or --recipe"
    check_classes(model, dataset, "the data", advice)
    args = DetectionTrainingArguments(
        output_dir=str(output or (source if Path(source).is_dir() else ".")),
        per_device_eval_batch_size=batch_size,
        dataloader_num_workers=workers,
    )
    trainer = DetectionTrainer(model, args, eval_dataset=dataset, processing_class=processor)
    use_run_log(trainer)
    # A run's own are called eval.
    prefix = f"evaluate_{re.sub(r'[^a-zA-Z0-9.-]', '_', images.name)}_{len(images)}"
    metrics = trainer.evaluate(metric_key_prefix=prefix)
    file = Path(args.output_dir) / EVALUATION_FOLDER / f"{prefix}_metrics.json"
    return Evaluation(len(images), {name.removeprefix(f"{prefix}_"): value for name, value in metrics.items()}, file)


def _data_settings(folder: Path, recipe: str | None, path: str | None) -> DataSection:
    """Which data set to evaluate on: the one at `path`, else the recipe's."""
    there, missing = (processes_where(folder.is_dir() is present) for present in (True, False))
    if there and missing:  # one on the Hub is nowhere a folder
        raise ValueError(f"{folder} is a folder on {there}, but not on {missing}: copy it to all machines.")
    saved = folder / RECIPE_FILE
    if recipe or saved.is_file():
        data = load_data_section(recipe or saved)
    elif path:
        data = DataSection()
    else:
        raise RecipeError(
            f"{folder} has no {RECIPE_FILE} that says which images to evaluate on: name a recipe with --recipe, or a "
            "data set with --data."
        )
    return dataclasses.replace(data, path=path) if path else data
