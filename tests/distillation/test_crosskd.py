"""CrossKD: whose gradient goes where, published settings, masks and normalisers of every kind of pair."""

import pytest
import torch
from tiny import tiny_batch, tiny_model
from torch.nn import functional as F

from crosskd_hf.distillation import CrossKD, DistillationPair, Observation, Targets
from crosskd_hf.distillation.alignment import align
from crosskd_hf.distillation.observers.dense import DenseObserver, DenseTaps
from crosskd_hf.distillation.prediction_losses import KDTargets
from crosskd_hf.models import DenseDetector

pytestmark = pytest.mark.usefixtures("one_thread")

DETECTORS = ("gfl", "retinanet", "fcos", "atss")
SHAPES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]  # of an input of 64 x 96 pixels


def maps(seed: int, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 32, *shape, generator=generator) for shape in SHAPES]


def detector(name: str, **options) -> DenseDetector:
    return tiny_model(name, **options).eval().requires_grad_(False)


def pair_of(student, teacher, **settings) -> tuple[DistillationPair, CrossKD]:
    crosskd = CrossKD(CrossKD.Settings(**settings))
    return DistillationPair(student, teacher, [crosskd]), crosskd


# Cross pass ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rectified", [False, True])
def test_taps_are_aligned_level_by_level_and_rectified_unless_they_are_fpn_levels(rectified):
    student, teacher = DenseTaps(maps(0), maps(1), rectified), DenseTaps(maps(2), maps(3), rectified)
    taps = student.aligned_to(teacher)
    for given, raw, reference in ((taps.cls, student.cls, teacher.cls), (taps.reg, student.reg, teacher.reg)):
        for level, tap, like in zip(given, raw, reference, strict=True):
            (aligned,) = align([tap], [like])
            assert torch.equal(level, F.relu(aligned) if rectified else aligned)
    assert (taps.cls[0] < 0).any() != rectified and taps.rectified == rectified


def test_towers_that_start_from_one_map_are_aligned_to_their_own_references():
    """The student is tapped at FPN levels, which both towers share; the teacher's taps may differ."""
    levels, teacher = maps(0), DenseTaps(maps(2), [m + 50 for m in maps(3)], True)
    taps = DenseTaps(levels, levels, False).aligned_to(teacher)
    for given, references in ((taps.cls, teacher.cls), (taps.reg, teacher.reg)):
        assert all(map(torch.equal, given, align(levels, references, rectify=True)))


@pytest.mark.parametrize(("batch", "k"), [(1, 0), (1, 3), (2, 4)])
def test_gradient_reaches_the_students_taps_and_not_the_teacher(k, batch):
    """With one image, a level of one cell has a single value, of which alignment leaves nothing."""
    observer = DenseObserver(detector("gfl", seed=1))
    observer.ask_for_taps(k)
    observer.ask_for_predictions()
    teacher = observer(tiny_batch(batch)["pixel_values"])
    cls, reg = ([level.requires_grad_() for level in maps(seed, batch=batch)] for seed in (5, 6))
    cross = observer.finish(DenseTaps(cls, reg, k > 0).aligned_to(teacher.taps), teacher)
    (cross.logits.square().sum() + cross.boxes_xyxy.square().sum()).backward()
    for level in (*cls, *reg):
        single_value = batch == 1 and level.shape[-2:] == (1, 1)
        assert level.grad.isfinite().all() and (level.grad.abs().max() < 1e-12) == single_value
    assert all(parameter.grad is None for parameter in observer.model.parameters())


# Settings -----------------------------------------------------------------------------------------------------------

PUBLISHED = {  # tap index, weights of kd_cls, kd_box and kd_centerness
    "gfl": (3, 1.0, 4.0, 0.0),
    "retinanet": (3, 1.0, 1.0, 0.0),
    "fcos": (2, 0.4, 0.75, 0.0),
    "atss": (3, 1.0, 1.0, 1.0),
}


def resolved(crosskd: CrossKD) -> tuple:
    weights = crosskd.weights
    return weights.tap_index, weights.cls_weight, weights.box_weight, weights.centerness_weight


@pytest.mark.parametrize("name", DETECTORS)
def test_open_settings_are_the_teachers_published_ones(name):
    pair, crosskd = pair_of(detector("atss"), detector(name))
    assert resolved(crosskd) == PUBLISHED[name]
    weights = crosskd.weights
    assert (weights.log_iou, weights.box_normalizer) == ((True, True) if name == "fcos" else (False, False))
    assert crosskd.settings.weight == 1.0 and not pair.teacher_observer.raw_taps
    assert (crosskd.resolved.tap_index, crosskd.resolved.box_weight) == PUBLISHED[name][:3:2]


def test_given_settings_win_also_where_they_are_zero():
    settings = {"tap_index": 0, "tap": "raw", "cls_weight": 0.0, "box_weight": 0.0, "centerness_weight": 0.0}
    pair, crosskd = pair_of(detector("atss"), detector("fcos"), weight=0.5, **settings)
    assert resolved(crosskd) == (0, 0.0, 0.0, 0.0)
    assert crosskd.settings.weight == 0.5 and pair.student_observer.raw_taps and pair.teacher_observer.raw_taps


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (3, 3)),
        ({"tap_index": 2}, (2, 2)),
        ({"tap_index": 3, "student_tap_index": 1}, (3, 1)),
        ({"student_tap_index": 0}, (3, 0)),
    ],
)
def test_the_student_is_tapped_like_the_teacher_unless_told_otherwise(settings, expected):
    pair, _ = pair_of(detector("gfl"), detector("gfl"), **settings)
    assert (pair.teacher_observer.tap_index, pair.student_observer.tap_index) == expected


def test_the_weight_multiplies_those_of_all_terms():
    _, crosskd = pair_of(detector("atss"), detector("fcos"), weight=0.5, box_weight=6.0, centerness_weight=10.0)
    assert resolved(crosskd) == (2, 0.2, 3.0, 5.0)


def test_a_weight_of_centerness_does_nothing_where_the_teacher_has_none():
    pair, _ = pair_of(tiny_model(), tiny_model(seed=1), centerness_weight=1.0)
    assert "kd_centerness" not in pair(**tiny_batch()).loss_dict


# Masks and normalisers ----------------------------------------------------------------------------------------------

CELLS = sum(height * width for height, width in SHAPES)


def lent(name: str, class_normalizer: float = 7.0, box_normalizer: float = 3.0) -> Observation:
    """What a student shows; its mask and positives are 1 on every third and every fifth of its priors."""
    number = torch.arange(2 * CELLS * (9 if name == "retinanet" else 1)).reshape(2, -1)
    no_boxes = torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)
    normalizers = torch.tensor(class_normalizer), torch.tensor(box_normalizer)
    sizes = torch.tensor([[64.0, 96]] * 2)
    targets = Targets(*no_boxes, sizes, (number % 3 == 0).float(), number % 5 == 0, *normalizers)
    return Observation(taps=DenseTaps(maps(5), maps(6), True), targets=targets)


def teacher_shown(pair: DistillationPair) -> Observation:
    """Of two images, of which the second is padded: it is 32 x 50 pixels."""
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[0], mask[1, :32, :50] = True, True
    return pair.teacher_observer(torch.zeros(2, 3, 64, 96), mask)


def targets_of(student, teacher, shown: Observation) -> KDTargets:
    pair, crosskd = pair_of(student, teacher)
    return KDTargets.of(shown, teacher_shown(pair), crosskd.same_rule, crosskd.weights.box_normalizer)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_pair_of_one_kind_shares_mask_positives_and_normaliser(name):
    shown = lent(name)
    targets = targets_of(detector(name), detector(name), shown)
    assert torch.equal(targets.mask, shown.targets.mask)
    assert torch.equal(targets.positive, shown.targets.positive)
    assert targets.normalizer == (3 if name == "fcos" else 7)
    assert targets.class_normalizer == 7


@pytest.mark.parametrize(("normalizer", "expected"), [(1e-6, 1), (0.99, 1), (1.0, 1), (1.01, 1.01)])
def test_normalisers_are_at_least_one(normalizer, expected):
    for student, teacher in (("gfl", "gfl"), ("fcos", "fcos"), ("gfl", "fcos")):
        targets = targets_of(detector(student), detector(teacher), lent(student, normalizer, normalizer))
        assert targets.normalizer.item() == pytest.approx(expected)
        assert targets.class_normalizer.item() == pytest.approx(expected)


@pytest.mark.parametrize(("student", "teacher"), [("gfl", "retinanet"), ("retinanet", "fcos"), ("fcos", "atss")])
def test_a_mixed_pair_shares_only_the_class_normaliser(student, teacher):
    targets = targets_of(detector(student), detector(teacher), lent(student))
    assert targets.normalizer == targets.class_normalizer == 7
    assert targets.positive is None
    anchors = 9 if teacher == "retinanet" else 1
    assert targets.mask.shape == (2, CELLS * anchors)
    if teacher == "fcos":
        assert (targets.mask == 1).all()
    else:
        # The second image, 32 x 50 -> 32 x 64, has 4 x 8, 2 x 4, 1 x 2, 1 x 1 and 1 x 1 cells.
        assert targets.mask.sum(dim=1).tolist() == [CELLS * anchors, 44 * anchors]


def test_detectors_of_one_kind_on_other_anchors_are_a_mixed_pair():
    for options in ({"anchor_scale": 4}, {"assigner_topk": 5}):
        targets = targets_of(detector("gfl", **options), detector("gfl"), lent("gfl"))
        assert targets.positive is None and targets.mask.sum() == CELLS + 44
