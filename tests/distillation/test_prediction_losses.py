"""Losses between predictions and the teacher's: weights, masks and normalisers by hand."""

import math
from dataclasses import replace

import pytest
import torch

from crosskd_hf.distillation import Predictions
from crosskd_hf.distillation.prediction_losses import (
    KDTargets,
    Published,
    box_kd_loss,
    centerness_kd_loss,
    classification_kd_loss,
    prediction_kd_losses,
)

LN2 = math.log(2)
LN4 = math.log(4)  # logit of .8


def from_origin(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes (N, P, 4) xyxy as distances from the origin."""
    return boxes.new_zeros(boxes.shape[1], 2), torch.cat([-boxes[..., :2], boxes[..., 2:]], dim=-1)


def targets(mask: list, positive: list | None = None, normalizer: float = 1.0) -> KDTargets:
    """One image."""
    return KDTargets(
        mask=torch.tensor([mask], dtype=torch.float32),
        normalizer=torch.tensor(normalizer),
        positive=None if positive is None else torch.tensor([positive]),
        class_normalizer=torch.tensor(5.0),
    )


def predictions(logits: list, boxes=None, bins=None, quality: list | None = None) -> Predictions:
    boxes = None if boxes is None else torch.as_tensor(boxes, dtype=torch.float32)[None]
    return Predictions(
        logits=torch.tensor([logits], dtype=torch.float32),
        sides=lambda: from_origin(boxes),
        mask=torch.ones(1, len(logits)),
        bins=None if bins is None else torch.as_tensor(bins, dtype=torch.float32)[None],
        quality=None if quality is None else torch.tensor([quality]),
    )


# Classes ------------------------------------------------------------------------------------------------------------


def test_class_loss_sums_classes_of_unmasked_priors():
    # Logit 0 against the teacher's ln 4: |.5 - .8| ln 2 a class; equal logits: 0.
    student = predictions([[0.0, 0.0], [0.0, LN4], [0.0, 0.0]])
    teacher = predictions([[LN4, LN4], [LN4, LN4], [LN4, LN4]])
    unit = 0.3 * LN2
    loss = classification_kd_loss(student, teacher, targets([1, 1, 1]))
    assert loss[0].tolist() == pytest.approx([2 * unit, unit, 2 * unit])
    loss = classification_kd_loss(student, teacher, targets([1, 0, 1], normalizer=4.0))
    assert loss[0].tolist() == pytest.approx([2 * unit / 4, 0, 2 * unit / 4])


# Boxes --------------------------------------------------------------------------------------------------------------


def shifted(ious: list[float]) -> list[list[float]]:
    """Boxes in (0, 0, 10, 10) whose IoU with it, and GIoU, are the given."""
    return [[0.0, 0.0, 10.0, 10 * iou] for iou in ious]


@pytest.mark.parametrize(("log_iou", "losses"), [(False, [0.5, 0.75]), (True, [LN2, 2 * LN2])])
def test_boxes_are_weighted_by_the_teachers_best_class(log_iou, losses):
    # Best class probabilities .8 .5 .8 .5; IoUs .5 .25 1 .25; the last prior is masked out.
    teacher = predictions([[LN4, 0.0], [-9.0, 0.0], [0.0, LN4], [0.0, 0.0]], shifted([1, 1, 1, 1]))
    student = predictions([[50.0, 50.0]] * 4, shifted([0.5, 0.25, 1, 0.25]))
    loss = box_kd_loss(student, teacher, targets([1, 1, 1, 0], normalizer=2.0), log_iou=log_iou)
    assert loss[0].tolist() == pytest.approx([0.8 * losses[0] / 2, 0.5 * losses[1] / 2, 0, 0])


def test_boxes_apart_have_a_bounded_logarithm():
    teacher = predictions([[0.0]], [[0.0, 0, 10, 10]])
    boxes = torch.tensor([[[20.0, 20, 30, 30]]], requires_grad=True)
    student = replace(teacher, sides=lambda: from_origin(boxes))
    loss = box_kd_loss(student, teacher, targets([1]), log_iou=True)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.5 * math.log(1e6), rel=1e-5)
    assert boxes.grad.isfinite().all()


def test_bins_are_compared_by_kl_over_the_sum_of_weights():
    # Bins .5 .5 against the teacher's .8 .2: KL(teacher || student) = .8 ln 1.6 + .2 ln .4, on one of four sides.
    even, skewed = [0.0, 0.0], [LN4, 0.0]
    teacher = predictions([[0.0]] * 4, bins=[[skewed, even, even, even]] + 3 * [4 * [even]])
    student = predictions([[0.0]] * 4, bins=4 * [4 * [even]])
    kl = (0.8 * math.log(1.6) + 0.2 * math.log(0.4)) / 4
    # Weights .5: three of them sum to 1.5. The normaliser of 100 has no part in it.
    loss = box_kd_loss(student, teacher, targets([1, 1, 1, 0], normalizer=100.0))
    assert loss[0].tolist() == pytest.approx([0.5 * kl / 1.5, 0, 0, 0], rel=1e-5)
    # One weight of .5 is clamped at 1.
    loss = box_kd_loss(student, teacher, targets([1, 0, 0, 0], normalizer=100.0))
    assert loss[0].tolist() == pytest.approx([0.5 * kl, 0, 0, 0], rel=1e-5)


@pytest.mark.parametrize("student_bins", [None, torch.zeros(1, 4, 9)])
def test_boxes_are_compared_where_the_student_has_no_such_bins(student_bins):
    teacher = predictions([[0.0]], [[0.0, 0, 10, 10]], bins=torch.zeros(1, 4, 17))
    student = predictions([[0.0]], [[0.0, 0, 10, 5]], bins=student_bins)
    assert box_kd_loss(student, teacher, targets([1])).item() == pytest.approx(0.5 * 0.5)


@pytest.mark.parametrize("kind", ["giou", "log_iou", "bins"])
def test_equal_boxes_cost_nothing(kind):
    bins = torch.randn(2, 4, 17, generator=torch.Generator().manual_seed(0)) if kind == "bins" else None
    same = predictions([[0.0], [LN4]], [[0.0, 0, 10, 10], [2, 3, 7, 8]], bins)
    assert box_kd_loss(same, same, targets([1, 1]), log_iou=kind == "log_iou").abs().max() < 1e-6


# Centerness ---------------------------------------------------------------------------------------------------------


def test_centerness_loss_is_at_positives_over_the_class_normaliser():
    # BCE of p = .5 against anything is ln 2; p = .8 against .5 is -.5 ln .8 - .5 ln .2. The third isn't positive.
    student = predictions([[0.0]] * 4, quality=[0.0, LN4, 3.0, 0.0])
    teacher = predictions([[0.0]] * 4, quality=[2.0, 0.0, -3.0, -1.0])
    goal = targets([1, 1, 1, 1], positive=[True, True, False, True], normalizer=100.0)
    second = -0.5 * math.log(0.8) - 0.5 * math.log(0.2)
    assert centerness_kd_loss(student, teacher, goal)[0].tolist() == pytest.approx([LN2 / 5, second / 5, 0, LN2 / 5])


# All ----------------------------------------------------------------------------------------------------------------


def test_terms_are_weighted_and_centerness_is_optional():
    teacher = predictions([[LN4]], [[0.0, 0, 10, 10]], quality=[0.0])
    student = predictions([[0.0]], [[0.0, 0, 10, 5]], quality=[LN4])
    weights = Published(cls_weight=2.0, box_weight=3.0, centerness_weight=4.0)
    goal = targets([1], positive=[True])
    terms = prediction_kd_losses(student, teacher, goal, weights)
    plain = (
        classification_kd_loss(student, teacher, goal),
        box_kd_loss(student, teacher, goal),
        centerness_kd_loss(student, teacher, goal),
    )
    expected = dict(zip(("cls", "box", "centerness"), (2 * plain[0], 3 * plain[1], 4 * plain[2]), strict=True))
    torch.testing.assert_close(terms, expected)
    for changed in (
        (student, teacher, replace(goal, positive=None), weights),
        (student, replace(teacher, quality=None), goal, weights),
        (student, teacher, goal, replace(weights, centerness_weight=0.0)),
    ):
        assert set(prediction_kd_losses(*changed)) == {"cls", "box"}
