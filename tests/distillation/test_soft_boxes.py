"""The teacher's detections as targets of the student, on tiny models and boxes by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from query_models import DECODERLESS, query_batch, query_model
from tiny import tiny_batch, tiny_model

from crosskd_hf.distillation import (
    PKD,
    CrossKD,
    DistillationPair,
    Mimic,
    PairError,
    QueryCrossKD,
    QueryMimic,
    SoftBoxes,
)
from crosskd_hf.distillation.methods.soft_boxes import repetitions
from crosskd_hf.distillation.observation import Observation
from crosskd_hf.distillation.observers import observe
from crosskd_hf.models.losses import distance_overlaps, quality_focal_loss
from crosskd_hf.models.outputs import GroundTruth
from crosskd_hf.models.targets import class_targets, matched_distances
from crosskd_hf.recipe.distillation import DistillationSection, distillation_problems


def soft_boxes(**settings) -> SoftBoxes:
    return SoftBoxes(SoftBoxes.Settings(**settings))


def truth(boxes: list, labels: list, mask: list | None = None) -> GroundTruth:
    """Of one image."""
    mask = [True] * len(labels) if mask is None else mask
    return GroundTruth(torch.tensor([boxes]).float(), torch.tensor([labels]), torch.tensor([mask]))


def query_observation(logits: list, boxes: list) -> Observation:
    """Of one image of 100 x 200 pixels."""
    outputs = SimpleNamespace(logits=torch.tensor([logits]), pred_boxes=torch.tensor([boxes]))
    return Observation(outputs=outputs, image_sizes=torch.tensor([[100.0, 200.0]]))


def test_boxes_of_a_model_that_knows_no_padding_are_relative_to_the_padded_input() -> None:
    """An image 70 wide on a canvas of 96: x from 0.25 to 0.5 of the canvas, or, for Deformable DETR, of the image."""
    observed = query_batch()
    for family, width in (("d_fine", 96), ("deformable_detr two-stage", 70)):
        observer = observe(query_model(family).eval())
        observer.ask_for_detections()
        with torch.no_grad():
            observation = observer(observed["pixel_values"], observed["pixel_mask"])
        assert observation.image_sizes[1].tolist() == [64, 70] and observation.box_frames[1].tolist() == [64, width]
        outputs = SimpleNamespace(
            logits=torch.full((2, 1, 3), 9.0), pred_boxes=torch.tensor([[[0.375, 0.5, 0.25, 1]]] * 2)
        )
        found = observer.detections(replace(observation, outputs=outputs), 0.5, 1)
        assert found.boxes[1, 0].tolist() == pytest.approx([0.25 * width, 0, 0.5 * width, 64])


# Detections ---------------------------------------------------------------------------------------------------------


def test_a_sigmoid_family_gives_the_best_pairs_of_query_and_class() -> None:
    """Of the first query both classes: 0.8 and 0.6. The second's 0.5 isn't above the threshold, its 0.9 is."""
    observer = observe(query_model("deformable_detr", labels={0: "cat", 1: "dog"}))
    observer.ask_for_detections()
    odds = torch.tensor([[4.0, 1.5], [1.0, 9.0]])
    observation = query_observation(odds.log().tolist(), [[0.5, 0.5, 0.5, 0.5], [0.1, 0.5, 0.4, 0.2]])
    found = observer.detections(observation, 0.5, 4)
    assert found.mask.tolist() == [[True, True, True, False]] and found.labels.tolist() == [[1, 0, 1, 0]]
    torch.testing.assert_close(found.scores, torch.tensor([[0.9, 0.8, 0.6, 0.0]]))
    # The first reaches beyond the left side, from -20 on: it is clipped.
    expected = torch.tensor([[[0, 40, 60, 60], [50, 25, 150, 75], [50, 25, 150, 75], [0, 0, 0, 0]]]).float()
    torch.testing.assert_close(found.boxes, expected)
    assert observer.detections(observation, 0.5, 1).labels.tolist() == [[1]], "the best one"


def test_a_softmax_family_knows_no_object() -> None:
    """Probabilities 0.3, 0.6, 0.1 (no object); then 0.1, 0.1, 0.8."""
    observer = observe(query_model("detr", labels={0: "cat", 1: "dog"}))
    observer.ask_for_detections()
    logits = torch.tensor([[3.0, 6.0, 1.0], [1.0, 1.0, 8.0]]).log().tolist()
    found = observer.detections(query_observation(logits, [[0.5, 0.5, 0.2, 0.2]] * 2), 0.5, 3)
    assert found.mask.tolist() == [[True, False, False]] and found.labels[0, 0] == 1
    torch.testing.assert_close(found.scores[0, 0].item(), 0.6)


def test_a_dense_model_gives_what_its_processor_makes_of_its_output() -> None:
    model = tiny_model("atss").eval()
    observer = observe(model)
    observer.ask_for_detections()
    pixels = tiny_batch()["pixel_values"]
    mask = torch.ones(2, 64, 96, dtype=torch.bool)
    mask[1, :, 70:] = False
    with torch.no_grad():
        observation, output = observer(pixels, mask), model(pixels, mask)
    expected = observer.processor.post_process_object_detection(output, 0.2, [(64, 96), (64, 70)])
    found = observer.detections(observation, 0.2, 20)
    for i, one in enumerate(expected):
        count = min(20, len(one["scores"]))
        assert count == found.mask[i].sum() > 0
        assert torch.equal(found.scores[i, :count], one["scores"][:count])
        torch.testing.assert_close(found.boxes[i, :count], one["boxes"][:count])
    assert found.boxes[1, :, 2].max() <= 70


# Which are learnt ---------------------------------------------------------------------------------------------------


def test_a_box_that_repeats_a_labelled_one_is_known_by_iou_and_class() -> None:
    """Of 10 x 10 pixels: the lower half (IoU 0.5), a little less, another class, one of padding."""
    labelled = truth([[0, 0, 10, 10], [50, 50, 60, 60]], [0, 0], [True, False])
    soft = truth([[0, 0, 10, 5], [0, 0, 10, 4.99], [0, 0, 10, 5], [50, 50, 60, 60]], [0, 0, 1, 0])
    assert repetitions(soft, labelled, 0.5).tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("student", ["gfl", "rt_detr"])
def test_boxes_of_shared_classes_are_added_under_the_students_labels(student: str, monkeypatch) -> None:
    """The teacher's labels are emu, yak, cat; the student's cat, dog, emu. Its first label is a cat."""
    names = {0: "cat", 1: "dog", 2: "emu"}
    dense = student == "gfl"
    model = tiny_model("gfl", id2label=names) if dense else query_model(student, labels=names)
    method = soft_boxes()
    pair = DistillationPair(model, query_model("detr", 1, labels={0: "emu", 1: "yak", 2: "cat"}), [method])
    found = truth(
        [[0, 0, 20, 20], [30, 30, 40, 40], [50, 0, 70, 20], [5, 5, 15, 15]], [0, 1, 2, 2], [True] * 3 + [False]
    )
    found.__dict__["scores"] = torch.tensor([[0.9, 0.8, 0.7, 0.0]])
    monkeypatch.setattr(pair.teacher_observer, "detections", lambda *given: found)
    teacher = Observation(image_sizes=torch.tensor([[100.0, 200.0]]))
    given = torch.tensor([[0.3, 0.1, 0.1, 0.2]])  # pixels 50 0 70 20: the third of the teacher's
    given = {"boxes": given, "class_labels": torch.tensor([0])}
    labels = method.labels([given], teacher, pair.student_observer, pair.teacher_observer)
    if dense:
        assert labels["mask"].tolist() == [[True, True, False, False, False]]
        assert labels["class_labels"][0, :2].tolist() == [0, 2]
        assert labels["boxes_xyxy"][0, 1].tolist() == [0, 0, 20, 20]
        torch.testing.assert_close(labels["scores"][0, :2], torch.tensor([1.0, 0.9]))
    else:
        assert labels[0]["class_labels"].tolist() == [0, 2]
        torch.testing.assert_close(labels[0]["boxes"][1], torch.tensor([0.05, 0.1, 0.1, 0.2]))
        assert torch.equal(labels[0]["boxes"][:1], given["boxes"])
    # Without labels there is nothing that the third could repeat.
    alone = method.labels(None, teacher, pair.student_observer, pair.teacher_observer)
    classes = alone["class_labels"][alone["mask"]] if dense else alone[0]["class_labels"]
    assert classes.tolist() == [2, 0]


def test_a_gfl_student_learns_iou_times_score() -> None:
    model, batch = tiny_model("gfl").train(), tiny_batch(1)
    observer = observe(model)
    sizes = torch.tensor([[64.0, 96.0]])
    soft = GroundTruth(
        torch.tensor([[[8.0, 8, 40, 40]]]), torch.tensor([[1]]), torch.tensor([[True]]), torch.tensor([[0.6]])
    )
    labels = observer.labels_with(batch["labels"], soft, sizes)
    assert labels["scores"].tolist() == [[1.0, pytest.approx(0.6)]]
    head = model.head(model.fpn(model.backbone(batch["pixel_values"])))
    predictions, priors = model.flatten(head), model.priors(head)
    losses, joined = model.losses(predictions, priors, sizes, labels)
    iou, _ = distance_overlaps(
        model.distances(predictions.boxes, priors), matched_distances(joined, losses.assignment, priors)
    )
    factor = torch.where(losses.assignment.box_index == 1, 0.6, 1.0)
    assert (losses.assignment.positive & (losses.assignment.box_index == 1)).any()
    targets = class_targets(joined, losses.assignment, predictions.logits, iou.detach() * factor)
    expected = quality_focal_loss(predictions.logits, targets, 2.0).sum() / losses.class_normalizer
    torch.testing.assert_close(losses.terms["loss_cls"].sum(), expected)


# Pairs --------------------------------------------------------------------------------------------------------------


def detector(name: str, seed: int):
    labels = {0: "cat", 1: "dog"}
    return tiny_model(name, seed) if name in ("gfl", "fcos") else query_model(name, seed, labels=labels)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("gfl", "fcos"),
        ("fcos", "rt_detr"),
        ("rt_detr", "gfl"),
        *((n, "yolos") for n in DECODERLESS),
        ("gfl", "dab_detr"),
    ],
)
def test_any_student_learns_the_boxes_of_any_teacher(student: str, teacher: str) -> None:
    pair = DistillationPair(detector(student, 0), detector(teacher, 1), [soft_boxes(score_threshold=0.1, max_boxes=5)])
    batch = query_batch()
    batch["labels"][1]["class_labels"] = torch.tensor([1])
    if student in ("gfl", "fcos"):
        batch["labels"] = tiny_batch()["labels"]
    if student == "yolos":
        batch["pixel_mask"] = None
    seen = []
    pair.student_observer.register_forward_pre_hook(lambda module, given: seen.append(given[2]))
    output = pair(**batch)
    output.loss.backward()
    assert torch.isfinite(output.loss) and set(output.loss_dict) == set(
        pair.student_observer(*batch.values()).loss_dict
    )
    sizes = torch.tensor([[64.0, 96.0]] * 2)
    with_soft, given = (pair.student_observer.ground_truth(labels, sizes).mask.sum(1) for labels in seen)
    assert (with_soft - given > 0).all() and (with_soft - given <= 5).all()
    assert all(p.grad is None for p in pair.teacher.parameters())


@pytest.mark.parametrize("method", [CrossKD, Mimic, PKD, QueryCrossKD, QueryMimic])
def test_other_methods_refuse_a_detector_without_decoder_by_name(method: type) -> None:
    with pytest.raises(PairError, match=r"pkd" if method is PKD else r"detr has no"):
        DistillationPair(query_model("detr"), query_model("conditional_detr"), [method()])


def test_a_recipe_may_name_soft_boxes_alone() -> None:
    assert distillation_problems(DistillationSection({"soft_boxes": SoftBoxes.Settings()}), centerness=False) == []
