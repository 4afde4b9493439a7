"""The trainer of a student with its teacher: `DetectionTrainer` with a pair."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, EvalPrediction, PreTrainedModel, TrainerCallback

from ..data.dataset import DetectionDataset
from ..data.sampler import MixedBatchSampler, OrientationBatchSampler
from ..data.split import DetectionSplit
from ..data.stream import DetectionStream
from ..data.unlabeled import MixedDataset
from ..distillation import CrossKD, DistillationPair, KDMethod, PairError, QueryCrossKD
from ..distillation.compatibility import PARTLY
from ..models.families import is_dense
from ..utils.distributed import check_same, num_processes
from ..utils.escaping import printable
from ..weights.loading import weights_digest
from ..weights.mmdet import CheckpointError
from .arguments import DEFAULT_OUTPUT, DetectionTrainingArguments
from .trainer import DetectionTrainer
from .trainer_inputs import as_dataset, as_detector, first_detector, processor_for

logger = logging.getLogger(__name__)

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class DistillationTrainer(DetectionTrainer):
    """Trains a student with a teacher.

    Any two detectors can be a pair. What they share is found by `pair_up`: class names, strides and pixels; where
    widths differ, methods train adapters, which are kept in checkpoints and left out of saved models.

    Args:
        model: the student.
        teacher: a detector, or a folder or Hub id of one. It is frozen, kept outside of DDP and never saved.
        methods: what the student learns by; None is CrossKD of the teacher's kind, as published where it is.
        teacher_processor: makes the teacher's input; None: the one that goes with it.
        unlabeled_dataset: further images, without boxes. Their batches are dealt in between: the student learns from
            the teacher alone there. Their terms are logged as `unlabeled_...`.
        unlabeled_ratio: unlabelled batches per labelled batch.
        args and all others: see `DetectionTrainer`. `model_init` makes the student; each training has methods and
            adapters of its own then.

    Raises:
        PairError: if the student can't learn from this teacher, naming why.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | None = None,
        teacher: PreTrainedModel | str | None = None,
        args: DetectionTrainingArguments | None = None,
        *,
        train_dataset: DetectionDataset | DetectionStream | DetectionSplit | None = None,
        eval_dataset: DetectionDataset | DetectionSplit | None = None,
        processing_class: BaseImageProcessor | None = None,
        data_collator: Callable | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        methods: Sequence[KDMethod] | None = None,
        teacher_processor: BaseImageProcessor | None = None,
        unlabeled_dataset: DetectionDataset | DetectionSplit | None = None,
        unlabeled_ratio: float = 1.0,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        if teacher is None:
            raise ValueError("give the trainer a teacher; DetectionTrainer trains without one")
        args = DetectionTrainingArguments(DEFAULT_OUTPUT) if args is None else args
        student, self.teacher = first_detector(model, model_init, optimizers), as_detector(teacher)
        processing_class = processing_class or processor_for(model, student.config)
        self.teacher_processor = teacher_processor or processor_for(teacher, self.teacher.config)
        if methods is None:
            methods = [CrossKD() if is_dense(self.teacher.config) else QueryCrossKD()]
        self.pair = DistillationPair(
            student, self.teacher, methods, processing_class, args.seed, self.teacher_processor
        )
        super().__init__(
            student,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_init = model_init  # type: ignore[assignment]
        self.unlabeled_ratio = unlabeled_ratio
        self.unlabeled_dataset = None
        if unlabeled_dataset is not None:
            if isinstance(self.train_dataset, DetectionStream):
                raise ValueError("unlabelled images can't be mixed into a stream: leave unlabeled_dataset out")
            self.unlabeled_dataset = as_dataset(unlabeled_dataset, self.processing_class, True, args.seed)
            check_same("the images of unlabeled_dataset", len(self.unlabeled_dataset))
            if len(self.unlabeled_dataset) < args.per_device_train_batch_size:
                raise ValueError(
                    f"{len(self.unlabeled_dataset)} unlabelled images make no batch of "
                    f"{args.per_device_train_batch_size}: lower training.per_device_train_batch_size"
                )
        if self.optimizer is not None and self.pair.methods.state_dict():
            raise ValueError(
                "the distillation methods train parameters of their own, such as adapters where student and teacher "
                "differ in width, which the optimizer that was given doesn't know: leave optimizers out and set "
                "training arguments instead."
            )
        if num_processes() > 1:  # DDP sees to the student's, not to these
            check_same("the teacher's weights", weights_digest(self.teacher))
        if self.is_world_process_zero():
            for note in self.pair.notes:
                logger.log(logging.WARNING if PARTLY in note else logging.INFO, "%s", printable(note))
        self._prepare_pair()

    def _prepare_pair(self) -> None:
        # Before it moves: the teacher as it was given stays where it is.
        precision = PRECISIONS.get(self.accelerator.mixed_precision)
        self.pair.prepare_teacher(self.args.fold_teacher_batchnorm, precision)
        self.pair.to(self.args.device)
        if self.args.channels_last:
            self.pair.to(memory_format=torch.channels_last)

    def call_model_init(self, trial: Any = None) -> PreTrainedModel:
        """The student of the next training, in a pair of its own; see `DetectionTrainer.call_model_init`."""
        student = super().call_model_init(trial)
        methods: list[Any] = [type(method)(method.settings) for method in self.pair.methods.values()]
        processors = self.processing_class, self.teacher_processor
        self.pair = DistillationPair(student, self.teacher, methods, processors[0], self.args.seed, processors[1])
        self._prepare_pair()
        return student

    def trained_module(self) -> nn.Module:
        """The pair."""
        return self.pair

    def mixed(
        self, dataset: DetectionDataset, sampler: OrientationBatchSampler
    ) -> tuple[DetectionDataset | MixedDataset, OrientationBatchSampler | MixedBatchSampler]:
        """The labelled batches, and unlabelled ones between them."""
        if self.unlabeled_dataset is None:
            return dataset, sampler
        args = self.args
        unlabeled = OrientationBatchSampler(
            self.unlabeled_dataset.orientations(),
            args.per_device_train_batch_size,
            seed=args.seed,
            group=args.group_by_orientation,
            drop_last=True,
        )
        batches = MixedBatchSampler(sampler, unlabeled, self.unlabeled_ratio, args.world_size)
        return MixedDataset(dataset, self.unlabeled_dataset), batches

    def loss_terms(self, model: nn.Module, inputs: dict) -> tuple[dict[str, Tensor], object]:
        """See `DetectionTrainer.loss_terms`; those of an unlabelled batch have names of their own."""
        if "labels" in inputs:
            return super().loss_terms(model, inputs)
        images = {name: value for name, value in inputs.items() if name.startswith("pixel_")}
        terms, outputs = super().loss_terms(model, {**images, "labels": None})
        return {f"unlabeled_{name}": term for name, term in terms.items()}, outputs

    def distilled_by(self) -> dict[str, str]:
        """The methods and their settings."""
        methods = {}
        for name, method in self.pair.methods.items():
            resolved = method.resolved
            settings: dict[str, Any] = dataclasses.asdict(resolved) if dataclasses.is_dataclass(resolved) else {}
            methods[name] = ", ".join(f"{key} {value}" for key, value in settings.items())
        return methods

    def save_methods(self, folder: Path) -> None:
        """Write what the methods train themselves."""
        self.pair.save_methods(folder)

    def load_methods(self, folder: Path) -> None:
        """Read what `save_methods` wrote.

        Raises:
            CheckpointError: see `DistillationPair.load_methods`.
        """
        try:
            self.pair.load_methods(folder)
        except PairError as error:
            raise CheckpointError(str(error)) from error
