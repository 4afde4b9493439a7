"""All distillation terms of a pair of models, as the recipe composes them."""

import copy

import torch
from torch import Tensor, nn

from ..models.base import DenseDetector, DenseDetectorOutput
from ..models.folding import fold_batchnorms
from .crosskd import crosskd_losses
from .mimic import mimic_losses
from .pairing import SAME, STUDENT, TEACHER, Pairing
from .pkd import pkd_loss
from .settings import DistillationSettings


def prepare_teacher(
    teacher: DenseDetector, fold_batchnorm: bool = True, dtype: torch.dtype | None = None
) -> DenseDetector:
    """A frozen teacher as a run calls it. The given one's weights stay as they are, to be compared and saved.

    Args:
        teacher: in evaluation mode, on its device.
        fold_batchnorm: make the BatchNorms of a copy of its backbone part of the convolutions before them.
        dtype: of the autocast that it runs in. Weights of convolutions and linear layers, which autocast would cast in
            each call, are cast once; norms and the levels' scales stay in fp32.
    """
    parts = dict(teacher._modules)
    if fold_batchnorm:
        parts["backbone"] = fold_batchnorms(teacher.backbone)
    if dtype is not None:
        parts = {name: _cast_weights(copy.deepcopy(part), dtype) for name, part in parts.items()}
    prepared = copy.copy(teacher)
    prepared._modules = parts
    return prepared


def _cast_weights(part: nn.Module, dtype: torch.dtype) -> nn.Module:
    for module in part.modules():
        # Not those with a forward of their own: some standardise their weights as they run.
        if type(module).forward in (nn.Conv2d.forward, nn.Linear.forward):
            module.to(dtype)
    return part


def student_forward(student: nn.Module, inputs: dict, settings: DistillationSettings) -> DenseDetectorOutput:
    """The student's predictions, losses and taps. It may be wrapped, by DDP or `torch.compile`."""
    tap_index = settings.student_tap_index if settings.crosskd > 0 else None
    return student(
        **inputs,
        output_distillation=True,
        output_predictions=settings.mimic > 0,  # the cross pass has its own
        tap_index=tap_index,
        raw_taps=settings.raw_taps,
    )


def teacher_forward(
    teacher: DenseDetector, inputs: dict, settings: DistillationSettings, pairing: Pairing = SAME
) -> DenseDetectorOutput:
    """The teacher's predictions and taps on the student's images, in its own pixels, without gradient and labels."""
    pixel_values, pixel_mask = inputs["pixel_values"], inputs.get("pixel_mask")
    with torch.no_grad():
        return teacher(
            pixel_values=pixel_values if pairing.pixels is None else pairing.pixels(pixel_values, pixel_mask),
            pixel_mask=pixel_mask,
            output_distillation=True,
            tap_index=settings.tap_index if settings.crosskd > 0 else None,
            raw_taps=settings.raw_taps,
        )


def distillation_losses(
    student: DenseDetector,
    student_output: DenseDetectorOutput,
    teacher: DenseDetector,
    teacher_output: DenseDetectorOutput,
    settings: DistillationSettings,
    pairing: Pairing = SAME,
) -> dict[str, Tensor]:
    """The terms `kd_* mimic_*` that the settings turn on, a weighted tensor each, to be summed."""
    pair = (student, student_output, teacher, teacher_output, settings, pairing)
    terms: dict[str, Tensor] = {}
    if settings.crosskd > 0:
        terms |= crosskd_losses(*pair)
    if settings.pkd > 0:
        mine = pairing.adapters.adapt("fpn", pairing.shared_levels(student_output.fpn_features, STUDENT))
        theirs = pairing.shared_levels(teacher_output.fpn_features, TEACHER)
        terms["kd_feature"] = settings.pkd * pkd_loss(mine, theirs, settings.sync)
    if settings.mimic > 0:
        terms |= mimic_losses(*pair)
    return terms
