"""Trainers of dense detectors, alone and with a teacher, on transformers.Trainer."""

import contextlib
import functools
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.integrations import is_tensorboard_available, is_trackio_available, is_wandb_available
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.training_args import OptimizerNames

from ..data.collator import DetectionCollator
from ..data.dataset import DetectionDataset
from ..data.sampler import OrientationBatchSampler
from ..data.split import DetectionSplit
from ..models.base import DenseDetector
from ..models.image_processing import DenseDetectorImageProcessor
from ..utils.distributed import check_same
from ..utils.label_names import coco_spelling, near_matches, spelling_problem
from ..utils.memory import out_of_memory_explained
from ..utils.redact import public
from ..utils.text import listed
from ..weights.loading import load_detector
from .arguments import DetectionTrainingArguments
from .evaluation import CocoEvaluator
from .monitoring import TERMS, NonFiniteLossError, StepMonitor
from .optimization import build_optimizer, multistep_scheduler, parameter_groups
from .publishing import HubUpload
from .saving import SafeSaving
from .termination import TerminationSignal, obey_parent_only
from .tracking import TrackingCallback, evaluation_sheet, trackers

logger = logging.getLogger(__name__)
EVALUATION_FOLDER = "evaluation"
TRACKERS = {
    "tensorboard": (is_tensorboard_available, "tensorboard"),
    "wandb": (is_wandb_available, "wandb"),
    "trackio": (is_trackio_available, "trackio"),
}
MONITOR = "StepMonitor"  # its part of a checkpoint's state
MODEL_LABELS = ("boxes", "class_labels", "mask")  # what a model reads of the labels
MAX_OVERFLOWS = 20  # steps in a row: GradScaler halves its scale in each, from 65536 to below 0.1
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class DetectionTrainer(SafeSaving, HubUpload, Trainer):
    """Trains a detector alone.

    Args:
        model: a detector, or a folder or Hub id of one.
        args: the training arguments.
        train_dataset: a `DetectionDataset`, or a `DetectionSplit`, which is then resized as the processor does it.
        eval_dataset: the same.
        processing_class: the image processor, saved beside the model; None makes the one that goes with the model.
        callbacks, optimizers: as in `transformers.Trainer`.

    Raises:
        ValueError: if the data's labels aren't the model's, or the arguments ask for DataParallel, FSDP or DeepSpeed.
    """

    def __init__(
        self,
        model: DenseDetector | str,
        args: DetectionTrainingArguments,
        train_dataset: DetectionDataset | DetectionSplit | None = None,
        eval_dataset: DetectionDataset | DetectionSplit | None = None,
        processing_class: DenseDetectorImageProcessor | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        model = as_detector(model)
        _refuse_unsupported(args)
        processor = processing_class or DenseDetectorImageProcessor.for_model(model.config)
        datasets = {}
        for name, data, train in (("train_dataset", train_dataset, True), ("eval_dataset", eval_dataset, False)):
            datasets[name] = _as_dataset(data, processor, train, args.seed)
            check_classes(model, datasets[name], name, "give the model id2label=split.id2label")
            if (dataset := datasets[name]) is not None:
                check_same(f"the images and classes of {name}", (len(dataset), dataset.split.label_names))
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
        super().__init__(
            model=model,
            args=args,
            # A GPU normalises faster than the loaders, which then send a quarter of the bytes.
            data_collator=DetectionCollator(processor, normalize=args.device.type == "cpu"),
            processing_class=processor,
            callbacks=callbacks,
            optimizers=optimizers,
            **datasets,
        )
        # The losses of a step's batches are normalised alike (see `measure_normalizers`), so the step's is their mean.
        self.loss_is_scaled_for_ga = False
        self.monitor = StepMonitor(self.args.device, args.skip_nonfinite_steps)
        self.train_sampler: OrientationBatchSampler | None = None
        self._before_step: tuple[Tensor, list[tuple[Tensor, Tensor]]] | None = None
        self.last_evaluation: tuple[int, dict[str, float]] = (-1, {})
        self._unmeasured: list[dict] = []  # batches of the step that begins, if they are several
        self._skipped_at_log = 0
        self.termination = TerminationSignal()
        self.evaluation_sheet: Image.Image | None = None  # of the last evaluation, for the trackers
        self.recipe_text: str | None = None  # of the run, for the trackers
        self._batch_shape: tuple[int, ...] | None = None  # of the last batch of images
        self.add_callback(_TrainingHooks(self))
        self.add_callback(TrackingCallback(self))

    @property
    def run_folder(self) -> Path:
        """Where the run writes."""
        return Path(self.args.output_dir)

    @property
    def precision(self) -> str:
        """What it computes in, "bf16", "fp16" or "fp32": by its arguments or accelerate's own configuration."""
        mixed = self.accelerator.mixed_precision
        return "fp32" if mixed == "no" else mixed

    # Data -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Batches of one orientation, dealt out to the processes."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        self.train_sampler = OrientationBatchSampler(
            self.train_dataset.orientations(),
            self.args.per_device_train_batch_size,
            seed=self.args.seed,
            group=self.args.group_by_orientation,
            drop_last=self.args.dataloader_drop_last,
        )
        # `_prepare_inputs` copies to the device what the model reads; this would copy all of it, and wait.
        loader = self.accelerator.prepare_data_loader(
            DataLoader(self.train_dataset, batch_sampler=self.train_sampler, **self._loader_options()),
            device_placement=False,
        )
        self._batches_per_epoch = len(loader)
        return loader

    def get_test_dataloader(self, test_dataset: DetectionDataset | DetectionSplit) -> DataLoader:
        """The same as for evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def get_eval_dataloader(self, eval_dataset: DetectionDataset | DetectionSplit | None = None) -> DataLoader:
        """Every image exactly once over all processes, in the same batches however many there are."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset")
        dataset = _as_dataset(dataset, self.processing_class, False, self.args.seed)
        batches = BatchSampler(SequentialSampler(dataset), self.args.per_device_eval_batch_size, drop_last=False)
        # Not through accelerate: filling up the last round with repeated images changes its batches and their padding.
        share = BatchSamplerShard(
            batches, self.accelerator.num_processes, self.accelerator.process_index, even_batches=False
        )
        return DataLoader(dataset, batch_sampler=share, **self._loader_options())

    def _loader_options(self) -> dict:
        workers = self.args.dataloader_num_workers
        return {
            "collate_fn": self.data_collator,
            "num_workers": workers,
            "pin_memory": self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            "persistent_workers": self.args.dataloader_persistent_workers and workers > 0,
            "prefetch_factor": self.args.dataloader_prefetch_factor if workers > 0 else None,
            "worker_init_fn": functools.partial(obey_parent_only, os.getpid()),
            # Its own, since an iterator draws a seed: from the global generator, a resumed run, which starts another
            # number of iterators, would go on with other dropout. The data sets don't use that seed.
            "generator": torch.Generator().manual_seed(self.args.seed),
        }

    def _prepare_inputs(self, inputs: dict) -> dict:
        """What the model reads of a batch, on the device that trains. The host doesn't wait for pinned memory."""
        if isinstance(labels := inputs.get("labels"), Mapping):
            inputs = {**inputs, "labels": {name: labels[name] for name in MODEL_LABELS if name in labels}}
        if "pixel_values" in inputs:
            self._batch_shape = tuple(inputs["pixel_values"].shape)
        inputs = super()._prepare_inputs(inputs)
        return self.data_collator.finish(inputs) if "pixel_sizes" in inputs else inputs

    def _prepare_input(self, data):
        if isinstance(data, Tensor):
            # MPS would read memory that may be another tensor's by then.
            return data.to(self.args.device, non_blocking=self.args.device.type != "mps")
        return super()._prepare_input(data)

    def get_batch_samples(self, *args, **kwargs):
        """Fetch batches, timed. What follows, up to the optimizer's update, is the step."""
        self.monitor.clock.switch("data_time")
        batches, count = super().get_batch_samples(*args, **kwargs)
        self.monitor.clock.switch("step_time")
        self._forget_normalizers()
        self._unmeasured = batches if len(batches) > 1 else []
        return batches, count

    @property
    def _detector(self) -> DenseDetector:
        return self.accelerator.unwrap_model(self.model)

    @torch.no_grad()
    def measure_normalizers(self, batches: list[dict]) -> None:
        """Have all batches of a step divide their losses by the same: see `Normalizers`.

        RetinaNet, FCOS and ATSS only assign boxes for it. GFL has to run forward, since its boxes count as much as it
        believes in them: a third to two fifths of the student's forward and backward more.
        """
        model = self._detector
        looking_ahead = self._looking_ahead(model) if model.normalizers_need_predictions else contextlib.nullcontext()
        with looking_ahead, model.normalizers.measuring():
            for batch in batches:
                # Prepared again for its own step: to keep all batches of a step on the device takes its memory.
                model.measure_normalizers(**self._prepare_inputs(batch))

    def _forget_normalizers(self) -> None:
        """Have every batch divide its losses by its own again."""
        self._detector.normalizers.release()
        self._unmeasured = []

    @contextlib.contextmanager
    def _looking_ahead(self, model: DenseDetector) -> Iterator[None]:
        """Around forward passes that the step does again: it draws the same random numbers then. BatchNorm's averages
        stay as they are."""
        self.model.train()
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        for module in norms:
            module.track_running_stats = False
        try:
            with torch.random.fork_rng(devices), self.accelerator.autocast():
                yield
        finally:
            for module in norms:
                module.track_running_stats = True

    # Optimisation -----------------------------------------------------------------------------------------------

    def train(self, *args, **kwargs) -> TrainOutput:
        """As `transformers.Trainer` does it. However it ends, the model then normalises by the batch it is given."""
        try:
            with out_of_memory_explained(lambda: self._memory_advice("per_device_train_batch_size")):
                return super().train(*args, **kwargs)
        finally:
            self._forget_normalizers()

    def _memory_advice(self, key: str) -> str:
        """The batch that was computed last, and what needs less memory. `key` is the argument with its images."""
        args, size = self.args, getattr(self.args, key)
        trains = key == "per_device_train_batch_size"
        images = "no batch was computed yet"
        if self._batch_shape is not None:
            number, _, height, width = self._batch_shape
            images = f"the last batch had {number} images, padded to {height} x {width} pixels"
        lower = [f"training.{key}"] if size > 1 else []
        if lower and trains:
            lower[0] += f" (and raise training.gradient_accumulation_steps, {args.gradient_accumulation_steps})"
        lower += ["data.short_side and data.long_side"]
        lower += [f"training.dataloader_num_workers ({args.dataloader_num_workers})"] * (
            args.dataloader_num_workers > 0
        )
        more = ", or set training.gradient_checkpointing=true" if trains and not args.gradient_checkpointing else ""
        return f"{key} is {size}, {images}. Lower {', '.join(lower)}{more}"

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """SGD as the published recipes use it, or any optimizer that transformers names."""
        if self.optimizer is None:
            model = model or self.model
            if self.args.optim == OptimizerNames.SGD:
                self.optimizer = build_optimizer(model, self.args)
            else:
                groups = parameter_groups(
                    model,
                    learning_rate=self.args.scaled_learning_rate,
                    weight_decay=self.args.weight_decay,
                    bias_lr_factor=self.args.bias_lr_factor,
                    bias_weight_decay=self.args.bias_weight_decay,
                )
                optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
                self.optimizer = optimizer_class(groups, **{**options, "lr": self.args.scaled_learning_rate})
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Warm-up and milestones of the arguments, or transformers' scheduler if there are no milestones."""
        if self.lr_scheduler is None and self.args.lr_milestones is not None:
            self.lr_scheduler = multistep_scheduler(optimizer or self.optimizer, self.args, self.steps_per_epoch)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        if self.train_sampler is None:
            self.get_train_dataloader()
        return max(1, -(-self._batches_per_epoch // self.args.gradient_accumulation_steps))

    def _run_epoch(self, *args, **kwargs) -> None:
        """An epoch, or nothing if a resumed run has all its steps: transformers would take one more in mid-epoch."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, *args, **kwargs) -> Tensor:
        """Forward and backward."""
        if self._unmeasured:
            # Not when they are fetched: a resumed run's random state is restored after that.
            self.measure_normalizers(self._unmeasured)
            self._unmeasured = []
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:  # the step's last batch: callbacks may ask the model for losses now
            self._forget_normalizers()
        # transformers sums the losses up to the next log, where one that isn't finite would stay for good.
        return loss.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) if self.monitor.may_skip else loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of all loss terms, each kept for the log."""
        terms, outputs = self.loss_terms(model, inputs)
        factor = self.monitor.record(terms, self._step)
        loss = torch.stack(list(terms.values())).sum() * factor
        return (loss, outputs) if return_outputs else loss

    def loss_terms(self, model: nn.Module, inputs: dict) -> tuple[dict[str, Tensor], object]:
        """Name -> scalar of every loss term, and the model's output."""
        self._mark_dynamic(inputs)
        outputs = model(**inputs)
        return outputs.loss_dict, outputs

    def _mark_dynamic(self, inputs: dict) -> None:
        """Have one compiled program serve any number of boxes."""
        if self.args.torch_compile and isinstance(inputs["labels"], Mapping):
            for name in ("boxes", "class_labels", "mask"):
                torch._dynamo.maybe_mark_dynamic(inputs["labels"][name], 1)

    @property
    def _step(self) -> int:
        return self.state.global_step + 1

    def mask_non_finite_step(self) -> None:
        """Have the optimizer leave everything as it is if a gradient isn't finite, without the host knowing.

        Fused optimizers read `found_inf` (it is how GradScaler talks to them) and then change neither parameters nor
        their own state. For others a copy of both is kept over the step, and put back in `restore_masked_step`, where
        the host waits once a step for those that count steps on the CPU.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        bad = ~torch.nn.utils.get_total_norm(gradients).isfinite()
        if self.accelerator.scaler is not None:  # it skips steps by itself, for ever if need be
            self.monitor.record_overflow(bad)
            self.monitor.end_step()
            return
        self.monitor.record_gradient(bad, self._step)
        self.monitor.end_step()
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = bad.float()
            return
        for gradient in gradients:
            gradient.copy_(torch.where(bad, 0.0, gradient))
        kept = [p for group in optimizer.param_groups for p in group["params"]]
        kept += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        self._before_step = bad, [(tensor, tensor.detach().clone()) for tensor in kept]

    @torch.no_grad()
    def restore_masked_step(self) -> None:
        """Undo the step of an optimizer that isn't fused, if its gradients weren't finite."""
        if self._before_step is None:
            return
        bad, tensors = self._before_step
        where = {device: bad.to(device) for device in {tensor.device for tensor, _ in tensors}}
        for tensor, before in tensors:
            tensor.copy_(torch.where(where[tensor.device], before, tensor))
        self._before_step = None

    # Log --------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add every loss term, the times and the memory to a training log.

        Raises:
            NonFiniteLossError: if a term or gradient was not finite since the last log, more often than
                `skip_nonfinite_steps` allows, or fp16 overflowed in each of the last `MAX_OVERFLOWS` steps. The
                updates of such steps were masked out; the model as it is then is saved first.
        """
        if not ({"loss", "train_loss"} & set(logs)):
            super().log(logs, start_time)
            return
        try:
            averages = self.monitor.averages(self.accelerator.gather)
            self._refuse_overflows()
        except NonFiniteLossError as error:
            # Without the removal of others: what is healthy may be an earlier one.
            self._save_checkpoint(self.model_wrapped, trial=None)
            raise NonFiniteLossError(
                f"{error}. That step's update was masked out, training is stopped, and the state is saved in "
                f"{self._latest_checkpoint()}; no earlier checkpoint was removed for it. Usual causes: a learning "
                "rate too high for this batch size, no warm-up, half precision, or broken boxes in the data. If the "
                "weights had diverged before, remove this checkpoint and those after the last good one, and start the "
                "same command again, with other values and --accept-changes."
            ) from None
        if averages.get("skipped_steps", 0) > self._skipped_at_log:
            self._skipped_at_log = averages["skipped_steps"]
            # The loss is a mean over skipped steps too, the norm is the last step's.
            terms = [value for name, value in averages.items() if name.startswith(TERMS)]
            logs["loss"] = sum(terms) if terms else math.nan
            logs = {name: value for name, value in logs.items() if math.isfinite(value)}
        super().log({**logs, **averages}, start_time)

    def _refuse_overflows(self) -> None:
        """Raise NonFiniteLossError if GradScaler has skipped all of the last steps. With fp16, reads the device."""
        scaler = self.accelerator.scaler
        if scaler is None:
            return
        overflows = self.monitor.overflows_in_a_row()
        if overflows >= MAX_OVERFLOWS:
            raise NonFiniteLossError(
                f"the gradients overflowed fp16 in each of {overflows} steps, up to step {self.state.global_step}: "
                f"GradScaler skipped them all, and its scale is {scaler.get_scale():g} now. Set training.bf16=true, "
                "not training.fp16, or neither for fp32"
            )
        if overflows >= self.state.max_steps:  # usual while the scale is being found, but worth knowing
            logger.warning("GradScaler skipped all %d steps of this run: the weights are as they were", overflows)

    # Checkpoints: see `SafeSaving` ------------------------------------------------------------------------------

    def begin_monitoring(self) -> None:
        """Start the count of skipped steps, or go on with the checkpoint's, and with what no log has told yet."""
        saved = self.state.stateful_callbacks.get(MONITOR, {}) if self._resumed_from is not None else {}
        saved = saved.get("attributes", {})
        self.monitor.skipped = self._skipped_at_log = saved.get("skipped", 0)
        self.monitor.untold = saved.get("untold", {})

    def _export_callbacks(self) -> None:
        super()._export_callbacks()
        attributes = {"skipped": self.monitor.skipped_so_far(), "untold": self.monitor.not_finite()}
        self.state.stateful_callbacks[MONITOR] = {"args": {}, "attributes": attributes}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # A checkpoint holds the trained weights, and the average beside them; the run's folder is for users.
        if self.average is not None and Path(output_dir or self.run_folder) == self.run_folder:
            state_dict = self.average.model.state_dict()
        token, self.args.hub_token = self.args.hub_token, None  # transformers writes the arguments, all of them
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    # Evaluation -------------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """COCO metrics of the eval data. Predictions are post-processed at once, and raw outputs never kept.

        The detections are written to `output_dir/evaluation` as COCO results, the numbers beside them.

        Raises:
            Terminated: SIGTERM came during training, or an evaluation after it.
        """
        model = self.average.model if self.average else self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        evaluator = CocoEvaluator(dataloader.dataset.split)
        self.callback_handler.eval_dataloader = dataloader
        with out_of_memory_explained(lambda: self._memory_advice("per_device_eval_batch_size")):
            for batch in dataloader:
                if self.termination.noted:
                    break
                evaluator.update(batch["image_ids"].tolist(), self.detect(model, batch))
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if self.termination.agreed_now():
            model.train(was_training)
            raise self._terminated()
        evaluator.gather()
        self.evaluation_sheet = self._evaluation_sheet(evaluator, dataloader.dataset)
        results = evaluator.results() if description == "Prediction" else None
        model.train(was_training)
        metrics = [
            self._metrics(evaluator, dataloader.dataset, metric_key_prefix)
            if self.accelerator.is_main_process
            else None
        ]
        metrics = broadcast_object_list(metrics)[0]
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.last_evaluation = self.state.global_step, named
        return EvalLoopOutput(predictions=results, label_ids=None, metrics=named, num_samples=len(dataloader.dataset))

    def _evaluation_sheet(self, evaluator: CocoEvaluator, dataset: DetectionDataset) -> Image.Image | None:
        count = self.args.evaluation_pictures
        if not (count and self.accelerator.is_main_process and trackers(self)):
            return None
        return evaluation_sheet(dataset, evaluator, count)

    def _metrics(self, evaluator: CocoEvaluator, dataset: DetectionDataset, prefix: str) -> dict[str, float]:
        metrics = evaluator.compute()
        settings = self._evaluation_settings(dataset) | {"backend": evaluator.backend}
        evaluator.save(Path(self.args.output_dir) / EVALUATION_FOLDER, metrics, f"{prefix}_", settings)
        return metrics

    def _evaluation_settings(self, dataset: DetectionDataset) -> dict[str, Any]:
        """Of which images, and how, metrics are; as others may read it."""
        split, processor = dataset.split, self.processing_class
        names = ("score_threshold", "nms_threshold", "max_candidates", "max_detections")
        return {
            "data": public(split.source),
            "split": split.name,
            "images": len(split),
            **dict(zip(("short_side", "long_side"), dataset.size, strict=True)),
            **{name: getattr(processor, name) for name in names},
            "precision": self.precision,
            **({"step": self.state.global_step} if self.state.max_steps else {}),
        }

    @torch.no_grad()
    def detect(self, model: DenseDetector, batch: dict) -> list[dict[str, Tensor]]:
        """Detections of a batch in original pixels: `scores`, `labels`, `boxes` xyxy an image."""
        inputs = self._prepare_inputs({name: value for name, value in batch.items() if name.startswith("pixel_")})
        with self.accelerator.autocast():
            outputs = model(**inputs)
        return self.processing_class.post_process_object_detection(
            outputs, threshold=0.0, target_sizes=batch["original_sizes"]
        )


class _TrainingHooks(TrainerCallback):
    """The moments at which the trainer needs a word: the start, a new epoch, before and after a step."""

    def __init__(self, trainer: DetectionTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_monitoring()
        self.trainer.begin_averaging()
        self.trainer.catch_up_evaluation()

    def on_epoch_begin(self, args, state, control, **kwargs):
        # On the sampler itself: after a resume in mid-epoch accelerate's wrappers don't pass the epoch on.
        if self.trainer.train_sampler is not None:
            self.trainer.train_sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.mask_non_finite_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.restore_masked_step()
        self.trainer.average_step()
        self.trainer.monitor.clock.switch(None)


def as_detector(model: DenseDetector | str) -> DenseDetector:
    """A detector as it is, or loaded from its folder or Hub id."""
    return model if isinstance(model, DenseDetector) else load_detector(str(model), None, ())


def _refuse_unsupported(args: DetectionTrainingArguments) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs, which would make it DataParallel: start one process a GPU with "
            "`accelerate launch --multi_gpu`, or hide the others with CUDA_VISIBLE_DEVICES=0."
        )
    if args.sync and args.torch_compile:
        raise ValueError("sync and torch_compile don't go together: sums over processes can't be compiled here.")
    for tracker, (available, package) in TRACKERS.items():
        if tracker in args.report_to and not available():
            raise ValueError(
                f"training.report_to={tracker} needs the package {package}: pip install {package}, or, in a clone of "
                'the repository, pip install -e ".[tracking]"; or set training.report_to=none.'
            )
    if args.fsdp or args.deepspeed:
        raise ValueError("FSDP and DeepSpeed aren't supported; these detectors fit a GPU: use plain multi_gpu.")


def _as_dataset(data, processor: DenseDetectorImageProcessor, train: bool, seed: int) -> DetectionDataset | None:
    if data is None or isinstance(data, DetectionDataset):
        return data
    if not isinstance(data, DetectionSplit):
        raise ValueError(
            f"a data set must be a DetectionDataset or a DetectionSplit (see load_coco), not {type(data).__name__}"
        )
    size = processor.size
    return DetectionDataset(
        data, train=train, short_side=size["shortest_edge"], long_side=size["longest_edge"], seed=seed
    )


def check_classes(model: DenseDetector, dataset: DetectionDataset | None, name: str, advice: str) -> None:
    """Raise ValueError, with the advice, if a data set of this name has other classes than the model."""
    if dataset is None:
        return
    mine, theirs = map(coco_spelling, (model.config.label_names, dataset.split.label_names))
    if mine != theirs:
        if near := near_matches(mine, theirs):
            raise ValueError(f"{name} and the model have {spelling_problem(near, 'model', name)}.")
        raise ValueError(
            f"{name} has {len(theirs)} labels ({listed(theirs)}), the model {len(mine)} ({listed(mine)}): {advice}."
        )
