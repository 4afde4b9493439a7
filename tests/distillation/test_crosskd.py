"""CrossKD: whose gradient goes where, published settings, masks and normalisers of every kind of pair."""

import copy
import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch
from tiny import tiny_batch, tiny_model
from torch import nn
from torch.nn import functional as F

from crosskd_hf.distillation import CrossKD, DistillationPair, Observation, Targets
from crosskd_hf.distillation.alignment import align
from crosskd_hf.distillation.observers.dense import DenseObserver, DenseTaps
from crosskd_hf.distillation.prediction_losses import KDTargets, prediction_kd_losses
from crosskd_hf.models import CONFIGS, MODELS
from crosskd_hf.models.head import DenseHead

pytestmark = pytest.mark.usefixtures("one_thread")

DETECTORS = ("gfl", "retinanet", "fcos", "atss")
SHAPES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]  # of an input of 64 x 96 pixels


def maps(seed: int, channels: int = 16, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, *shape, generator=generator) for shape in SHAPES]


class Maps(nn.Module):
    """Stands for an FPN: the same maps, whatever the images."""

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        return maps(9, batch=len(pixels))


@cache
def detector(name: str, **options):
    """A detector whose head alone has weights, frozen. One for all tests."""
    config = CONFIGS[name](
        **{"backbone": "resnet18", "fpn_channels": 16, "head_channels": 16, "num_labels": 2, **options}
    )
    with torch.device("meta"):
        model = MODELS[name](config)
    torch.manual_seed(0)
    model.backbone, model.fpn = nn.Identity(), Maps()
    model.head = DenseHead(model.head_spec(config))
    with torch.no_grad():
        for parameter in model.head.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * (2 / parameter[0].numel()) ** 0.5)
    return model.requires_grad_(False)


def pair_of(student, teacher, **settings) -> tuple[DistillationPair, CrossKD]:
    crosskd = CrossKD(CrossKD.Settings(**settings))
    return DistillationPair(student, copy.copy(teacher), [crosskd]), crosskd


def observed(name: str, k: int, batch: int = 2) -> tuple[DenseObserver, Observation]:
    """A teacher's observer, and what it shows of images without padding."""
    observer = DenseObserver(detector(name))
    observer.ask_for_taps(k)
    observer.ask_for_predictions()
    return observer, observer(torch.zeros(batch, 3, 64, 96))


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
    levels = maps(0)
    student, teacher = DenseTaps(levels, levels, False), DenseTaps(maps(2), [m + 50 for m in maps(3)], True)
    taps = student.aligned_to(teacher)
    for given, references in ((taps.cls, teacher.cls), (taps.reg, teacher.reg)):
        for level, tap, reference in zip(given, levels, references, strict=True):
            (aligned,) = align([tap], [reference], rectify=True)
            assert torch.equal(level, aligned)
    others = maps(2)
    shared = student.aligned_to(DenseTaps(others, others, False))
    assert all(a is b for a, b in zip(shared.cls, shared.reg, strict=True)), "aligned once"


def test_half_precision_taps_are_aligned_in_single():
    half = [level.to(torch.bfloat16) for level in maps(0)]
    full = [level.float() for level in half]
    taps, expected = (DenseTaps(m, list(m), True).aligned_to(DenseTaps(m, list(m), True)) for m in (half, full))
    assert all(torch.equal(found, single.bfloat16()) for found, single in zip(taps.cls, expected.cls, strict=True))


def test_levels_must_match_in_number():
    with pytest.raises(ValueError):
        DenseTaps(maps(0)[:4], maps(1)[:4], True).aligned_to(DenseTaps(maps(2), maps(3), True))


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
def test_a_teachers_own_taps_cross_to_its_own_predictions(k, name):
    observer, teacher = observed(name, k)
    taps = teacher.taps
    # Shift and positive scale of a channel are aligned away.
    taps = replace(taps, cls=[2 * x + 3 for x in taps.cls], reg=[x / 4 - 1 for x in taps.reg])
    cross = observer.finish(taps.aligned_to(teacher.taps), teacher)
    for kind in ("logits", "bins", "quality"):
        x, y = getattr(cross, kind), getattr(teacher.predictions, kind)
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(cross.boxes_xyxy, teacher.predictions.boxes_xyxy, atol=0.2, rtol=2e-3)
    assert cross.mask is teacher.predictions.mask


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("k", [0, 2, 4])
def test_gradient_reaches_the_students_taps_and_not_the_teacher(k, name):
    observer, teacher = observed(name, k)
    cls, reg = ([level.requires_grad_() for level in maps(seed)] for seed in (5, 6))
    cross = observer.finish(DenseTaps(cls, reg, k > 0).aligned_to(teacher.taps), teacher)
    outputs = [cross.logits, cross.boxes_xyxy, *([] if cross.quality is None else [cross.quality])]
    sum(x.square().sum() for x in outputs).backward()
    for level in (*cls, *reg):
        assert level.grad.isfinite().all() and level.grad.any()
    assert all(parameter.grad is None for parameter in observer.model.parameters())


@pytest.mark.parametrize("k", [0, 3])
def test_one_image_with_levels_of_one_cell_is_finite(k):
    observer, teacher = observed("gfl", k, batch=1)
    cls = [level.requires_grad_() for level in maps(5, batch=1)]
    cross = observer.finish(DenseTaps(cls, cls, k > 0).aligned_to(teacher.taps), teacher)
    (cross.logits.sum() + cross.boxes_xyxy.sum()).backward()
    assert cross.logits.isfinite().all() and cross.boxes_xyxy.isfinite().all()
    assert all(level.grad.isfinite().all() for level in cls)
    assert not cls[-1].grad.any() and cls[0].grad.any()


@pytest.mark.parametrize(("student_name", "teacher_name"), [("gfl", "gfl"), ("gfl", "retinanet"), ("fcos", "fcos")])
def test_teachers_parameters_get_no_gradient_from_a_whole_step(student_name, teacher_name):
    student, teacher = tiny_model(student_name), tiny_model(teacher_name, seed=1)
    pair, crosskd = pair_of(student, teacher)
    terms = pair(**tiny_batch()).loss_dict
    sum(term for name, term in terms.items() if name.startswith("kd_")).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for name, parameter in student.head.named_parameters():
        # The student's own predictions, and the blocks after the tap, have no part in it.
        blocks = range(crosskd.weights.tap_index)
        tapped = name.startswith(tuple(f"{tower}_tower.{i}." for tower in ("cls", "reg") for i in blocks))
        assert (parameter.grad is not None and parameter.grad.any()) == tapped, name
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


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


def test_settings_multiply_the_terms():
    def losses(**settings):
        pair, crosskd = pair_of(detector("atss"), detector("atss"), **settings)
        return crosskd.terms(lent("atss"), teacher_shown(pair), pair.student_observer, pair.teacher_observer)

    plain = losses(cls_weight=1.0, box_weight=1.0, centerness_weight=1.0)
    weighted = losses(weight=0.5, cls_weight=2.0, box_weight=6.0, centerness_weight=10.0)
    for term, factor in (("kd_cls", 1), ("kd_box", 3), ("kd_centerness", 5)):
        torch.testing.assert_close(weighted[term], factor * plain[term])


@pytest.mark.parametrize("teacher", ["gfl", "retinanet"])
def test_a_weight_of_centerness_does_nothing_where_the_teacher_has_none(teacher):
    pair, _ = pair_of(tiny_model(teacher), tiny_model(teacher, seed=1), centerness_weight=1.0)
    assert "kd_centerness" not in pair(**tiny_batch()).loss_dict


# Masks and normalisers ----------------------------------------------------------------------------------------------

CELLS = sum(height * width for height, width in SHAPES)


def lent(name: str, class_normalizer: float = 7.0, box_normalizer: float = 3.0) -> Observation:
    """What a student shows; its mask and positives are 1 on every third and every fifth of its priors."""
    count = CELLS * (9 if name == "retinanet" else 1)
    number = torch.arange(2 * count).reshape(2, count)
    truth = (
        torch.zeros(2, 0, 4),
        torch.zeros(2, 0),
        torch.zeros(2, 0, dtype=torch.bool),
        torch.tensor([[64.0, 96]] * 2),
    )
    normalizers = torch.tensor(class_normalizer), torch.tensor(box_normalizer)
    targets = Targets(*truth, (number % 3 == 0).float(), number % 5 == 0, *normalizers)
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


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize(("normalizer", "expected"), [(1e-6, 1), (0.99, 1), (1.0, 1), (1.01, 1.01)])
def test_normalisers_are_at_least_one(normalizer, expected, name):
    for student in (name, "gfl", "fcos"):
        targets = targets_of(detector(student), detector(name), lent(student, normalizer, normalizer))
        assert targets.normalizer.item() == pytest.approx(expected)
        assert targets.class_normalizer.item() == pytest.approx(expected)


@pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(DETECTORS, 2)))
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
    assert targets_of(detector("gfl"), detector("gfl"), lent("gfl")).positive is not None
    for options in ({"anchor_scale": 4}, {"assigner_topk": 5}):
        targets = targets_of(detector("gfl", **options), detector("gfl"), lent("gfl"))
        assert targets.positive is None and targets.mask.sum() == CELLS + 44


@pytest.mark.parametrize("name", DETECTORS)
def test_same_taps_mask_and_normaliser_give_the_same_loss_whatever_the_student(name):
    results = []
    for student in DETECTORS:
        pair, crosskd = pair_of(detector(student), detector(name))
        teacher, shown = teacher_shown(pair), lent(student, 7.0, 7.0)
        if student == name:
            mask = teacher.predictions.mask
            shown = replace(shown, targets=replace(shown.targets, mask=mask, positive=mask > 0))
        results.append(crosskd.terms(shown, teacher, pair.student_observer, pair.teacher_observer))
        assert ("kd_centerness" in results[-1]) == (student == name == "atss")
    for result in results:
        for term in ("kd_cls", "kd_box"):
            assert result[term].dim() == 2 and result[term].sum() > 0
            assert torch.equal(result[term], results[0][term])


@pytest.mark.parametrize("student_name", DETECTORS)
@pytest.mark.parametrize("teacher_name", DETECTORS)
def test_normalisers_and_mask_of_every_pair(student_name, teacher_name):
    """Against the losses on the same cross-head predictions with the contract's mask and normaliser put in by hand."""
    student = tiny_model(student_name, seed=1)
    pair, crosskd = pair_of(student, tiny_model(teacher_name, seed=2))
    batch, observers = tiny_batch(), (pair.student_observer, pair.teacher_observer)
    shown, teacher = pair.student_observer(**batch), pair.teacher_observer(batch["pixel_values"])
    terms = crosskd.terms(shown, teacher, *observers)

    losses, same = shown.context.losses, student_name == teacher_name
    mask = torch.ones(teacher.predictions.logits.shape[:2])  # nothing is padded: every prior of the teacher is valid
    normalizer = losses.box_normalizer if same and student_name == "fcos" else losses.class_normalizer
    targets = KDTargets(
        mask=losses.assignment.class_weights if same else mask,
        normalizer=normalizer.clamp(min=1),
        positive=losses.assignment.positive if same else None,
        class_normalizer=losses.class_normalizer,
    )
    cross = pair.teacher_observer.finish(shown.taps.aligned_to(teacher.taps), teacher)
    expected = prediction_kd_losses(cross, teacher.predictions, targets, crosskd.weights)
    assert set(terms) == {f"kd_{name}" for name in expected}
    assert ("kd_centerness" in terms) == (same and student_name == "atss")
    for name, term in expected.items():
        assert torch.equal(terms[f"kd_{name}"], term), name
    assert all(term.isfinite().all() for term in terms.values())
