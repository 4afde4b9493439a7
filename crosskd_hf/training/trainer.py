"""The trainer of a detector, on transformers.Trainer."""

import functools
import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler
from transformers import BaseImageProcessor, EvalPrediction, PreTrainedModel, TrainerCallback
from transformers.trainer_utils import TrainOutput
from transformers.training_args import OptimizerNames

from ..data.collator import DetectionCollator
from ..data.dataset import DetectionDataset
from ..data.processor_size import ProcessorCollator
from ..data.sampler import MixedBatchSampler, OrientationBatchSampler
from ..data.split import DetectionSplit
from ..data.stream import DetectionStream
from ..data.unlabeled import MixedDataset
from ..models.families import is_dense
from ..models.image_processing import DenseDetectorImageProcessor
from ..models.transformers_detectors import detection_losses
from ..utils.distributed import check_same
from ..utils.memory import out_of_memory_explained
from .arguments import DEFAULT_OUTPUT, DetectionTrainingArguments
from .base import MODEL_LABELS
from .evaluation_loop import CocoEvaluation
from .optimization import build_optimizer, group_values, groups_of, multistep_scheduler
from .saving import SafeSaving
from .step_monitor import NonFiniteLossError, StepMonitor
from .termination import TerminationSignal, obey_parent_only
from .tracking import TrackingCallback
from .trainer_inputs import (
    as_dataset,
    as_detector,
    first_detector,
    prepare_detector,
    prepare_stream,
    processor_for,
    refuse_unsupported,
)

logger = logging.getLogger(__name__)
MAX_OVERFLOWS = 20  # steps in a row: GradScaler halves its scale in each, from 65536 to below 0.1


class DetectionTrainer(SafeSaving, CocoEvaluation):
    """Trains a detector alone.

    Of the private methods of `transformers.Trainer` only those are overridden that `SafeSaving` and `HubUpload` list.

    Args:
        model: a detector, or a folder or Hub id of one.
        args: the training arguments.
        train_dataset: a `DetectionDataset` or `DetectionStream`, or a `DetectionSplit`, which is then resized as the
            processor does it.
        eval_dataset: the same, but no stream.
        processing_class: the image processor, saved beside the model; None makes the one that goes with the model.
        data_collator: makes a batch of the items of a `DetectionDataset`; None: the one that goes with the model.
        compute_metrics: further metrics, beside COCO's; what it is given, `SeenBatches` says.
        model_init: makes the model anew for each training, in place of `model`; for `hyperparameter_search` it may
            take the trial.
        callbacks, optimizers: as in `transformers.Trainer`.

    Raises:
        ValueError: if the data's labels aren't the model's, the arguments ask for DataParallel, FSDP or DeepSpeed, or
            a learning rate factor is of no parameter.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | None = None,
        args: DetectionTrainingArguments | None = None,
        *,
        train_dataset: DetectionDataset | DetectionStream | DetectionSplit | None = None,
        eval_dataset: DetectionDataset | DetectionSplit | None = None,
        processing_class: BaseImageProcessor | None = None,
        data_collator: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        detector = first_detector(model, model_init, optimizers)
        args = DetectionTrainingArguments(DEFAULT_OUTPUT) if args is None else args
        refuse_unsupported(args)
        processor = processing_class or processor_for(model, detector.config)
        datasets: dict[str, Any] = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        for name, data in datasets.items():
            if name == "train_dataset" and isinstance(data, DetectionStream):
                prepare_stream(data, processor, args)
            elif data is not None:
                datasets[name] = dataset = as_dataset(data, processor, name == "train_dataset", args.seed)
                check_same(f"the images and classes of {name}", (len(dataset), dataset.split.label_names))
        prepare_detector(detector, args, datasets)
        if isinstance(processor, DenseDetectorImageProcessor) and args.standalone:
            processor.mark_standalone(True)
        if not is_dense(detector.config) and train_dataset is not None and args.optim == OptimizerNames.SGD:
            logger.warning(
                "training.optim is sgd, with which dense detectors are trained; %s wants adamw_torch, a learning "
                "rate of about 1e-4, and max_grad_norm 0.1",
                detector.config.model_type,
            )
        super().__init__(
            model=detector,
            args=args,
            data_collator=data_collator or _collator(processor, args),
            compute_metrics=compute_metrics,
            train_dataset=datasets["train_dataset"],
            eval_dataset=datasets["eval_dataset"],
            processing_class=processor,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_init = model_init  # type: ignore[assignment] # not given above, where a second model would be made
        self._output_dir, self._trials = args.output_dir, 0
        groups_of(self.trained_module(), args)  # a factor that is of no parameter ends here, and not in `train`
        self.monitor = StepMonitor(self.args.device)
        self.train_sampler: OrientationBatchSampler | MixedBatchSampler | None = None
        self._batches_per_epoch = 0  # until the loader is made
        self.termination = TerminationSignal()
        self.add_callback(_TrainingHooks(self))
        # Before all others, such as a tracker's that uploads the model at the end.
        self.callback_handler.callbacks.insert(0, _BestModelFirst(self))
        self.add_callback(TrackingCallback(self))

    # Data -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """Batches of one orientation, dealt out to the processes; of a stream, as its images come."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        if isinstance(self.train_dataset, DetectionStream):
            return self._stream_dataloader(self.train_dataset)
        sampler = OrientationBatchSampler(
            self.train_dataset.orientations(),
            self.args.per_device_train_batch_size,
            seed=self.args.seed,
            group=self.args.group_by_orientation,
            drop_last=self.args.dataloader_drop_last,
        )
        dataset, self.train_sampler = self.mixed(self.train_dataset, sampler)
        # `to_device` copies what the model reads; this would copy all of it, and wait.
        loader = self.accelerator.prepare_data_loader(
            DataLoader(dataset, batch_sampler=self.train_sampler, **self._loader_options()),
            device_placement=False,
        )
        self._batches_per_epoch = len(loader)
        # Before the loader starts workers, which get copies. max_steps overrides num_train_epochs.
        steps = self.args.max_steps
        epochs = -(-steps // self.steps_per_epoch) if steps > 0 else math.ceil(self.args.num_train_epochs)
        dataset.set_epochs(epochs)
        return loader

    def _stream_dataloader(self, stream: DetectionStream) -> DataLoader:
        """Each process and worker reads its own part, so that accelerate has nothing to deal out."""
        size = self.args.per_device_train_batch_size
        processes, workers = self.accelerator.num_processes, self.args.dataloader_num_workers
        stream.deal(self.accelerator.process_index, processes, size, workers)
        self._batches_per_epoch = self.args.max_steps * self.args.gradient_accumulation_steps
        return DataLoader(stream, batch_size=size, **self._loader_options())

    def mixed(
        self, dataset: DetectionDataset, sampler: OrientationBatchSampler
    ) -> tuple[DetectionDataset | MixedDataset, OrientationBatchSampler | MixedBatchSampler]:
        """What is trained on besides the labelled images: here, nothing."""
        return dataset, sampler

    def get_test_dataloader(self, test_dataset: Dataset | DetectionSplit) -> DataLoader:
        """The same as for evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def get_eval_dataloader(  # type: ignore[override] # a name of one of several data sets: there is one
        self, eval_dataset: Dataset | DetectionSplit | None = None
    ) -> DataLoader:
        """Every image exactly once over all processes, in the same batches however many there are."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset")
        dataset = as_dataset(dataset, self.processing_class, False, self.args.seed)
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
            # Not the global generator: each iterator draws a seed, and a resumed run starts another number of
            # iterators, so that its dropout would differ. The data sets don't use that seed.
            "generator": torch.Generator().manual_seed(self.args.seed),
        }

    def get_batch_samples(self, *args, **kwargs):
        """Fetch batches, timed. What follows, up to the optimizer's update, is the step.

        None for a resumed run that has all its steps: `transformers.Trainer` would take one more in mid-epoch.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        self.monitor.clock.switch("data_time")
        batches, count = super().get_batch_samples(*args, **kwargs)
        self.monitor.clock.switch("step_time")
        return batches, count

    # Optimisation -----------------------------------------------------------------------------------------------

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        """The model of the next training, which is a trial of `hyperparameter_search` or none.

        A trial writes into a folder of its own in `output_dir`, `run-NUMBER`.

        Raises:
            ValueError: see `prepare_detector`.
        """
        self.args.output_dir = self._output_dir
        if trial is not None:
            number = getattr(trial, "number", self._trials)  # optuna's; other backends give a dict
            self.args.output_dir, self._trials = f"{self._output_dir}/run-{number}", self._trials + 1
        model = as_detector(super().call_model_init(trial))  # type: ignore[arg-type]
        prepare_detector(model, self.args, {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset})
        self.train_sampler = self.average = None
        self._batches_per_epoch = 0
        return model

    def train(self, *args, **kwargs) -> TrainOutput:
        """As `transformers.Trainer` does it."""
        with out_of_memory_explained(lambda: self._memory_advice("per_device_train_batch_size")):
            return super().train(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """SGD as the published recipes use it, or any optimizer that transformers names.

        `transformers.Trainer` calls it when training begins, and prepares `model_wrapped` only if that is the model: a
        module around it is prepared here.
        """
        module = self.trained_module()
        if self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False) is not module:
            self.model_wrapped = self.accelerator.prepare(module)
        if self.optimizer is None:
            if self.args.optim == OptimizerNames.SGD:
                self.optimizer = build_optimizer(module, self.args)
            else:
                optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, module)  # type: ignore[arg-type]
                groups = groups_of(module, self.args)
                self.optimizer = optimizer_class(groups, **{**options, "lr": self.args.scaled_learning_rate})
        self.group_values = group_values(self.optimizer)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Warm-up and milestones of the arguments, or transformers' scheduler if there are no milestones."""
        if self.lr_scheduler is None and self.args.lr_milestones is not None:
            optimizer = optimizer or self.optimizer
            assert optimizer is not None  # its scheduler is made after it
            self.lr_scheduler = multistep_scheduler(optimizer, self.args, self.steps_per_epoch)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        if not self._batches_per_epoch:
            self.get_train_dataloader()
        return max(1, -(-self._batches_per_epoch // self.args.gradient_accumulation_steps))

    def training_step(self, model: nn.Module, inputs: dict, *args, **kwargs) -> Tensor:
        """Forward and backward."""
        return super().training_step(model, self.to_device(inputs), *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Sum of all loss terms, each kept for the log."""
        terms, outputs = self.loss_terms(model, inputs)
        self.monitor.record(terms, self.state.global_step + 1)
        loss = torch.stack(list(terms.values())).sum()
        return (loss, outputs) if return_outputs else loss

    def loss_terms(self, model: nn.Module, inputs: dict) -> tuple[dict[str, Tensor], object]:
        """Name -> scalar of every loss term, and the model's output."""
        if self.args.torch_compile and isinstance(inputs["labels"], Mapping):
            for name in MODEL_LABELS:  # one compiled program serves any number of boxes
                torch._dynamo.maybe_mark_dynamic(inputs["labels"][name], 1)
        outputs = model(**inputs)
        if self.trained_module() is self.model and not is_dense(self.model.config):
            return detection_losses(self.model, outputs, inputs["labels"]), outputs
        return outputs.loss_dict, outputs

    def note_overflow(self) -> None:
        """Note whether GradScaler, if there is one, is going to skip the step."""
        if self.accelerator.scaler is not None:
            gradients = [p.grad for p in self.trained_module().parameters() if p.grad is not None]
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

    def _refuse_overflows(self) -> None:
        """Save, and raise NonFiniteLossError, if GradScaler has skipped all of the last steps. With fp16, reads the
        device."""
        scaler = self.accelerator.scaler
        if scaler is None:
            return
        overflows = int(self.monitor.overflows)
        if overflows >= MAX_OVERFLOWS:
            self._save_checkpoint(self.model_wrapped)
            raise NonFiniteLossError(
                f"the gradients overflowed fp16 in each of {overflows} steps, up to step {self.state.global_step}: "
                f"GradScaler skipped them all, and its scale is {scaler.get_scale():g} now. Set training.bf16=true, "
                "not training.fp16, or neither for fp32"
            )
        if overflows >= self.state.max_steps:  # usual while the scale is being found, but worth knowing
            logger.warning("GradScaler skipped all %d steps of this run: the weights are as they were", overflows)


def _collator(
    processor: BaseImageProcessor, args: DetectionTrainingArguments
) -> DetectionCollator | ProcessorCollator:
    if not isinstance(processor, DenseDetectorImageProcessor):
        return ProcessorCollator(processor)
    # A GPU normalises faster than the loaders, which then send a quarter of the bytes.
    return DetectionCollator(processor, normalize=args.device.type == "cpu", padded=True)


class _TrainingHooks(TrainerCallback):
    """What the trainer does at the beginning and the end, in a new epoch, before and after a step."""

    def __init__(self, trainer: DetectionTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin()

    def on_epoch_begin(self, args, state, control, **kwargs):
        # On the sampler itself: after a resume in mid-epoch accelerate's wrappers don't pass the epoch on.
        if self.trainer.train_sampler is not None:
            self.trainer.train_sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.note_overflow()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.average is not None:
            self.trainer.average.update(self.trainer.model)
        self.trainer.monitor.clock.switch(None)

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.end_step():
            control.should_save = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if not self.trainer.steps_done:  # a resumed run that had all its steps
            control.should_evaluate = control.should_save = False

    def on_save(self, args, state, control, **kwargs):
        self.trainer.raise_if_ended()


class _BestModelFirst(TrainerCallback):
    """Has other callbacks see the best model at the end of training, if that is what is asked for."""

    def __init__(self, trainer: DetectionTrainer):
        self.trainer = trainer

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.load_best()
