"""What TensorBoard, trackio and Weights & Biases get beside transformers' numbers: the recipe, and pictures.

`training.report_to` names the trackers, as in transformers. Its callbacks log every loss term and metric; here the
recipe of the run follows as text, and after each evaluation a sheet of ground truth beside predictions.
"""

from typing import Any

import numpy as np
from PIL import Image
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..data.dataset import DetectionDataset
from ..utils.redact import without_credentials
from ..utils.visualization import contact_sheet
from .base import BaseTrainer
from .coco_metrics import CocoEvaluator
from .evaluation_pictures import evenly_spaced, example, predicted_boxes, with_boxes

TRACKERS = (TensorBoardCallback, TrackioCallback, WandbCallback)
PICTURE_NAME = "eval/examples"
TILE = 400  # pixels a side of a picture on the sheet


class TrackingCallback(TrainerCallback):
    """Hands recipe and evaluation pictures to the trackers of a trainer. The main process logs, others do nothing."""

    def __init__(self, trainer: BaseTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """After the trackers' own, which open the run."""
        if state.is_world_process_zero and self.trainer.recipe_text is not None:
            log_text(self.trainer, "recipe", without_credentials(self.trainer.recipe_text))

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        """After the metrics."""
        sheet = self.trainer.evaluation_sheet
        if state.is_world_process_zero and sheet is not None:
            log_picture(self.trainer, PICTURE_NAME, sheet, state.global_step)


def trackers(trainer: Trainer) -> list[Any]:
    """The trainer's callbacks that log to a tracker that takes pictures."""
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, TRACKERS)]


def log_text(trainer: Trainer, name: str, text: str) -> None:
    """A text to every tracker: beside the arguments of the run."""
    for tracker in trackers(trainer):
        if isinstance(tracker, TensorBoardCallback):
            if tracker.tb_writer is not None:
                tracker.tb_writer.add_text(name, f"```yaml\n{text}\n```")
        elif isinstance(tracker, WandbCallback):
            tracker._wandb.config.update({name: text}, allow_val_change=True)
        else:
            tracker._trackio.config[name] = text


def log_picture(trainer: Trainer, name: str, picture: Image.Image, step: int) -> None:
    """A picture to every tracker, at an optimizer step."""
    for tracker in trackers(trainer):
        if isinstance(tracker, TensorBoardCallback):
            if tracker.tb_writer is not None:
                tracker.tb_writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
                tracker.tb_writer.flush()
        elif isinstance(tracker, WandbCallback):
            tracker._wandb.log({name: tracker._wandb.Image(picture), "train/global_step": step})
        else:
            tracker._trackio.log({name: tracker._trackio.Image(picture), "train/global_step": step})


def evaluation_sheet(dataset: DetectionDataset, evaluator: CocoEvaluator, count: int) -> Image.Image:
    """Ground truth beside predictions, on evenly spaced images of an evaluation.

    Args:
        dataset: what was evaluated.
        evaluator: holds the detections of all its images.
        count: images on the sheet, a row each.
    """
    rows = []
    for index in evenly_spaced(count, len(dataset)):
        image_id, image, truth, factors = example(dataset, index)
        predicted = predicted_boxes(evaluator, image_id, dataset.split.label_names, factors)
        rows.append([with_boxes(image, truth), with_boxes(image, predicted)])
    return contact_sheet(rows, ["ground truth", "predictions"], TILE)
