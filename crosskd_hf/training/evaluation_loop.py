"""How a trainer evaluates: COCO metrics of detections that are post-processed at once."""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput, denumpify_detensorize
from transformers.utils import ModelOutput

from ..data.dataset import DetectionDataset
from ..models.postprocess import check_outputs
from ..utils.distributed import share_buffers
from ..utils.memory import out_of_memory_explained
from ..utils.redact import public
from .base import BaseTrainer
from .coco_metrics import CocoEvaluator
from .seen_batches import SeenBatches, known_images
from .tracking import evaluation_sheet, trackers

EVALUATION_FOLDER = "evaluation"


def _users_metrics(metrics: dict[str, Any], prefix: str, ours: dict[str, float]) -> dict[str, Any]:
    """What a user's `compute_metrics` gave, as numbers and without the prefix that all metrics get.

    Raises:
        ValueError: one is called as a metric of COCO.
    """
    named = {name.removeprefix(f"{prefix}_"): value for name, value in denumpify_detensorize(metrics).items()}
    if clash := sorted(set(named) & set(ours)):
        raise ValueError(f"compute_metrics gives {clash[0]}, which COCO's metrics are called by: give it another name")
    return named


class CocoEvaluation(BaseTrainer):
    """The part of a trainer that evaluates."""

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """COCO metrics of the eval data. Predictions are post-processed at once, and raw outputs never kept.

        With `compute_metrics` they are kept after all, on the CPU, and its metrics are added; see `SeenBatches`.
        The detections are written to `output_dir/evaluation` as COCO results, the numbers beside them.

        Raises:
            Terminated: SIGTERM came during training, or an evaluation after it.
        """
        model = self.average.model if self.average else self.model
        was_training = model.training
        model.eval()
        share_buffers(model)
        dataset = dataloader.dataset
        assert isinstance(dataset, DetectionDataset)  # see `get_eval_dataloader`
        evaluator, seen = CocoEvaluator(dataset.split), SeenBatches()
        predicts = description == "Prediction"  # `predict`, whose metrics aren't remembered
        if not predicts:
            self.callback_handler.eval_dataloader = dataloader
        with out_of_memory_explained(lambda: self._memory_advice("per_device_eval_batch_size")):
            for batch in dataloader:
                if self.termination.noted:
                    break
                outputs = self.forward_images(model, batch)
                image_ids, sizes = known_images(batch["labels"])
                detections = self.processing_class.post_process_object_detection(outputs, 0.0, sizes)
                evaluator.update(image_ids.tolist(), detections)
                if self.compute_metrics is not None:
                    seen.add(outputs, batch["labels"])
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if self.termination.agreed_now():
            model.train(was_training)
            raise self.terminated()
        evaluator.gather()
        results = evaluator.results() if predicts else None
        model.train(was_training)
        metrics, self.evaluation_sheet = None, None
        if self.accelerator.is_main_process:
            if (count := self.args.evaluation_pictures) and trackers(self):
                self.evaluation_sheet = evaluation_sheet(dataset, evaluator, count)
            metrics = self._metrics(evaluator, dataset, metric_key_prefix)
        if self.compute_metrics is not None:
            evaluated = seen.gathered()
            if metrics is not None:
                metrics |= _users_metrics(self.compute_metrics(evaluated), metric_key_prefix, metrics)
        (metrics,) = broadcast_object_list([metrics])
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        if not predicts:
            self.last_evaluation = self.state.global_step, named
        return EvalLoopOutput(results, label_ids=None, metrics=named, num_samples=len(dataset))  # type: ignore[arg-type]

    def _metrics(self, evaluator: CocoEvaluator, dataset: DetectionDataset, prefix: str) -> dict[str, float]:
        """The metrics, written with which images they are of, and how; as others may read it."""
        metrics, split = evaluator.compute(), dataset.split
        names = ("score_threshold", "nms_threshold", "max_candidates", "max_detections")
        settings = {
            "data": public(split.source),
            "split": split.name,
            "images": len(split),
            **dataset.size,
            **{name: getattr(self.processing_class, name) for name in names if hasattr(self.processing_class, name)},
            "precision": self.precision,
            **({"step": self.state.global_step} if self.state.max_steps else {}),
            "backend": evaluator.backend,
        }
        evaluator.save(Path(self.args.output_dir) / EVALUATION_FOLDER, metrics, f"{prefix}_", settings)
        return metrics

    @torch.no_grad()
    def forward_images(self, model: PreTrainedModel, batch: dict) -> ModelOutput:
        """The model's output for the images of a batch.

        Raises:
            NonFiniteOutputError: see `check_outputs`.
        """
        inputs = self.to_device({name: value for name, value in batch.items() if name.startswith("pixel_")})
        with self.accelerator.autocast():
            return check_outputs(model(**inputs))
