"""The cross pass: whose gradient goes where, masks and normalisers of every kind of pair."""

import itertools
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_batch, tiny_model
from torch.nn import functional as F

from crosskd_hf.distillation.alignment import align
from crosskd_hf.distillation.crosskd import cross_pass, crosskd_losses, kd_targets
from crosskd_hf.distillation.objective import teacher_forward
from crosskd_hf.distillation.settings import DistillationSection, resolve_settings
from crosskd_hf.models import CONFIGS, MODELS
from crosskd_hf.models.assigners import Assignment
from crosskd_hf.models.base import DenseDetectorOutput, DetectionLosses, Features
from crosskd_hf.models.head import DenseHead, HeadOutput

DETECTORS = ("gfl", "retinanet", "fcos", "atss")
SHAPES = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]  # of an input of 64 x 96 pixels


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Maps this small gain nothing from threads, and lose much where other processes hold the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def detector(name: str, **options):
    """A detector whose head alone has weights, frozen; the rest is on the meta device. One for all tests."""
    config = CONFIGS[name](
        **{"backbone": "resnet18", "fpn_channels": 16, "head_channels": 16, "num_labels": 2, **options}
    )
    with torch.device("meta"):
        model = MODELS[name](config)
    torch.manual_seed(0)
    model.head = DenseHead(model.head_spec(config))
    with torch.no_grad():
        for parameter in model.head.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * (2 / parameter[0].numel()) ** 0.5)
    return model.requires_grad_(False)


def maps(seed: int, channels: int = 16, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, *shape, generator=generator) for shape in SHAPES]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Cross pass ---------------------------------------------------------------------------------------------------------


def recording_teacher() -> SimpleNamespace:
    """Gives back what its head was called with."""
    return SimpleNamespace(head=lambda cls, reg, start_block, levels: (cls, reg, start_block))


def taps(cls: list[torch.Tensor], reg: list[torch.Tensor]) -> HeadOutput:
    return HeadOutput([], [], cls_taps=cls, reg_taps=reg)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_teachers_head_gets_aligned_taps_rectified_unless_they_are_pyramid_levels(k):
    student, own = taps(maps(0), maps(1)), taps(maps(2), maps(3))
    cls, reg, start_block = cross_pass(recording_teacher(), student, own, k)
    assert start_block == k
    for given, mine, theirs in ((cls, student.cls_taps, own.cls_taps), (reg, student.reg_taps, own.reg_taps)):
        for level, tap, reference in zip(given, mine, theirs, strict=True):
            (aligned,) = align([tap], [reference])
            assert torch.equal(level, F.relu(aligned) if k else aligned)
    assert (cls[0] < 0).any() == (k == 0)


def test_levels_are_aligned_one_by_one():
    student, own = taps(maps(0), maps(1)), taps(maps(2), maps(3))
    first = cross_pass(recording_teacher(), student, own, 0)[0]
    own.cls_taps[1] = own.cls_taps[1] + 100
    second = cross_pass(recording_teacher(), student, own, 0)[0]
    assert [torch.equal(x, y) for x, y in zip(first, second, strict=True)] == [True, False, True, True, True]


def test_half_precision_taps_are_aligned_in_single():
    half = [level.to(torch.bfloat16) for level in maps(0)]
    cls, _, _ = cross_pass(recording_teacher(), taps(half, half), taps(half, half), 3)
    full = [level.float() for level in half]
    expected, _, _ = cross_pass(recording_teacher(), taps(full, full), taps(full, full), 3)
    assert all(torch.equal(found, single.bfloat16()) for found, single in zip(cls, expected, strict=True))


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
def test_a_teachers_own_taps_cross_to_its_own_predictions(k, name):
    teacher = detector(name)
    own = teacher.head(maps(0), tap_index=k)
    # Shift and positive scale of a channel are aligned away.
    student = taps([2 * x + 3 for x in own.cls_taps], [x / 4 - 1 for x in own.reg_taps])
    cross = cross_pass(teacher, student, own, k)
    for kind in ("logits", "boxes", "centerness"):
        for x, y in zip(getattr(cross, kind) or [], getattr(own, kind) or [], strict=True):
            torch.testing.assert_close(x, y, atol=2e-3, rtol=2e-3)
    assert (cross.centerness is None) == (own.centerness is None)


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("k", [0, 2, 4])
def test_gradient_reaches_the_students_taps_and_not_the_teacher(k, name):
    teacher = detector(name)
    cls, reg = ([level.requires_grad_() for level in maps(seed)] for seed in (5, 6))
    cross = cross_pass(teacher, taps(cls, reg), teacher.head(maps(1), tap_index=k), k)
    sum(x.square().sum() for x in cross.logits + cross.boxes + (cross.centerness or [])).backward()
    for level in (*cls, *reg):
        assert level.grad.isfinite().all() and level.grad.any()
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("k", [0, 3])
def test_one_image_with_levels_of_one_cell_is_finite(k):
    teacher = detector("gfl")
    cls = [level.requires_grad_() for level in maps(5, batch=1)]
    cross = cross_pass(teacher, taps(cls, cls), teacher.head(maps(1, batch=1), tap_index=k), k)
    sum(x.sum() for x in cross.logits + cross.boxes).backward()
    assert all(x.isfinite().all() for x in cross.logits + cross.boxes)
    assert all(level.grad.isfinite().all() for level in cls)
    assert not cls[-1].grad.any() and cls[0].grad.any()


def test_levels_must_match_in_number():
    with pytest.raises(ValueError):
        cross_pass(recording_teacher(), taps(maps(0)[:4], maps(1)[:4]), taps(maps(2), maps(3)), 3)


@pytest.mark.parametrize(("student_name", "teacher_name"), [("gfl", "gfl"), ("gfl", "retinanet"), ("fcos", "fcos")])
def test_teachers_parameters_get_no_gradient_from_a_whole_step(student_name, teacher_name):
    student, teacher = tiny_model(student_name), tiny_model(teacher_name, seed=1).eval().requires_grad_(False)
    settings = resolve_settings(DistillationSection(), teacher)
    batch = tiny_batch()
    output = student(**batch, output_distillation=True, tap_index=settings.tap_index)
    terms = crosskd_losses(student, output, teacher, teacher_forward(teacher, batch, settings), settings)
    sum(term.sum() for term in terms.values()).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for name, parameter in student.head.named_parameters():
        # The student's own predictions, and the blocks after the tap, have no part in it.
        tapped = name.startswith(tuple(f"{t}_tower.{i}." for t in ("cls", "reg") for i in range(settings.tap_index)))
        assert (parameter.grad is not None and parameter.grad.any()) == tapped, name
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


def test_outputs_without_distillation_are_refused():
    teacher = detector("gfl")
    with pytest.raises(ValueError, match="output_distillation=True"):
        settings = resolve_settings(DistillationSection(), teacher)
        crosskd_losses(teacher, DenseDetectorOutput(), teacher, DenseDetectorOutput(), settings)


# Masks and normalisers ----------------------------------------------------------------------------------------------

IMAGE_SIZES = torch.tensor([[64.0, 96.0], [32.0, 50.0]])
CELLS = sum(height * width for height, width in SHAPES)


def student_output(name: str, class_normalizer: float = 7.0, box_normalizer: float = 3.0) -> DenseDetectorOutput:
    """What a student lends; its class weights and positives are 1 on every third and every fifth of its priors."""
    count = CELLS * (9 if name == "retinanet" else 1)
    number = torch.arange(2 * count).reshape(2, count)
    assignment = Assignment(number % 5 == 0, torch.zeros(2, count, dtype=torch.long), (number % 3 == 0).float())
    losses = DetectionLosses({}, assignment, torch.tensor(class_normalizer), torch.tensor(box_normalizer))
    return DenseDetectorOutput(detection=losses, image_sizes=IMAGE_SIZES)


@cache
def teacher_output(teacher, k: int = 3) -> DenseDetectorOutput:
    head = teacher.head(maps(9), tap_index=k)
    return DenseDetectorOutput(
        predictions=teacher.flatten(head),
        priors=teacher.priors(head),
        features=Features([], head.cls_taps, head.reg_taps),
    )


@pytest.mark.parametrize("name", DETECTORS)
def test_a_pair_of_one_kind_shares_mask_positives_and_normaliser(name):
    teacher, lent = detector(name), student_output(name)
    targets = kd_targets(detector(name), lent, teacher, teacher_output(teacher))
    assert torch.equal(targets.class_weights, lent.detection.assignment.class_weights)
    assert torch.equal(targets.positive, lent.detection.assignment.positive)
    assert targets.normalizer == (3 if name == "fcos" else 7)
    assert targets.class_normalizer == 7


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize(("normalizer", "expected"), [(1e-6, 1), (0.99, 1), (1.0, 1), (1.01, 1.01)])
def test_normalisers_are_at_least_one(normalizer, expected, name):
    teacher = detector(name)
    for student in (name, "gfl", "fcos"):
        lent = student_output(student, normalizer, normalizer)
        targets = kd_targets(detector(student), lent, teacher, teacher_output(teacher))
        assert targets.normalizer.item() == pytest.approx(expected)
        assert targets.class_normalizer.item() == pytest.approx(expected)


@pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(DETECTORS, 2)))
def test_a_mixed_pair_shares_only_the_class_normaliser(student, teacher):
    model = detector(teacher)
    targets = kd_targets(detector(student), student_output(student), model, teacher_output(model))
    assert targets.normalizer == targets.class_normalizer == 7
    assert targets.positive is None
    anchors = 9 if teacher == "retinanet" else 1
    assert targets.class_weights.shape == (2, CELLS * anchors)
    if teacher == "fcos":
        assert (targets.class_weights == 1).all()
    else:
        # The second image, 32 x 50 -> 32 x 64, has 4 x 8, 2 x 4, 1 x 2, 1 x 1 and 1 x 1 cells.
        assert targets.class_weights.sum(dim=1).tolist() == [CELLS * anchors, 44 * anchors]


def test_detectors_of_one_kind_on_other_anchors_are_a_mixed_pair():
    teacher = detector("gfl")
    same = kd_targets(detector("gfl"), student_output("gfl"), teacher, teacher_output(teacher))
    assert same.positive is not None
    for options in ({"anchor_scale": 4}, {"assigner_topk": 5}):
        targets = kd_targets(detector("gfl", **options), student_output("gfl"), teacher, teacher_output(teacher))
        assert targets.positive is None and targets.class_weights.sum() == CELLS + 44


@pytest.mark.parametrize("name", DETECTORS)
def test_priors_and_levels_are_the_teachers(name):
    teacher = detector(name)
    targets = kd_targets(detector("gfl"), student_output("gfl"), teacher, teacher_output(teacher))
    anchors = 9 if name == "retinanet" else 1
    assert targets.priors.level_sizes == [height * width * anchors for height, width in SHAPES]
    assert targets.priors.all.shape[1] == (2 if name == "fcos" else 4)


@pytest.mark.parametrize("name", DETECTORS)
def test_same_taps_mask_and_normaliser_give_the_same_loss_whatever_the_student(name):
    teacher = detector(name)
    settings = resolve_settings(DistillationSection(), teacher)
    own = teacher_output(teacher, settings.tap_index)
    valid = teacher.class_weights(teacher.valid_priors(own.priors, IMAGE_SIZES))
    results = []
    for student in DETECTORS:
        lent = student_output(student, 7.0, 7.0)
        lent.features = Features([], maps(5), maps(6))
        if student == name:
            assignment = Assignment(valid > 0, torch.zeros_like(valid, dtype=torch.long), valid)
            lent.detection = DetectionLosses({}, assignment, torch.tensor(7.0), torch.tensor(7.0))
        results.append(crosskd_losses(detector(student), lent, teacher, own, settings))
        assert ("kd_centerness" in results[-1]) == (student == name == "atss")
    for result in results:
        for term in ("kd_cls", "kd_box"):
            assert result[term].shape == valid.shape and result[term].sum() > 0
            assert torch.equal(result[term], results[0][term])


def test_settings_multiply_the_terms():
    teacher = detector("atss")
    own, lent = teacher_output(teacher), student_output("atss")
    lent.features = Features([], maps(5), maps(6))

    def losses(**section):
        settings = resolve_settings(DistillationSection(**section), teacher)
        return crosskd_losses(detector("atss"), lent, teacher, own, settings)

    plain = losses(cls_weight=1.0, box_weight=1.0, centerness_weight=1.0)
    weighted = losses(crosskd=0.5, cls_weight=2.0, box_weight=6.0, centerness_weight=10.0)
    for term, factor in (("kd_cls", 1), ("kd_box", 3), ("kd_centerness", 5)):
        torch.testing.assert_close(weighted[term], factor * plain[term])


def test_towers_that_start_from_one_map_are_aligned_to_their_own_references():
    """The student is tapped at FPN levels, which both towers share; the teacher's taps differ."""
    levels = maps(0)
    student, own = taps(levels, levels), taps(maps(2), [m + 50 for m in maps(3)])
    cls, reg, _ = cross_pass(recording_teacher(), student, own, 2)
    for given, theirs in ((cls, own.cls_taps), (reg, own.reg_taps)):
        for level, tap, reference in zip(given, levels, theirs, strict=True):
            (aligned,) = align([tap], [reference], rectify=True)
            assert torch.equal(level, aligned)
