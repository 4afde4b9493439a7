"""A student, its teacher and the methods as one module: what moves, what is trained, what is saved."""

import copy
from pathlib import Path

import pytest
import torch
from tiny import tiny_batch, tiny_model

from crosskd_hf.distillation import PKD, CrossKD, DistillationPair, KDMethod, Mimic, PairError, SoftBoxes
from crosskd_hf.distillation.pair import METHODS_FILE
from crosskd_hf.distillation.prediction_losses import KDTargets
from crosskd_hf.models.backbone import batchnorms
from crosskd_hf.models.outputs import GroundTruth

DETECTORS = ("gfl", "retinanet", "fcos", "atss")
NARROW = {"head_channels": 16, "fpn_channels": 16}


def pair_of(methods: list[KDMethod] | None = None, seed: int = 0, **student) -> DistillationPair:
    methods = [CrossKD(), PKD()] if methods is None else methods
    return DistillationPair(tiny_model(seed=1, **student), tiny_model(seed=5), methods, seed=seed)


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.items()}


# The module ---------------------------------------------------------------------------------------------------------


def test_the_teacher_is_no_submodule_and_stays_as_it_is():
    pair = pair_of(**NARROW)
    names = set(pair.state_dict())
    student, methods = (part.state_dict() for part in (pair.student, pair.methods))
    assert names == {f"student.{name}" for name in student} | {f"methods.{name}" for name in methods}
    assert set(methods) == {
        f"{m}.adapters.{p}.weight" for m, p in (("crosskd", "cls"), ("crosskd", "reg"), ("pkd", "fpn"))
    }
    teacher = pair.teacher
    assert not any(module is teacher for module in pair.modules()) and not teacher.training
    before = copied(teacher.state_dict())
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.01)
    pair.train()(**tiny_batch()).loss.backward()
    optimizer.step()
    assert not teacher.training and all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_teacher_moves_along():
    pair = pair_of(id2label={0: "dog", 1: "cat"}).to("meta")
    assert all(value.is_meta for value in pair.teacher.state_dict().values())
    assert pair.teacher_observer.classes.is_meta and pair.student_observer.classes.is_meta
    pair = pair_of().double()
    assert pair.teacher.dtype == pair.student.dtype == torch.float64


def test_the_output_is_the_sum_of_all_terms():
    """And no maps: accelerate would make fp32 copies of those, in mixed precision."""
    pair, batch = pair_of(), tiny_batch()
    output = pair(**batch)
    assert set(output) == {"loss", "loss_dict"} and output.loss.dim() == 0
    torch.testing.assert_close(output.loss, sum(output.loss_dict.values()))
    own = pair.student(**batch).loss_dict
    assert set(output.loss_dict) == {*own, "kd_cls", "kd_box", "kd_feature"}
    assert all(output.loss_dict[name] == value for name, value in own.items())
    assert pair.config is pair.student.config


def test_a_prepared_teacher_is_a_copy():
    pair = pair_of()
    given, before = pair.teacher, pair(**tiny_batch()).loss
    pair.prepare_teacher()
    assert pair.teacher is not given and pair.teacher_observer.model is pair.teacher
    assert list(batchnorms(given.backbone)) and not list(batchnorms(pair.teacher.backbone)), "they are folded"
    torch.testing.assert_close(pair(**tiny_batch()).loss, before)


# Methods ------------------------------------------------------------------------------------------------------------


def test_methods_compose():
    batch, terms = tiny_batch(), {}
    for method in (CrossKD, PKD, Mimic):
        terms |= pair_of([method()])(**batch).loss_dict
    torch.testing.assert_close(pair_of([CrossKD(), PKD(), Mimic()])(**batch).loss_dict, terms)


def test_all_problems_are_named_at_once():
    student = tiny_model(size_divisor=16, head_blocks=2, id2label={0: "a", 1: "b"})
    with pytest.raises(PairError, match="this student can't learn from this teacher:\n  - ") as error:
        DistillationPair(student, tiny_model("retinanet"), [CrossKD(), Mimic(), Mimic()])
    problems = str(error.value).split("\n  - ")[1:]
    starts = ["label names", "size_divisor: student 16", "methods: crosskd, mimic, mimic", "crosskd.student_tap_index"]
    assert all(map(str.startswith, problems, [*starts, "predictions (mimic)"])) and len(problems) == 5


def test_adapters_follow_the_seed_and_leave_the_random_state_alone():
    first, again, other = (copied(pair_of(seed=seed, **NARROW).methods.state_dict()) for seed in (1, 1, 2))
    pair = DistillationPair(tiny_model(**NARROW), tiny_model(), [CrossKD()])
    state = torch.get_rng_state()
    DistillationPair(pair.student, pair.teacher, [CrossKD()], seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)


# Checkpoints --------------------------------------------------------------------------------------------------------


def test_methods_that_train_nothing_write_nothing(tmp_path: Path):
    pair_of().save_methods(tmp_path)
    assert not list(tmp_path.iterdir())
    pair_of().load_methods(tmp_path)


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        ({}, NARROW, "holds nothing, this pair needs {'crosskd.adapters.cls.weight': (32, 16, 1, 1)"),
        (NARROW, {}, "'pkd.adapters.fpn.weight': (32, 16, 1, 1)}, this pair needs nothing"),
        (NARROW, {"head_channels": 8, "fpn_channels": 16}, "needs {'crosskd.adapters.cls.weight': (32, 8, 1, 1)"),
    ],
)
def test_a_checkpoint_of_other_methods_is_refused(tmp_path: Path, saved: dict, loaded: dict, message: str):
    pair_of(**saved).save_methods(tmp_path)
    pair = pair_of(**loaded)
    before = copied(pair.methods.state_dict())
    with pytest.raises(PairError) as error:
        pair.load_methods(tmp_path)
    assert message in str(error.value) and METHODS_FILE in str(error.value) and "output_dir" in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in pair.methods.state_dict().items())


# Compiled -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detector", ["gfl", *(pytest.param(d, marks=pytest.mark.slow) for d in DETECTORS[1:])])
def test_a_pair_compiles_to_one_program(detector: str):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # Of few operators, with other widths, classes and levels.
    options = {"head_channels": 16, "id2label": {0: "dog", 1: "emu"}, "strides": [8, 16, 32]}
    options |= {"regress_ranges": [[-1.0, 64.0], [64.0, 128.0], [128.0, 1e8]]} if detector == "fcos" else {}
    student, teacher = tiny_model(detector, head_blocks=1, **options), tiny_model(detector, seed=5, head_blocks=1)
    pair = DistillationPair(student, teacher, [CrossKD(CrossKD.Settings(tap_index=1)), PKD(), Mimic()])
    batch, plain = tiny_batch(), copy.deepcopy(pair)
    expected = plain(**batch)
    expected.loss.backward()
    output = torch.compile(pair, fullgraph=True, backend="aot_eager")(**batch)
    output.loss.backward()
    torch.testing.assert_close(output.loss_dict, expected.loss_dict)
    gradients = [(p.grad, q.grad) for p, q in zip(pair.parameters(), plain.parameters(), strict=True)]
    assert all((a is None) == (b is None) for a, b in gradients)
    for a, b in gradients:
        assert a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


# What a user may give -----------------------------------------------------------------------------------------------


class Louder(PKD):
    name = "louder"


def test_terms_of_one_name_are_an_error():
    with pytest.raises(PairError, match=r"pkd: another loss has the name kd_feature"):
        pair_of([PKD(), Louder()])(**tiny_batch())


def test_parameters_come_in_the_order_of_names_whatever_the_list():
    first, second = (pair_of(methods, **NARROW) for methods in ([CrossKD(), PKD()], [PKD(), CrossKD()]))
    assert [name for name, _ in first.named_parameters()] == [name for name, _ in second.named_parameters()]


def test_methods_are_objects():
    with pytest.raises(PairError, match=r"'crosskd' is not a KDMethod"):
        pair_of(["crosskd"])
    with pytest.raises(TypeError, match="needs the class attributes name, Settings"):
        type("Nameless", (KDMethod,), {})


def test_an_unlabelled_batch_is_learnt_from_the_teacher_alone():
    """Divided by the sum of the teacher's highest probabilities; every parameter gets a gradient, as DDP needs it."""
    pair = pair_of([CrossKD()])
    pixels = tiny_batch()["pixel_values"]
    output = pair(pixels)
    assert set(output.loss_dict) == {"kd_cls", "kd_box"} and output.loss > 0
    output.loss.backward()
    assert all(p.grad is not None for p in pair.parameters() if p.requires_grad)
    with torch.no_grad():
        student, teacher = pair.student_observer(pixels), pair.teacher_observer(pixels)
        targets = KDTargets.of(student, teacher, same_rule=True, box_normalizer=True)
    sure = teacher.predictions.logits.amax(-1).sigmoid().sum()
    assert sure > 1 and targets.positive is None
    torch.testing.assert_close(targets.normalizer, sure)
    assert torch.equal(targets.mask, teacher.predictions.mask)


@pytest.mark.parametrize("found", [True, False])
def test_own_losses_of_an_unlabelled_batch_count_if_soft_boxes_gave_it_boxes(found, monkeypatch):
    pair = pair_of([CrossKD(), SoftBoxes()])
    boxes = GroundTruth(
        torch.tensor([[[8.0, 8, 40, 40]]] * 2), torch.ones(2, 1).long(), torch.tensor([[found], [False]])
    )
    monkeypatch.setattr(pair.teacher_observer, "detections", lambda *given: boxes)
    pixels = tiny_batch()["pixel_values"]
    terms = pair(pixels).loss_dict
    assert all((terms[name] > 0) == found for name in ("loss_cls", "loss_box", "loss_dfl")), terms
    assert terms["kd_cls"] > 0
    # Distillation doesn't depend on what was found.
    torch.testing.assert_close(terms["kd_cls"], pair_of([CrossKD()])(pixels).loss_dict["kd_cls"])


def test_a_teacher_in_half_precision_crosses_without_autocast():
    pair = DistillationPair(tiny_model(seed=1), tiny_model(seed=5).to(torch.bfloat16), [CrossKD()])
    assert pair(**tiny_batch()).loss.isfinite()
