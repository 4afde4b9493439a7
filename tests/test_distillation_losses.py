"""Losses between cross-head predictions and the teacher's: weights, masks and normalisers by hand."""

import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from crosskd_hf.distillation.losses import KDTargets, box_kd_loss, centerness_kd_loss, classification_kd_loss
from crosskd_hf.models import CONFIGS, MODELS
from crosskd_hf.models.base import Predictions, Priors
from crosskd_hf.models.losses import distance_overlaps

LN2 = math.log(2)
LN4 = math.log(4)  # logit of .8


def targets(weights: list, sizes: tuple[int, ...], positive: list | None = None, normalizer: float = 1.0) -> KDTargets:
    """One image; every prior is an anchor of 10 pixels and stride 8."""
    count = sum(sizes)
    return KDTargets(
        priors=Priors.of(
            [torch.tensor([[0.0, 0, 10, 10]]).repeat(size, 1) for size in sizes],
            [8] * len(sizes),
            torch.zeros(count, 2),
        ),
        class_weights=torch.tensor([weights], dtype=torch.float32),
        normalizer=torch.tensor(normalizer),
        positive=None if positive is None else torch.tensor([positive]),
        class_normalizer=torch.tensor(5.0),
    )


def predictions(logits: list, boxes=None, centerness: list | None = None) -> Predictions:
    return Predictions(
        logits=torch.tensor([logits], dtype=torch.float32),
        boxes=None if boxes is None else torch.as_tensor(boxes, dtype=torch.float32)[None],
        centerness=None if centerness is None else torch.tensor([centerness]),
    )


@cache
def detector(name: str):
    with torch.device("meta"):
        return MODELS[name](CONFIGS[name](backbone="resnet18", fpn_channels=8, head_channels=8))


# kd_cls -------------------------------------------------------------------------------------------------------------


def test_class_loss_sums_classes_of_unmasked_priors():
    # Cross 0 against teacher logit ln 4: |.5 - .8| ln 2 a class; equal logits: 0.
    cross = predictions([[0.0, 0.0], [0.0, LN4], [0.0, 0.0]])
    teacher = predictions([[LN4, LN4], [LN4, LN4], [LN4, LN4]])
    unit = 0.3 * LN2
    loss = classification_kd_loss(cross, teacher, targets([1, 1, 1], (2, 1)))
    assert loss[0].tolist() == pytest.approx([2 * unit, unit, 2 * unit])
    loss = classification_kd_loss(cross, teacher, targets([1, 0, 1], (2, 1), normalizer=4.0))
    assert loss[0].tolist() == pytest.approx([2 * unit / 4, 0, 2 * unit / 4])
    loss = classification_kd_loss(cross, teacher, targets([1, 0, 1], (2, 1), normalizer=4.0), weight=3.0)
    assert loss[0].tolist() == pytest.approx([6 * unit / 4, 0, 6 * unit / 4])


def test_class_loss_does_not_look_at_positives():
    cross, teacher = predictions([[0.0], [0.0]]), predictions([[LN4], [LN4]])
    loss = classification_kd_loss(cross, teacher, targets([1, 1], (2,), positive=[True, False]))
    assert loss[0].tolist() == pytest.approx([0.3 * LN2, 0.3 * LN2])


# kd_box -------------------------------------------------------------------------------------------------------------


def shifted(ious: list[float]) -> list[list[float]]:
    """Distances from (5, 5) to the sides of boxes in (0, 0, 10, 10) whose IoU with it, and GIoU, are the given."""
    return [[5.0, 5.0, 5.0, 10 * iou - 5] for iou in ious]


def box_detector(kind: str) -> SimpleNamespace:
    """A detector that predicts distances."""
    return SimpleNamespace(distillation=SimpleNamespace(box_loss=kind), distances=lambda boxes, priors: boxes)


@pytest.mark.parametrize(("kind", "losses"), [("giou", [0.5, 0.75]), ("log_iou", [LN2, 2 * LN2])])
def test_decoded_boxes_are_weighted_by_the_teachers_best_class(kind, losses):
    # Best class probabilities .8 .5 .8 .5; IoUs .5 .25 1 .25; the last prior is masked out.
    teacher = predictions([[LN4, 0.0], [-9.0, 0.0], [0.0, LN4], [0.0, 0.0]], shifted([1, 1, 1, 1]))
    cross = predictions([[50.0, 50.0]] * 4, shifted([0.5, 0.25, 1, 0.25]))
    loss = box_kd_loss(box_detector(kind), cross, teacher, targets([1, 1, 1, 0], (1, 3), normalizer=2.0))
    assert loss[0].tolist() == pytest.approx([0.8 * losses[0] / 2, 0.5 * losses[1] / 2, 0, 0])
    loss = box_kd_loss(box_detector(kind), cross, teacher, targets([1, 1, 1, 0], (1, 3), normalizer=2.0), 4.0)
    assert loss[0].tolist() == pytest.approx([1.6 * losses[0], losses[1], 0, 0])


def test_boxes_apart_have_a_bounded_logarithm():
    teacher = predictions([[0.0]], [[5.0, 5, 5, 5]])
    cross = predictions([[0.0]], [[-15.0, -15, 25, 25]])
    cross.boxes.requires_grad_()
    loss = box_kd_loss(box_detector("log_iou"), cross, teacher, targets([1], (1,)))
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.5 * math.log(1e6), rel=1e-5)
    assert cross.boxes.grad.isfinite().all()


def test_bins_are_compared_by_kl_over_the_sum_of_weights():
    # Bins .5 .5 against the teacher's .8 .2: KL(teacher || cross) = .8 ln 1.6 + .2 ln .4, on one of four sides.
    even, skewed = [0.0, 0.0], [LN4, 0.0]
    teacher = predictions([[0.0]] * 4, [skewed + 3 * even] + 3 * [4 * even])
    cross = predictions([[0.0]] * 4, [4 * even] * 4)
    kl = (0.8 * math.log(1.6) + 0.2 * math.log(0.4)) / 4
    # Weights .5: three of them sum to 1.5. The normaliser of 100 has no part in it.
    loss = box_kd_loss(box_detector("bin_kl"), cross, teacher, targets([1, 1, 1, 0], (2, 2), normalizer=100.0))
    assert loss[0].tolist() == pytest.approx([0.5 * kl / 1.5, 0, 0, 0], rel=1e-5)
    # One weight of .5 is clamped at 1.
    loss = box_kd_loss(box_detector("bin_kl"), cross, teacher, targets([1, 0, 0, 0], (2, 2), normalizer=100.0))
    assert loss[0].tolist() == pytest.approx([0.5 * kl, 0, 0, 0], rel=1e-5)


@pytest.mark.parametrize("name", ["retinanet", "atss"])
def test_deltas_are_decoded_on_the_teachers_anchors(name):
    # Half an anchor to the right: 5 of 15 in common, nothing empty in the enclosing box. ATSS's deltas have std .1.
    delta = 0.5 if name == "retinanet" else 5.0
    teacher, cross = predictions([[0.0]], [[0.0] * 4]), predictions([[0.0]], [[delta, 0, 0, 0]])
    loss = box_kd_loss(detector(name), cross, teacher, targets([1], (1,)))
    assert loss.item() == pytest.approx(0.5 * (1 - 1 / 3), rel=1e-5)


def test_fcos_distances_are_pixels_from_the_point():
    goal = targets([1], (1,))
    priors = Priors.of([torch.tensor([[4.0, 4.0]])], [8], torch.zeros(1, 2))
    goal = KDTargets(priors, goal.class_weights, goal.normalizer, None, None)
    teacher, cross = predictions([[0.0]], [[4.0, 4, 4, 4]]), predictions([[0.0]], [[4.0, 4, 4, 0]])
    assert box_kd_loss(detector("fcos"), cross, teacher, goal).item() == pytest.approx(0.5 * LN2, rel=1e-5)


def test_gfl_sides_have_seventeen_bins():
    teacher = predictions([[0.0]], torch.randn(1, 68, generator=torch.Generator().manual_seed(0)))
    cross = predictions([[0.0]], torch.zeros(1, 68))
    loss = box_kd_loss(detector("gfl"), cross, teacher, targets([1], (1,)))
    p = teacher.boxes.reshape(4, 17).softmax(dim=-1)
    # Against a uniform distribution: ln 17 minus the entropy.
    expected = 0.5 * (math.log(17) + (p * p.log()).sum(dim=-1)).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["giou", "log_iou", "bin_kl"])
def test_equal_boxes_cost_nothing(kind):
    same = predictions([[0.0], [LN4]], [[5.0, 5, 5, 5], [3, 2, 4, 3]])
    if kind == "bin_kl":
        same = predictions([[0.0], [LN4]], torch.randn(2, 68, generator=torch.Generator().manual_seed(0)))
    loss = box_kd_loss(box_detector(kind), same, same, targets([1, 1], (1, 1)))
    assert loss.abs().max() < 1e-6


def test_box_loss_matches_the_elementwise_one():
    boxes = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) * 10 + 1
    teacher, cross = predictions([[0.0]] * 6, boxes), predictions([[0.0]] * 6, boxes + 2)
    loss = box_kd_loss(box_detector("giou"), cross, teacher, targets([1] * 6, (6,)))
    torch.testing.assert_close(loss[0], 0.5 * (1 - distance_overlaps(boxes + 2, boxes)[1]))


# kd_centerness ------------------------------------------------------------------------------------------------------


def test_centerness_loss_is_at_positives_over_the_class_normaliser():
    # BCE of p = .5 against anything is ln 2; p = .8 against .5 is -.5 ln .8 - .5 ln .2. The third isn't positive.
    cross = predictions([[0.0]] * 4, centerness=[0.0, LN4, 3.0, 0.0])
    teacher = predictions([[0.0]] * 4, centerness=[2.0, 0.0, -3.0, -1.0])
    goal = targets([1, 1, 1, 1], (3, 1), positive=[True, True, False, True], normalizer=100.0)
    second = -0.5 * math.log(0.8) - 0.5 * math.log(0.2)
    expected = [LN2 / 5, second / 5, 0, LN2 / 5]
    assert centerness_kd_loss(cross, teacher, goal)[0].tolist() == pytest.approx(expected)
    assert centerness_kd_loss(cross, teacher, goal, 2.0).sum().item() == pytest.approx(2 * sum(expected))
