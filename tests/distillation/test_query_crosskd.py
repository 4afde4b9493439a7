"""CrossKD and mimicking between transformers' detectors, on tiny models of random weights."""

import pytest
import torch
from query_models import CONFIGS, query_batch, query_model, two_levels
from tiny import tiny_model
from transformers import RTDetrImageProcessor

from crosskd_hf.distillation import (
    PKD,
    CrossKD,
    DistillationPair,
    KDMethod,
    Mimic,
    PairError,
    QueryCrossKD,
    QueryMimic,
)
from crosskd_hf.distillation.methods.query_crosskd import seen_by_teacher
from crosskd_hf.distillation.observers.decoders.decoder import LayerPredictions, Memory
from crosskd_hf.distillation.query_losses import confidence_weights, l1_giou_loss, pixel_l1_loss, query_cls_loss
from crosskd_hf.models.transformers_detectors import detection_losses, prepare_new

PICKING = [name for name in CONFIGS if name not in ("deformable_detr", "deformable_detr refined")]


def crosskd(**settings) -> QueryCrossKD:
    return QueryCrossKD(QueryCrossKD.Settings(**settings))


def pair_of(student, teacher, *methods, processor=None) -> DistillationPair:
    """Both given by family name, or as models."""
    student, teacher = (query_model(m, seed) if isinstance(m, str) else m for m, seed in ((student, 0), (teacher, 1)))
    return DistillationPair(student, teacher, methods, processor)


def gradient_groups(pair: DistillationPair) -> set[str]:
    """Parts of the student, and of the methods, that a batch's KD terms give a gradient."""
    terms = pair(**query_batch()).loss_dict
    sum(value for name, value in terms.items() if name.startswith("kd_")).backward()
    reached = set()
    for name, parameter in pair.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            name = name.removeprefix("student.model.")
            depth = 3 if name.startswith("decoder.layers") else 1
            reached.add(".".join(name.split(".")[:depth]))
    return reached


# A detector with itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", ["teacher", "student", "memory"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(family: str, queries: str) -> None:
    if family not in PICKING and queries != "memory":
        pytest.skip("picks no queries")
    model = query_model(family).eval()
    method = crosskd(queries=queries, beta=1.0)
    pair = DistillationPair(model, model, [method])
    batch = query_batch()
    pixels = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
    with torch.no_grad():
        student, teacher = pair.student_observer(**pixels), pair.teacher_observer(**pixels)
        passes = {"teacher": method.at_teachers_picks, "student": method.at_students_picks}
        cross_pass = passes.get(queries, method.in_students_memory)
        decoder = pair.student_observer.decoder
        cross, target = cross_pass(decoder, student.context, decoder, teacher.context)
        terms = method(student, teacher, pair.student_observer, pair.teacher_observer)
    assert len(cross) == len(target) == (3 if queries == "memory" else 1)
    for one, other in zip(cross, target, strict=True):
        assert torch.equal(one.logits, other.logits) and torch.equal(one.boxes, other.boxes)
    assert terms["kd_cls"] == 0 and terms["kd_box"] == 0


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("boxes", [True, False])
def test_every_parameter_of_a_detector_gets_a_gradient(family: str, boxes: bool) -> None:
    """Also without any box, where nothing is denoised."""
    model, batch = query_model(family), query_batch()
    if not boxes:
        batch["labels"] = [{name: value[:0] for name, value in label.items()} for label in batch["labels"]]
    prepare_new(model)
    terms = detection_losses(model, model(**batch), batch["labels"])
    torch.stack(list(terms.values())).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("family", ["rt_detr_v2", "d_fine", "deformable_detr two-stage", "lw_detr"])
def test_losses_under_autocast_are_finite_and_in_fp32(family: str) -> None:
    pair = pair_of(family, family, crosskd(), QueryMimic(), PKD())
    with torch.autocast("cpu", torch.bfloat16):
        terms = pair(**query_batch()).loss_dict
    assert all(term.dtype == torch.float32 and term.isfinite() for term in terms.values())
    expected = pair(**query_batch()).loss_dict["loss_detection"]
    torch.testing.assert_close(terms["loss_detection"], expected, atol=0, rtol=0.1)


# Pairs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "student", "expected"),
    [
        ("teacher", "rt_detr_v2", {"backbone", "encoder_input_proj", "encoder", "decoder_input_proj"}),
        ("student", "rt_detr_v2", {"backbone", "encoder_input_proj", "encoder", "decoder_input_proj"}),
        ("memory", "deformable_detr", {"backbone", "input_proj", "encoder", "level_embed"}),
    ],
)
def test_gradients_reach_what_the_pass_promises(queries: str, student: str, expected: set[str]) -> None:
    """The student's first two layers of three in the passes between decoders; its encoder only in `memory`."""
    reached = gradient_groups(pair_of(student, student, crosskd(queries=queries)))
    layers = set() if queries == "memory" else {"decoder.layers.0", "decoder.layers.1"}
    assert expected <= reached
    assert {name for name in reached if name.startswith("decoder.layers")} == layers


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("rt_detr_v2", "d_fine"),
        ("d_fine", "rt_detr_v2"),
        ("rt_detr", "deformable_detr two-stage"),
        ("deformable_detr two-stage", "rt_detr"),
        ("lw_detr", "rt_detr"),
        ("rf_detr", "lw_detr"),
    ],
)
@pytest.mark.parametrize("queries", ["teacher", "student", "memory"])
def test_other_families_on_the_other_side(student: str, teacher: str, queries: str) -> None:
    if student == "lw_detr" and queries == "student":
        pytest.skip("refused, see below")
    pair = pair_of(student, teacher, crosskd(queries=queries), processor=RTDetrImageProcessor())
    before = {name: value.clone() for name, value in pair.teacher.state_dict().items()}
    output = pair(**query_batch())
    output.loss.backward()
    assert torch.isfinite(output.loss) and output.loss_dict["kd_cls"] > 0 and output.loss_dict["kd_box"] > 0
    assert all(p.grad is None for p in pair.teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in pair.teacher.state_dict().items())
    assert all(p.grad is not None for p in pair.methods.parameters())


@pytest.mark.parametrize("queries", ["teacher", "student", "memory"])
def test_other_widths_depths_levels_and_numbers_of_queries(queries: str) -> None:
    """As D-FINE nano has them: two levels, fewer layers, narrower."""
    student = query_model("d_fine", **two_levels(), decoder_layers=2)
    teacher = query_model("rt_detr_v2", 1, decoder_layers=4, d_model=32, decoder_in_channels=[16] * 3, num_queries=20)
    pair = pair_of(student, teacher, crosskd(queries=queries))
    method = pair.methods["query_crosskd"]
    assert (method.resolved.student_layer, method.resolved.layer) == (1, 2)
    assert method.adapter.weight.shape == (32, 16) and pair.student_observer.strides == (16, 32)
    output = pair(**query_batch())
    output.loss.backward()
    assert torch.isfinite(output.loss) and method.adapter.weight.grad.any()


def test_memory_queries_of_the_student() -> None:
    """Each layer of the teacher sees the student's queries, in both memories, so that its decoder learns, too."""
    pair = pair_of("deformable_detr", "deformable_detr", crosskd(queries="memory", memory_queries="student"))
    reached = gradient_groups(pair)
    assert {"decoder.layers.0", "decoder.layers.1", "encoder", "backbone"} <= reached
    assert "decoder.layers.2" not in reached  # nothing follows what leaves the last


@pytest.mark.parametrize(("student", "teacher"), [(6, 12), (12, 6)])
@pytest.mark.parametrize("queries", ["teacher", "student", "memory"])
def test_slots_of_the_smaller_number_of_queries(student: int, teacher: int, queries: str) -> None:
    models = (query_model("lw_detr", seed, num_queries=count) for seed, count in ((0, student), (1, teacher)))
    assert pair_of(*models, crosskd(queries=queries))(**query_batch()).loss_dict["kd_box"] > 0


def test_picks_that_nobody_can_use_lead_to_the_memory_pass() -> None:
    sized = RTDetrImageProcessor(size={"height": 64, "width": 96})
    method = crosskd()
    DistillationPair(query_model("rt_detr"), query_model("lw_detr", 1), [method], sized)
    assert method.resolved.queries == "memory"


def test_classes_are_matched_by_name() -> None:
    teacher = query_model("rt_detr", 1, labels={0: "emu", 1: "yak", 2: "cat"})
    pair = pair_of("d_fine", teacher, crosskd())
    assert pair.student_observer.classes.tolist() == [0, 2] and pair.teacher_observer.classes.tolist() == [2, 0]
    assert torch.isfinite(pair(**query_batch()).loss)


def test_mimicking_by_slots_and_pkd_on_the_encoders_levels() -> None:
    pair = pair_of("rt_detr_v2", query_model("d_fine", 1, num_queries=20), QueryMimic(), PKD())
    terms = pair(**query_batch()).loss_dict
    assert {"loss_detection", "mimic_cls", "mimic_box", "kd_feature"} == set(terms)
    assert all(value > 0 for value in terms.values())
    model = query_model("rt_detr").eval()
    alone = DistillationPair(model, model, [QueryMimic(), PKD()])
    terms = alone(**{**query_batch(), "labels": None}).loss_dict
    assert terms["mimic_cls"] == 0 and terms["mimic_box"] == 0 and terms["kd_feature"] == 0


@pytest.mark.parametrize(
    ("student", "teacher", "settings", "names"),
    [
        ("deformable_detr", "rt_detr", {"queries": "teacher"}, ["query_crosskd.queries", "memory"]),
        ("rt_detr", "lw_detr", {"queries": "teacher"}, ["query_crosskd.queries", "lw_detr", "memory"]),
        ("lw_detr", "rt_detr", {"queries": "student"}, ["query_crosskd.queries", "lw_detr", "memory"]),
        ("rt_detr", "rt_detr", {"layer": 3}, ["query_crosskd.layer is 3", "teacher", "2 or less"]),
        ("rt_detr", "rt_detr", {"student_layer": 4}, ["query_crosskd.student_layer is 4", "3 or less"]),
        ("rt_detr", "rt_detr", {"memory_queries": "student"}, ["query_crosskd.memory_queries", "memory"]),
    ],
)
def test_what_a_pair_cannot_do_is_named(student: str, teacher: str, settings: dict, names: list[str]) -> None:
    with pytest.raises(PairError) as error:
        pair_of(student, teacher, crosskd(**settings), processor=RTDetrImageProcessor())
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize("method", [crosskd(), QueryMimic()])
def test_boxes_relative_to_image_and_to_padded_input_are_not_compared(method: KDMethod) -> None:
    student, teacher = query_model("deformable_detr two-stage"), query_model("rt_detr", 1)
    with pytest.raises(PairError, match=rf"{method.name}: rt_detr knows of no padding.*data\.size"):
        DistillationPair(student, teacher, [method])
    DistillationPair(student, teacher, [method], RTDetrImageProcessor())  # all of one size


def test_the_edges_of_layers_are_allowed() -> None:
    pair = pair_of("rt_detr", "rt_detr", crosskd(layer=2, student_layer=3))
    assert pair(**query_batch()).loss_dict["kd_box"] > 0
    assert pair_of("rt_detr", "rt_detr", crosskd(layer=0, student_layer=0))(**query_batch()).loss_dict["kd_box"] > 0


def test_methods_of_the_other_kind_are_refused_by_name() -> None:
    dense = tiny_model("gfl")
    for student, teacher, method, name in (
        (query_model("rt_detr"), query_model("rt_detr"), CrossKD(), "query_crosskd"),
        (query_model("rt_detr"), query_model("rt_detr"), Mimic(), "query_mimic"),
        (dense, tiny_model("gfl"), crosskd(), "crosskd"),
        (dense, tiny_model("gfl"), QueryMimic(), "mimic"),
    ):
        with pytest.raises(PairError, match=name):
            DistillationPair(student, teacher, [method])


# Losses, by hand ----------------------------------------------------------------------------------------------------


def test_class_loss() -> None:
    """p 0.5, teacher's 0.75: BCE is log 2; beta 1 multiplies by 0.25. Two classes are added."""
    logits, teacher = torch.zeros(1, 1, 2), torch.full((1, 1, 2), 3.0).log()
    torch.testing.assert_close(query_cls_loss(logits, teacher, 0).item(), 2 * 0.6931472)
    torch.testing.assert_close(query_cls_loss(logits, teacher, 1).item(), 0.5 * 0.6931472)


def test_box_losses() -> None:
    """Squares of side 0.2 with centres 0.1 apart: overlap 0.02, union 0.06, hull 0.06: GIoU is 1 / 3."""
    boxes, teacher = torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.tensor([[0.6, 0.5, 0.2, 0.2]])
    torch.testing.assert_close(l1_giou_loss(boxes, teacher, 5.0, 2.0), torch.tensor([5 * 0.1 + 2 * 2 / 3]))
    # Beside each other, 0.2 apart: no overlap, union 0.08, hull 0.6 * 0.2 = 0.12: GIoU is -1 / 3.
    apart = torch.tensor([[0.9, 0.5, 0.2, 0.2]])
    torch.testing.assert_close(l1_giou_loss(boxes, apart, 0.0, 1.0), torch.tensor([4 / 3]))
    # In pixels of an input 100 high and 200 wide, both vertical sides are 20 apart.
    sizes = torch.tensor([[100.0, 200.0]])
    torch.testing.assert_close(pixel_l1_loss(boxes[None], teacher[None], sizes), torch.tensor([[40.0]]))
    assert l1_giou_loss(boxes, boxes, 5.0, 2.0).item() == 0


def test_weights_by_the_teachers_confidence() -> None:
    """Highest probabilities 0.75 and 0.5 of one layer, then 0.25 and 0.1: over their sum, or 1."""
    odds = torch.tensor([[[[3.0, 1.0], [1.0, 0.5]]], [[[1 / 3, 1e-9], [1 / 9, 1e-9]]]])  # (layers, N, Q, classes)
    weights = confidence_weights(LayerPredictions(odds.log(), torch.zeros(2, 1, 2, 4)))
    torch.testing.assert_close(weights, torch.tensor([[[0.6, 0.4]], [[0.25, 0.1]]]))


def test_the_students_tokens_on_shared_levels() -> None:
    own = Memory(torch.zeros(1, 5, 2), ((2, 2), (1, 1)))
    student = Memory(torch.ones(1, 20, 2), ((4, 4), (2, 2)))
    seen = seen_by_teacher(student, own, [(1, 0)])
    assert seen.sizes == own.sizes and seen.tokens[0, :, 0].tolist() == [1, 1, 1, 1, 0]
    with pytest.raises(PairError, match=r"\(4, 4\) and \(2, 2\)"):
        seen_by_teacher(student, own, [(0, 0)])
