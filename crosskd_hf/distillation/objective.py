"""All distillation terms of a pair of models, as the recipe composes them."""

import torch
from torch import Tensor

from ..models.modeling_dense import DenseDetector, DenseDetectorOutput
from .crosskd import crosskd_losses
from .mimic import mimic_losses
from .pkd import pkd_loss
from .settings import DistillationSettings


def teacher_forward(teacher: DenseDetector, inputs: dict, settings: DistillationSettings) -> DenseDetectorOutput:
    """The teacher's predictions and taps on the student's own input, without gradient and without labels."""
    with torch.no_grad():
        return teacher(
            pixel_values=inputs["pixel_values"],
            pixel_mask=inputs.get("pixel_mask"),
            output_distillation=True,
            tap_index=settings.tap_index,
            raw_taps=settings.raw_taps,
        )


def distillation_losses(
    student: DenseDetector,
    student_output: DenseDetectorOutput,
    teacher: DenseDetector,
    teacher_output: DenseDetectorOutput,
    settings: DistillationSettings,
) -> dict[str, Tensor]:
    """The terms `kd_* mimic_*` that the settings turn on, a weighted (levels,) tensor each."""
    terms: dict[str, Tensor] = {}
    if settings.crosskd > 0:
        terms |= crosskd_losses(student, student_output, teacher, teacher_output, settings)
    if settings.pkd > 0:
        feature_loss = pkd_loss(student_output.fpn_features, teacher_output.fpn_features)
        terms["kd_feature"] = settings.pkd * feature_loss
    if settings.mimic > 0:
        terms |= mimic_losses(student, student_output, teacher, teacher_output, settings)
    return terms
