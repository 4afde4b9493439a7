"""The trainer of a student with a teacher."""

import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..data.dataset import DetectionDataset
from ..data.split import DetectionSplit
from ..distillation.adapters import ATTRIBUTE, attach_adapters, detach_adapters
from ..distillation.objective import distillation_losses, prepare_teacher, student_forward, teacher_forward
from ..distillation.pairing import PARTLY, pair_up
from ..distillation.settings import resolve_settings
from ..models.base import DenseDetector, DenseDetectorOutput
from ..models.image_processing import DenseDetectorImageProcessor
from ..recipe.sections import DistillationSection
from ..utils.distributed import check_same, num_processes
from ..utils.escaping import printable
from ..weights.loading import weights_digest
from .arguments import DetectionTrainingArguments
from .checks import as_detector
from .trainer import DetectionTrainer

logger = logging.getLogger(__name__)

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
        model, teacher = as_detector(model), as_detector(teacher)
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

    def save_methods(self, folder: Path) -> None:
        """Write the adapters."""
        if self.pairing.adapters:
            self.pairing.adapters.save(folder)

    def load_methods(self, folder: Path) -> None:
        """Read the adapters."""
        self.pairing.adapters.load(folder)

    def load_weights(self, folder: Path) -> None:
        """The student's without the adapters, which it doesn't save; and these."""
        attached = ATTRIBUTE in self.model._modules
        detach_adapters(self.model)
        super().load_weights(folder)
        if attached:
            attach_adapters(self.model, self.pairing.adapters)
