"""What the parts of a trainer share: the types of what it holds, where its run stands, and what a subclass may add."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import send_to_device
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils.hub import PushInProgress

from ..data.collator import DetectionCollator
from ..data.dataset import DetectionDataset
from ..data.processor_size import ProcessorCollator
from ..utils.memory import batch_advice
from .arguments import DetectionTrainingArguments
from .averaging import WeightAverage
from .checkpoints import newest_complete
from .step_monitor import StepMonitor
from .termination import Terminated, TerminationSignal

MODEL_LABELS = ("boxes_xyxy", "class_labels", "mask")  # what a model reads of the labels


class BaseTrainer(Trainer):
    """The base of `SafeSaving`, `CocoEvaluation` and `HubUpload`, of which a `DetectionTrainer` is made.

    Attributes:
        monitor: sums of the loss terms since the last log.
        termination: listens to SIGTERM while it trains.
        average: of the weights, from the beginning of training on, if there is an ema_decay.
        group_values: rates, decay and momentum of the optimizer's groups, as the arguments have them.
        last_evaluation: the step of the last evaluation, and its metrics.
        evaluation_sheet: pictures of the last evaluation, for the trackers.
        recipe_text: of the run, for the trackers.
    """

    # Of `transformers.Trainer`, as a detector's trainer has them.
    args: DetectionTrainingArguments
    model: PreTrainedModel
    processing_class: Any
    data_collator: DetectionCollator | ProcessorCollator
    train_dataset: DetectionDataset | None
    eval_dataset: DetectionDataset | None
    hub_model_id: str | None  # type: ignore[assignment]
    push_in_progress: PushInProgress | None  # type: ignore[assignment]

    monitor: StepMonitor
    termination: TerminationSignal
    average: WeightAverage | None = None
    group_values: list[dict[str, Any]]
    last_evaluation: tuple[int, dict[str, float]] = (-1, {})
    evaluation_sheet: Image.Image | None = None
    recipe_text: str | None = None
    _saved_at = -1  # the last step that this run has saved, or resumed from
    _batch_shape: tuple[int, ...] | None = None  # of the last batch of images

    @property
    def run_folder(self) -> Path:
        """Where the run writes."""
        return Path(self.args.output_dir)

    @property
    def latest_checkpoint(self) -> Path:
        """The folder of this step's checkpoint."""
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    @property
    def precision(self) -> str:
        """What it computes in, "bf16", "fp16" or "fp32": by its arguments or accelerate's own configuration."""
        mixed = self.accelerator.mixed_precision
        return "fp32" if mixed == "no" else mixed

    def terminated(self) -> Terminated:
        """The exception that ends a run, with what is saved."""
        step = self.state.global_step
        if self._saved_at == step:
            state = f": its state is saved in {self.latest_checkpoint}; the same command resumes from there"
        else:
            newest = newest_complete(self.args.output_dir) if self.is_world_process_zero() else None
            state = f", which isn't saved; the same command resumes from {newest or 'the beginning'}"
        return Terminated(f"ended by SIGTERM after step {step}{state}")

    def to_device(self, batch: dict) -> dict:
        """What the model reads of a batch, on the device that trains. The host doesn't wait for pinned memory."""
        if isinstance(labels := batch.get("labels"), Mapping):
            batch = {**batch, "labels": {name: labels[name] for name in MODEL_LABELS if name in labels}}
        if "pixel_values" in batch:
            self._batch_shape = tuple(batch["pixel_values"].shape)
        device = self.args.device
        # On MPS, a copy that isn't waited for reads memory that may be another tensor's by then.
        batch = send_to_device(batch, device, non_blocking=device.type != "mps")
        if isinstance(self.data_collator, DetectionCollator) and "pixel_sizes" in batch:
            return self.data_collator.finish(batch)
        return batch

    def _memory_advice(self, key: str) -> str:
        return batch_advice(self.args, key, self._batch_shape)

    def trained_module(self) -> nn.Module:
        """What DDP wraps, `torch.compile` compiles and the optimizer trains: the model, or a module around it.

        A trainer that returns another one has `save_methods` and `load_methods`, too. `trainer.model` stays the model.
        """
        return self.model

    def distilled_by(self) -> dict[str, str]:
        """Method -> its settings; none without a teacher."""
        return {}

    def methods_text(self) -> str:
        """The methods and their settings, for cards and logs."""
        return ", ".join(f"{name} ({settings})" for name, settings in self.distilled_by().items())

    def save_methods(self, folder: Path) -> None:
        """Write what is trained besides the model into a checkpoint: nothing."""

    def load_methods(self, folder: Path) -> None:
        """Read what `save_methods` wrote.

        Raises:
            ValueError: it is of other methods.
        """
