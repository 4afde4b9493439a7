"""Trainers of dense detectors, alone and with a teacher, on transformers.Trainer."""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.integrations import is_tensorboard_available, is_trackio_available, is_wandb_available
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.training_args import OptimizerNames

from ..data.collator import DetectionCollator
from ..data.dataset import DetectionDataset
from ..data.sampler import OrientationBatchSampler
from ..data.split import DetectionSplit
from ..distillation.adapters import attach_adapters, detach_adapters
from ..distillation.objective import distillation_losses, prepare_teacher, student_forward, teacher_forward
from ..distillation.pairing import PARTLY, pair_up
from ..distillation.settings import resolve_settings
from ..hub.upload import HubUpload
from ..models.base import DenseDetector, DenseDetectorOutput
from ..models.image_processing import DenseDetectorImageProcessor
from ..recipe.sections import DistillationSection
from ..utils.distributed import check_same, num_processes
from ..utils.escaping import printable
from ..utils.label_names import coco_spelling, listed, near_matches, spelling_problem
from ..utils.memory import out_of_memory_explained
from ..utils.redact import public
from ..weights.loading import load_detector, weights_digest
from .arguments import DetectionTrainingArguments
from .checkpoints import newest_complete
from .evaluation import CocoEvaluator
from .monitoring import NonFiniteLossError, StepMonitor
from .optimization import build_optimizer, multistep_scheduler, parameter_groups
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
        model = _as_detector(model)
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
        self.monitor = StepMonitor(self.args.device)
        self.train_sampler: OrientationBatchSampler | None = None
        self.last_evaluation: tuple[int, dict[str, float]] = (-1, {})
        self.termination = TerminationSignal()
        self.evaluation_sheet: Image.Image | None = None  # of the last evaluation, for the trackers
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
        return batches, count

    # Optimisation -----------------------------------------------------------------------------------------------

    def train(self, *args, **kwargs) -> TrainOutput:
        """As `transformers.Trainer` does it."""
        with out_of_memory_explained(lambda: self._memory_advice("per_device_train_batch_size")):
            return super().train(*args, **kwargs)

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

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of all loss terms, each kept for the log."""
        terms, outputs = self.loss_terms(model, inputs)
        self.monitor.record(terms, self.state.global_step + 1)
        loss = torch.stack(list(terms.values())).sum()
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

    def note_overflow(self) -> None:
        """Note whether GradScaler, if there is one, is going to skip the step."""
        if self.accelerator.scaler is not None:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self.monitor.record_overflow(~torch.nn.utils.get_total_norm(gradients).isfinite())

    # Log --------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add every loss term, the times and the memory to a training log.

        Raises:
            NonFiniteLossError: see `check_finite`; or fp16 overflowed in each of the last `MAX_OVERFLOWS` steps.
        """
        if {"loss", "train_loss"} & set(logs):
            with self._last_checkpoint_named():
                logs = logs | self.monitor.averages(self._tensors(), self.accelerator.gather)
            self._refuse_overflows()
        super().log(logs, start_time)

    def check_finite(self) -> None:
        """Look at all that training computes, before it is saved.

        Raises:
            NonFiniteLossError: a loss term since the last log, a parameter, a buffer or the average isn't finite.
        """
        with self._last_checkpoint_named():
            self.monitor.check(self._tensors(), self.accelerator.gather)

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of what is trained, and of the average, by name."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        average = self.average.model.state_dict() if self.average is not None else {}
        return tensors | {f"the average of {name}": tensor for name, tensor in average.items()}

    @contextlib.contextmanager
    def _last_checkpoint_named(self) -> Iterator[None]:
        """Tell where a run that isn't finite any more can start again."""
        try:
            yield
        except NonFiniteLossError as error:
            good = newest_complete(self.run_folder)
            saved = f"the last checkpoint, {good}, is from before" if good else "no checkpoint was saved before"
            raise NonFiniteLossError(
                f"{error} (found after step {self.state.global_step}): training is stopped, and {saved}. Usual "
                "causes: a learning rate too high for this batch size, no warm-up, half precision, or broken boxes in "
                "the data. Start the same command again with other values and --accept-changes."
            ) from None

    def _refuse_overflows(self) -> None:
        """Save, and raise NonFiniteLossError, if GradScaler has skipped all of the last steps. With fp16, reads the
        device."""
        scaler = self.accelerator.scaler
        if scaler is None:
            return
        overflows = self.monitor.overflows_in_a_row()
        if overflows >= MAX_OVERFLOWS:
            self._save_checkpoint(self.model_wrapped, trial=None)
            raise NonFiniteLossError(
                f"the gradients overflowed fp16 in each of {overflows} steps, up to step {self.state.global_step}: "
                f"GradScaler skipped them all, and its scale is {scaler.get_scale():g} now. Set training.bf16=true, "
                "not training.fp16, or neither for fp32"
            )
        if overflows >= self.state.max_steps:  # usual while the scale is being found, but worth knowing
            logger.warning("GradScaler skipped all %d steps of this run: the weights are as they were", overflows)

    # Checkpoints: see `SafeSaving` ------------------------------------------------------------------------------

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


class DistillationTrainer(DetectionTrainer):
    """Trains a student with a teacher: CrossKD and, if asked for, feature distillation.

    Any two detectors can be a pair. What they share is found by `pair_up`: class names, strides, pixels, and widths
    (by adapters that are trained along, kept in checkpoints, and left out of saved models).

    Args:
        model: the student.
        teacher: a detector, or a folder or Hub id of one. It is frozen, kept outside of DDP and never saved.
        distillation: which terms, with which weights; None gives CrossKD as published for the teacher's detector.
        args, train_dataset, eval_dataset, processing_class, callbacks, optimizers: see `DetectionTrainer`.

    Raises:
        ValueError: if the student can't learn from this teacher, naming why (see `pair_up`).
    """

    def __init__(
        self,
        model: DenseDetector | str,
        teacher: DenseDetector | str,
        args: DetectionTrainingArguments,
        train_dataset: DetectionDataset | DetectionSplit | None = None,
        eval_dataset: DetectionDataset | DetectionSplit | None = None,
        processing_class: DenseDetectorImageProcessor | None = None,
        distillation: DistillationSection | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        model, teacher = _as_detector(model), _as_detector(teacher)
        self.settings = resolve_settings(distillation or DistillationSection(), teacher, False)
        pairing = pair_up(model, teacher, self.settings, args.seed, processing_class)
        super().__init__(model, args, train_dataset, eval_dataset, processing_class, callbacks, optimizers)
        if pairing.adapters and self.optimizer is not None:
            raise ValueError(
                "student and teacher differ in width, so that adapters are trained too, which the optimizer that was "
                "given doesn't know: leave optimizers out and set training arguments instead."
            )
        if pairing.adapters and args.ddp_find_unused_parameters:
            raise ValueError(
                "student and teacher differ in width, so that adapters are trained too, which work outside of the "
                "student's forward: with ddp_find_unused_parameters DDP would take them for unused. Set it false."
            )
        if num_processes() > 1:  # DDP sees to the student's, not to these
            check_same("the teacher's weights", weights_digest(teacher))
        self.pairing = pairing.to(self.args.device)
        if self.is_world_process_zero():
            for note in pairing.notes:
                logger.log(logging.WARNING if PARTLY in note else logging.INFO, "%s", printable(note))
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        # Plain, not prepared by accelerate: it has no gradients to average and must not count as the trained model.
        dtype = PRECISIONS.get(self.accelerator.mixed_precision)
        self._teaching = prepare_teacher(self.teacher, args.fold_teacher_batchnorm, dtype)
        if args.channels_last:
            self._teaching.to(memory_format=torch.channels_last)
        self._distil = self._distillation_terms
        if args.torch_compile:
            self._distil = torch.compile(
                self._distil, backend=args.torch_compile_backend, mode=args.torch_compile_mode
            )

    def train(self, *args, **kwargs) -> TrainOutput:
        """As `transformers.Trainer` does it; the student has the adapters meanwhile."""
        attach_adapters(self.model, self.pairing.adapters)
        try:
            return super().train(*args, **kwargs)
        finally:
            detach_adapters(self.model)
            if self.average is not None:
                detach_adapters(self.average.model)

    def loss_terms(self, model: nn.Module, inputs: dict) -> tuple[dict[str, Tensor], object]:
        """The student's own terms, and those of the distillation."""
        self._mark_dynamic(inputs)
        outputs = student_forward(model, inputs, self.settings)
        student = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            terms = self._distil(student, outputs, inputs)
        return outputs.loss_dict | terms, outputs

    def _distillation_terms(self, student: DenseDetector, outputs: DenseDetectorOutput, inputs: dict) -> dict:
        settings, pairing = self.settings, self.pairing
        own = teacher_forward(self._teaching, inputs, settings, pairing)
        terms = distillation_losses(student, outputs, self._teaching, own, settings, pairing)
        return {name: term.sum() for name, term in terms.items()}

    def _write_checkpoint(self, model: nn.Module, trial, folder: Path) -> None:
        super()._write_checkpoint(model, trial, folder)
        if self.pairing.adapters and self.args.should_save:
            self.pairing.adapters.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.pairing.adapters.load(resume_from_checkpoint)


class _TrainingHooks(TrainerCallback):
    """The moments at which the trainer needs a word: the start, a new epoch, before and after a step."""

    def __init__(self, trainer: DetectionTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_averaging()
        self.trainer.catch_up_evaluation()

    def on_epoch_begin(self, args, state, control, **kwargs):
        # On the sampler itself: after a resume in mid-epoch accelerate's wrappers don't pass the epoch on.
        if self.trainer.train_sampler is not None:
            self.trainer.train_sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.note_overflow()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.average_step()
        self.trainer.monitor.clock.switch(None)


def _as_detector(model: DenseDetector | str) -> DenseDetector:
    return model if isinstance(model, DenseDetector) else load_detector(str(model), None, ())


def _refuse_unsupported(args: DetectionTrainingArguments) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs, which would make it DataParallel: start one process a GPU with "
            "`accelerate launch --multi_gpu`, or hide the others with CUDA_VISIBLE_DEVICES=0."
        )
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
