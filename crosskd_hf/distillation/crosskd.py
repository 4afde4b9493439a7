"""Cross-head knowledge distillation (CrossKD, arXiv 2306.11369).

The student's half-processed head features, aligned to the teacher's, run through the rest of the *teacher's* head. The
predictions that come out mimic the teacher's own. Everything is in the teacher's terms - its head, its priors, its box
format, its classes - so no line depends on the student's detector.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.head import HeadOutput
from ..models.modeling_dense import DenseDetector, DenseDetectorOutput
from .losses import KDTargets, prediction_kd_losses
from .pairing import SAME, STUDENT, TEACHER, Pairing
from .settings import DistillationSettings


def channel_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation per channel of (N, C, H, W) over batch and space: (1, C, 1, 1) each.

    A single value (one image, 1x1 level) has no unbiased deviation: 0, so that it standardises to 0.
    """
    mean = features.mean(dim=(0, 2, 3), keepdim=True)
    if features.shape[0] * features.shape[2] * features.shape[3] == 1:
        return mean, torch.zeros_like(mean)
    return mean, features.std(dim=(0, 2, 3), keepdim=True)


def standardise(features: Tensor) -> Tensor:
    """(N, C, H, W) with zero mean and unit deviation per channel; gradients flow through both statistics."""
    mean, std = channel_statistics(features)
    return (features - mean) / (std + 1e-6)


def align(student: Tensor, teacher: Tensor) -> Tensor:
    """Give the student's features (N, C, H, W) the teacher's mean and deviation per channel."""
    mean, std = channel_statistics(teacher)
    return standardise(student) * std + mean


def cross_pass(
    teacher: DenseDetector, student: HeadOutput, own: HeadOutput, tap_index: int, pairing: Pairing = SAME
) -> HeadOutput:
    """Cross-head predictions: the student's taps through the teacher's blocks `tap_index` and later.

    Args:
        teacher: frozen; gradients flow through its layers into the student (and adapters), not into it.
        student: the student's head output with taps.
        own: the teacher's head output with taps.
        tap_index: blocks of the teacher that are not run. At 0 it takes FPN levels, which have no ReLU.
        pairing: which levels both have, and what gives the student's taps the teacher's width.

    Returns:
        the predictions at the shared levels.
    """

    def aligned(place: str, taps: list[Tensor] | None, references: list[Tensor] | None) -> list[Tensor]:
        if taps is None or references is None:
            raise ValueError("the cross pass needs taps of both heads: give both forwards tap_index")
        taps = pairing.adapters.adapt(place, pairing.shared_levels(taps, STUDENT))
        pairs = zip(taps, pairing.shared_levels(references, TEACHER), strict=True)
        features = [align(tap.float(), reference.float()) for tap, reference in pairs]
        return [F.relu(feature) for feature in features] if tap_index > 0 else features

    cls_features = aligned("cls", student.cls_taps, own.cls_taps)
    reg_features = aligned("reg", student.reg_taps, own.reg_taps)
    levels = None if pairing.levels is None else pairing.levels[TEACHER]
    return teacher.head(cls_features, reg_features, start_block=tap_index, levels=levels)


def crosskd_losses(
    student: DenseDetector,
    student_output: DenseDetectorOutput,
    teacher: DenseDetector,
    teacher_output: DenseDetectorOutput,
    settings: DistillationSettings,
    pairing: Pairing = SAME,
) -> dict[str, Tensor]:
    """The CrossKD terms, a (shared levels,) tensor each, weighted and normalised.

    Args:
        student: unwrapped; only its matching rule is looked at.
        student_output: of a forward with labels, `output_distillation=True` and the settings' tap.
        teacher: frozen.
        teacher_output: the same, without labels and without gradient.
        settings: weights and taps.
        pairing: of the two (`pair_up`).
    """
    if student_output.head is None or student_output.detection is None or teacher_output.head is None:
        raise ValueError("CrossKD needs both models' forward(output_distillation=True), the student's with labels")
    cross_head = cross_pass(teacher, student_output.head, teacher_output.head, settings.tap_index, pairing)
    targets = kd_targets(student, student_output, teacher, teacher_output, pairing)
    cross, own = teacher.flatten(cross_head), teacher.flatten(pairing.shared_head(teacher_output.head, TEACHER))
    # Both are in the teacher's classes.
    cross, own = (pairing.shared_classes(predictions, TEACHER) for predictions in (cross, own))
    with torch.autocast(cross.logits.device.type, enabled=False):
        terms = prediction_kd_losses(teacher, cross, own, targets, settings)
    return {f"kd_{name}": settings.crosskd * term for name, term in terms.items()}


def kd_targets(
    student: DenseDetector,
    student_output: DenseDetectorOutput,
    teacher: DenseDetector,
    teacher_output: DenseDetectorOutput,
    pairing: Pairing = SAME,
) -> KDTargets:
    """Mask, normalisers and positives of the distillation losses, on the teacher's priors of the shared levels.

    A student that labels the same priors by the same rule as the teacher lends its class weights (which also leave out
    RetinaNet's ignored band), its positives and the teacher's kind of normaliser. Any other student only lends its
    class normaliser, and the mask is the validity of the teacher's priors.
    """
    detection, head = student_output.detection, teacher_output.head
    priors = teacher.priors(head)
    if student.matching_rule() == teacher.matching_rule():  # the same strides too: all levels are shared
        by_box = teacher.distillation.normalizer == "box"
        return KDTargets(
            priors=priors,
            class_weights=detection.assignment.class_weights,
            normalizer=(detection.box_normalizer if by_box else detection.class_normalizer).clamp(min=1),
            positive=detection.assignment.positive,
            class_normalizer=detection.class_normalizer.clamp(min=1),
        )
    class_normalizer = detection.class_normalizer.clamp(min=1)
    class_weights = teacher.class_weights(teacher.valid_priors(head, teacher_output.image_sizes))
    return KDTargets(
        priors=pairing.shared_priors(priors, TEACHER),
        class_weights=pairing.shared_rows(class_weights, priors.level_sizes, TEACHER),
        normalizer=class_normalizer,
        positive=None,
        class_normalizer=class_normalizer,
    )
