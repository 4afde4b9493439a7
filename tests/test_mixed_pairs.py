"""Distillation in the teacher's terms: pairs of different detectors."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_args, tiny_batch, tiny_model, tiny_processor, tiny_split

from crosskd_hf import DistillationSection
from crosskd_hf.distillation.crosskd import cross_pass, crosskd_losses
from crosskd_hf.distillation.losses import KDTargets, prediction_kd_losses
from crosskd_hf.distillation.objective import distillation_losses, teacher_forward
from crosskd_hf.distillation.pairing import pair_up
from crosskd_hf.distillation.settings import resolve_settings
from crosskd_hf.training.distillation_trainer import DistillationTrainer

DETECTORS = ["gfl", "retinanet", "fcos", "atss"]


@pytest.mark.parametrize("teacher_name", DETECTORS)
def test_the_value_does_not_depend_on_the_students_class(teacher_name: str) -> None:
    """Same taps, teacher, mask and normaliser: same terms."""
    teacher = tiny_model(teacher_name, seed=5).eval()
    settings = resolve_settings(DistillationSection(), teacher)
    inputs = tiny_batch()
    own = teacher_forward(teacher, inputs, settings)
    generator = torch.Generator().manual_seed(1)
    taps = [torch.randn(tap.shape, generator=generator).relu() for tap in own.cls_taps]
    priors = own.priors
    valid = teacher.class_weights(teacher.valid_priors(priors, torch.tensor([[64.0, 96.0]] * 2)))
    one = torch.tensor(3.0)
    targets = KDTargets(priors=priors, class_weights=valid, normalizer=one, positive=None, class_normalizer=one)
    values = []
    for name in DETECTORS:
        head = tiny_model(name).head(own.fpn_features, tap_index=settings.tap_index)
        head.cls_taps = head.reg_taps = taps
        cross = teacher.flatten(cross_pass(teacher, head, own, settings.tap_index))
        terms = prediction_kd_losses(teacher, cross, own.predictions, targets, settings)
        values.append({key: term.tolist() for key, term in terms.items()})
    assert all(value == values[0] for value in values)
    assert torch.tensor(values[0]["cls"]).sum() > 0


@pytest.mark.parametrize("student_name", DETECTORS)
@pytest.mark.parametrize("teacher_name", DETECTORS)
def test_normalisers_and_mask_of_every_pair(student_name: str, teacher_name: str) -> None:
    """Against the losses on the same cross-head predictions with the contract's mask and normaliser put in by hand."""
    student, teacher = tiny_model(student_name, seed=1), tiny_model(teacher_name, seed=2).eval()
    settings = resolve_settings(DistillationSection(), teacher)
    inputs = tiny_batch()
    output = student(**inputs, output_distillation=True, tap_index=settings.tap_index)
    own = teacher_forward(teacher, inputs, settings)
    terms = crosskd_losses(student, output, teacher, own, settings)

    detection, same = output.detection, student_name == teacher_name
    weights = torch.ones(own.logits.shape[:2])  # nothing is padded, so that every prior of the teacher is valid
    if same:
        weights = detection.assignment.class_weights
    normalizer = detection.box_normalizer if same and student_name == "fcos" else detection.class_normalizer
    cross = teacher.flatten(cross_pass(teacher, output, own, settings.tap_index))
    targets = KDTargets(
        priors=own.priors,
        class_weights=weights,
        normalizer=normalizer.clamp(min=1),
        positive=detection.assignment.positive if same else None,
        class_normalizer=detection.class_normalizer,
    )
    expected = prediction_kd_losses(teacher, cross, own.predictions, targets, settings)
    assert set(terms) == {f"kd_{name}" for name in expected}
    assert ("kd_centerness" in terms) == (same and student_name == "atss")
    for name, term in expected.items():
        assert torch.equal(terms[f"kd_{name}"], term), name
    assert all(term.isfinite().all() for term in terms.values())


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (("retinanet", "resnet34"), ("gfl", "resnet18")),
        (("gfl", "swin_tiny_patch4_window7_224"), ("gfl", "resnet18")),
        (("retinanet", "swin_tiny_patch4_window7_224"), ("retinanet", "resnet18")),
    ],
)
def test_mixed_pairs_train(tmp_path: Path, teacher: tuple, student: tuple) -> None:
    big = tiny_model(teacher[0], seed=2, backbone=teacher[1], frozen_stages=0)
    small = tiny_model(student[0], seed=1, backbone=student[1])
    split = tiny_split(tmp_path / "data")
    trainer = DistillationTrainer(
        small, big, tiny_args(tmp_path / "run", max_steps=2), split, split, tiny_processor(small)
    )
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if "kd_cls" in entry]
    assert len(losses) == 2 and all(entry["kd_cls"] > 0 for entry in losses)


@pytest.mark.parametrize("name", DETECTORS)
def test_mimicking_compares_the_students_own_predictions(name: str) -> None:
    student, teacher = tiny_model(name, seed=1), tiny_model(name, seed=2).eval()
    section = DistillationSection(crosskd=0.0, mimic=2.0)
    settings = resolve_settings(section, teacher)
    pair_up(student, teacher, settings)
    inputs = tiny_batch()
    output = student(**inputs, output_distillation=True, tap_index=settings.tap_index)
    own = teacher_forward(teacher, inputs, settings)
    terms = distillation_losses(student, output, teacher, own, settings)
    assert set(terms) == {"mimic_cls", "mimic_box"} | ({"mimic_centerness"} if name == "atss" else set())
    # kd_cls by hand: |p - t| * BCE over the student's own logits, masked, over the normaliser
    p, t = output.logits.sigmoid(), own.logits.sigmoid()
    bce = torch.nn.functional.binary_cross_entropy(p, t, reduction="none")
    detection = output.detection
    weights = detection.assignment.class_weights
    normalizer = (detection.box_normalizer if name == "fcos" else detection.class_normalizer).clamp(min=1)
    expected = 2.0 * settings.cls_weight * (((p - t).abs() * bce).sum(-1) * weights).sum() / normalizer
    assert terms["mimic_cls"].sum().item() == pytest.approx(expected.item(), rel=1e-4)
    sum(term.sum() for term in terms.values()).backward()
    assert student.head.cls_predictor.weight.grad.abs().sum() > 0, "unlike CrossKD, it reaches the predictor"


def test_mimicking_needs_detectors_of_one_kind() -> None:
    teacher = tiny_model("retinanet")
    settings = resolve_settings(DistillationSection(mimic=1.0), teacher)
    with pytest.raises(ValueError, match="mimic"):
        pair_up(tiny_model("gfl"), teacher, settings)
