"""Cross-head knowledge distillation (CrossKD, arXiv 2306.11369).

The student's half-processed head features, aligned to the teacher's, run through the rest of the *teacher's* head. The
predictions that come out mimic the teacher's own. Everything is in the teacher's terms - its head, its priors, its box
format, its classes - so no line depends on the student's detector.
"""

import torch
from torch import Tensor

from ..models.base import DenseDetector, DenseDetectorOutput
from ..models.head import HeadOutput
from .alignment import align
from .losses import KDTargets, prediction_kd_losses
from .pairing import SAME, STUDENT, TEACHER, Pairing
from .settings import DistillationSettings

Taps = HeadOutput | DenseDetectorOutput  # both have cls_taps and reg_taps


def cross_pass(
    teacher: DenseDetector, student: Taps, own: Taps, tap_index: int, pairing: Pairing = SAME, sync: bool = False
) -> HeadOutput:
    """Cross-head predictions: the student's taps through the teacher's blocks `tap_index` and later.

    Args:
        teacher: frozen; gradients flow through its layers into the student (and adapters), not into it.
        student: the student's output, or its head's, with taps.
        own: the teacher's.
        tap_index: blocks of the teacher that are not run. At 0 it takes FPN levels, which have no ReLU.
        pairing: which levels both have, and what gives the student's taps the teacher's width.
        sync: align by the statistics of all processes' maps, instead of this one's as published.

    Returns:
        the predictions at the shared levels.
    """

    taps: list[list[Tensor]] = []
    references: list[list[Tensor]] = []
    for place, mine, theirs in (
        ("cls", student.cls_taps, own.cls_taps),
        ("reg", student.reg_taps, own.reg_taps),
    ):
        if mine is None or theirs is None:
            raise ValueError("the cross pass needs taps of both heads: give both forwards tap_index")
        taps.append(pairing.adapters.adapt(place, pairing.shared_levels(mine, STUDENT)))
        references.append(pairing.shared_levels(theirs, TEACHER))
    # FPN levels: both towers of both models start from them. With different taps only the student's are the same.
    if all(a is b for both in (taps, references) for a, b in zip(*both, strict=True)):
        del taps[1], references[1]
    mine, theirs = ([m for maps in both for m in maps] for both in (taps, references))
    cls_taps = taps[0]
    features = align(mine, theirs, tap_index > 0, sync)
    cls_features, reg_features = features[: len(cls_taps)], features[-len(cls_taps) :]
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
    """The CrossKD terms, a (N, P) tensor each, weighted and normalised.

    Args:
        student: unwrapped; only its matching rule is looked at.
        student_output: of a forward with labels, `output_distillation=True` and the settings' tap.
        teacher: frozen.
        teacher_output: the same, without labels and without gradient.
        settings: weights and taps.
        pairing: of the two (`pair_up`).
    """
    if student_output.detection is None or teacher_output.predictions is None:
        raise ValueError("CrossKD needs both models' forward(output_distillation=True), the student's with labels")
    targets = kd_targets(student, student_output, teacher, teacher_output, pairing)
    # Not kept in a variable: the maps of nine anchors' classes are large.
    cross = teacher.flatten(
        cross_pass(teacher, student_output, teacher_output, settings.tap_index, pairing, settings.sync)
    )
    own = pairing.shared_predictions(teacher_output, TEACHER)
    # Both are in the teacher's classes.
    cross, own = (pairing.shared_classes(predictions, TEACHER) for predictions in (cross, own))
    with torch.autocast(cross.logits.device.type, enabled=False):
        terms = prediction_kd_losses(teacher, cross, own, targets, settings, scale=settings.crosskd, overwrite=True)
    return {f"kd_{name}": term for name, term in terms.items()}


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
    detection, priors = student_output.detection, teacher_output.priors
    class_normalizer = detection.class_normalizer.clamp(min=1)
    if student.matching_rule() == teacher.matching_rule():  # the same strides too: all levels are shared
        by_box = teacher.distillation.normalizer == "box"
        return KDTargets(
            priors=priors,
            class_weights=detection.assignment.class_weights,
            normalizer=detection.box_normalizer.clamp(min=1) if by_box else class_normalizer,
            positive=detection.assignment.positive,
            class_normalizer=class_normalizer,
        )
    class_weights = teacher.class_weights(teacher.valid_priors(priors, student_output.image_sizes))
    return KDTargets(
        priors=pairing.shared_priors(priors, TEACHER),
        class_weights=pairing.shared_rows(class_weights, priors.level_sizes, TEACHER),
        normalizer=class_normalizer,
        positive=None,
        class_normalizer=class_normalizer,
    )
