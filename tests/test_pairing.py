"""Any student with any teacher: what both have is found, what can't work is refused, and the rest trains."""

import copy
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny import tiny_args, tiny_batch, tiny_model, tiny_processor, tiny_split
from torchvision.ops import generalized_box_iou
from transformers import AutoModelForObjectDetection

from crosskd_hf.distillation.adapters import ADAPTERS_FILE, ATTRIBUTE, Adapters
from crosskd_hf.distillation.objective import distillation_losses, student_forward, teacher_forward
from crosskd_hf.distillation.pairing import STUDENT, TEACHER, Pairing, PixelChange, pair_up
from crosskd_hf.distillation.settings import resolve_settings
from crosskd_hf.models import CONFIGS, MODELS
from crosskd_hf.models.base import Predictions
from crosskd_hf.models.image_processing import DenseDetectorImageProcessor, pixel_style
from crosskd_hf.recipe.sections import DistillationSection
from crosskd_hf.training.distillation_trainer import DistillationTrainer
from crosskd_hf.training.trainer import DetectionTrainer
from crosskd_hf.utils.label_names import COCO_CLASSES

DETECTORS = ("gfl", "retinanet", "fcos", "atss")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Maps this small gain nothing from threads, and lose much where other processes hold the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def blank(detector: str):
    """On the meta device: only the configuration and the head's shape matter."""
    with torch.device("meta"):
        return MODELS[detector](CONFIGS[detector](backbone="resnet18", fpn_channels=8, head_channels=8))


def model(detector: str = "gfl", labels: tuple[str, ...] = ("cat", "dog"), **options):
    """A detector that has no weights and these settings."""
    settings = {"backbone": "resnet18", "fpn_channels": 32, "head_channels": 32, "id2label": dict(enumerate(labels))}
    made = copy.copy(blank(detector))
    made.config = CONFIGS[detector](**{**settings, **options})
    return made


def pair(student, teacher, **section) -> Pairing:
    return pair_up(student, teacher, resolve_settings(DistillationSection(**section), teacher))


def problems(student, teacher, **section) -> list[str]:
    with pytest.raises(ValueError, match="this student can't learn from this teacher:\n  - ") as error:
        pair(student, teacher, **section)
    return str(error.value).split("\n  - ")[1:]


def losses(student, teacher, inputs: dict, **section) -> tuple[dict, Pairing]:
    """Every distillation term of a batch, summed, with its graph."""
    settings = resolve_settings(DistillationSection(**section), teacher)
    pairing = pair_up(student, teacher, settings)
    output = student_forward(student, inputs, settings)
    own = teacher_forward(teacher, inputs, settings, pairing)
    terms = distillation_losses(student, output, teacher, own, settings, pairing)
    return {name: term.sum() for name, term in terms.items()}, pairing


def frozen(detector: str = "gfl", **options):
    return tiny_model(detector, **{"seed": 5, **options}).eval().requires_grad_(False)


# What both have -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", DETECTORS)
@pytest.mark.parametrize("student", DETECTORS)
def test_any_two_detectors_of_equal_shapes_share_everything(student, teacher):
    found = pair(model(student), model(teacher), pkd=1.0)
    assert (found.labels, found.levels, found.pixels, len(found.adapters), found.notes) == (None, None, None, 0, ())


def test_other_backbones_extra_convolutions_and_frozen_parts_are_no_obstacle():
    other = model(backbone="resnet34", fpn_extra_convs="on_input", frozen_stages=0)
    assert pair(model(fpn_extra_convs="on_output"), other).notes == ()


def test_classes_are_matched_by_name():
    found = pair(model(labels=("cat", "dog", "emu")), model(labels=("fox", "emu", "cat", "cow")))
    assert [index.tolist() for index in found.labels] == [[0, 2], [2, 1]]
    assert found.notes == ("classes: 2 of the student's 3 are among the teacher's 4; learnt without the teacher: dog",)


def test_classes_in_another_order_are_all_shared():
    found = pair(model(labels=("cat", "dog")), model(labels=("dog", "cat")))
    assert [index.tolist() for index in found.labels] == [[0, 1], [1, 0]]
    assert found.notes == ("classes: 2 of the student's 2 are among the teacher's 2",)


def test_classes_of_which_none_is_shared_are_refused():
    (problem,) = problems(model(labels=("cat", "dog")), model(labels=("emu", "fox")))
    assert "none of which both know (student cat, dog; teacher emu, fox)" in problem
    assert "train the teacher on the student's data first" in problem


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [("Cat", "cat"), ("polar bear", "polar_bear"), ("polar-bear", "polarbear"), ("traffic-light", "traffic light")],
)
def test_names_that_differ_in_spelling_only_are_refused(mine, theirs):
    """Whichever other classes are shared: this one would be learnt without the teacher."""
    (problem,) = problems(model(labels=(mine, "dog")), model(labels=("dog", theirs)))
    assert f"student {mine!r}, teacher {theirs!r}" in problem and "config.json" in problem


def test_a_name_with_an_equal_is_no_other_names_near_match():
    assert "1 of the student's 2" in pair(model(labels=("Cat", "cat")), model(labels=("cat", "fox"))).notes[0]


def test_coco_s_old_names_are_coco_s():
    """MMDetection 1.x wrote them with underscores."""
    old = tuple(name.replace(" ", "_") for name in COCO_CLASSES)
    found = pair(model(labels=COCO_CLASSES), model(labels=old))
    assert (found.labels, found.notes) == (None, ()), "80 of 80, in one order"
    found = pair(model(labels=("stop sign", "gnu", "traffic_light")), model(labels=old))
    assert [index.tolist() for index in found.labels] == [[0, 2], [11, 9]]


def test_levels_are_matched_by_stride():
    found = pair(model(strides=[8, 16, 32, 64]), model(strides=[8, 16, 32, 64, 128]))
    assert found.levels == ((0, 1, 2, 3), (0, 1, 2, 3))
    assert "distilled at the strides [8, 16, 32, 64]" in found.notes[0]


def test_strides_of_which_none_is_shared_are_refused():
    student, teacher = model(), model()
    student.config.strides = [4, 12]  # no FPN of this package has them
    (problem,) = problems(student, teacher)
    assert problem == "strides, none of which both have: student [4, 12], teacher [8, 16, 32, 64, 128]"


def test_the_batch_must_be_padded_enough_for_the_teacher():
    assert pair(model(size_divisor=64), model(size_divisor=32)).notes == ()
    (problem,) = problems(model(size_divisor=32), model(size_divisor=64))
    assert problem.startswith("size_divisor: student 32, teacher 64")


@pytest.mark.parametrize(
    ("options", "section", "expected"),
    [
        ({"head_channels": 16}, {}, {"cls": (16, 32), "reg": (16, 32)}),
        ({"head_channels": 16}, {"tap_index": 0}, {}),
        ({"fpn_channels": 16}, {}, {}),
        ({"fpn_channels": 16}, {"tap_index": 0}, {"cls": (16, 32), "reg": (16, 32)}),
        ({"fpn_channels": 16}, {"student_tap_index": 0}, {"cls": (16, 32), "reg": (16, 32)}),
        ({"fpn_channels": 16}, {"pkd": 1.0}, {"fpn": (16, 32)}),
        ({"fpn_channels": 16, "head_channels": 8}, {"crosskd": 0.0, "pkd": 1.0}, {"fpn": (16, 32)}),
        ({"fpn_channels": 16, "head_channels": 8}, {"pkd": 1.0}, {"cls": (8, 32), "reg": (8, 32), "fpn": (16, 32)}),
    ],
)
def test_an_adapter_where_widths_differ(options, section, expected):
    adapters = pair(model(**options), model(), **section).adapters
    assert {name: (conv.in_channels, conv.out_channels) for name, conv in adapters.items()} == expected


@pytest.mark.parametrize(
    ("student", "teacher", "section", "who"),
    [
        (2, 4, {"tap_index": 3}, "student"),
        (4, 2, {"tap_index": 3}, "teacher"),
        (2, 4, {"tap_index": 3, "student_tap_index": 2}, None),
        (4, 2, {"tap_index": 1, "student_tap_index": 3}, None),
        (2, 4, {"tap_index": 3, "student_tap_index": 3}, "student"),
        (3, 3, {"tap_index": 3}, None),
        (1, 1, {"tap_index": 0}, None),
        (1, 2, {"crosskd": 0.0, "pkd": 1.0}, None),
    ],
)
def test_a_head_with_fewer_blocks_than_its_tap_is_refused(student, teacher, section, who):
    models = model(head_blocks=student), model(head_blocks=teacher)
    if who is None:
        pair(*models, **section)
        return
    (problem,) = problems(*models, **section)
    name = {"student": "student_tap_index", "teacher": "tap_index"}[who]
    assert re.match(rf"blocks: {name} is 3, the {who}'s towers have 2 blocks: set distillation.{name} to 2", problem)


def test_everything_that_can_not_work_is_named_at_once():
    student = model(size_divisor=16, head_blocks=2, labels=("a", "b", "c"))
    found = problems(student, model("retinanet"), mimic=1.0)
    assert [problem.split()[0] for problem in found] == ["blocks:", "label", "size_divisor:", "predictions"]


# Pixels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher"), [("pytorch", "caffe"), ("caffe", "pytorch"), ("caffe", "caffe"), ("pytorch", "pytorch")]
)
def test_the_teacher_sees_its_own_pixels(student, teacher):
    """Against the teacher's own image processor, padding included."""
    configs = [model(backbone="resnet50", backbone_style=style).config for style in (student, teacher)]
    images = [
        torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(h))
        for h, w in ((40, 60), (64, 32))
    ]
    mine, expected = (DenseDetectorImageProcessor.for_model(c, 40, 64)(images, return_tensors="pt") for c in configs)
    change = PixelChange.between(*map(pixel_style, configs))
    if student == teacher:
        assert change is None
        return
    given = change(mine["pixel_values"], mine["pixel_mask"])
    torch.testing.assert_close(given, expected["pixel_values"], atol=1e-4, rtol=1e-5)
    assert (given[1, :, :, 40:] == 0).all() and (expected["pixel_mask"][1, :, 40:] == 0).all()


def test_a_backbone_of_its_own_normalisation_gets_it():
    # timm's Inception-style weights: mean and std 0.5.
    backbones = ("resnet18", "mobilenetv3_large_100.miil_in21k_ft_in1k")
    change = PixelChange.between(*(pixel_style(model(backbone=backbone).config) for backbone in backbones))
    white = (torch.tensor([255.0, 255, 255]) - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor(
        [58.395, 57.12, 57.375]
    )
    torch.testing.assert_close(change(white.view(1, 3, 1, 1), None).flatten(), torch.ones(3))


def test_pixels_are_those_of_the_processor_that_makes_them():
    """Not those that a processor of the student's backbone would make."""
    student, teacher = model(backbone="resnet50"), model(backbone="resnet50")
    settings = resolve_settings(DistillationSection(), teacher)
    plain = DenseDetectorImageProcessor(image_mean=[0.0] * 3, image_std=[255.0] * 3)
    found = pair_up(student, teacher, settings, processor=plain)
    grey = torch.full((1, 3, 1, 1), 127.5)
    expected = (grey.flatten() - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor([58.395, 57.12, 57.375])
    torch.testing.assert_close(found.pixels(grey / 255, None).flatten(), expected)
    assert pair_up(student, teacher, settings, processor=DenseDetectorImageProcessor()).pixels is None
    with pytest.raises(ValueError, match="size_divisor: student 8, teacher 32"):
        pair_up(student, teacher, settings, processor=DenseDetectorImageProcessor(size_divisor=8))


def test_the_distillation_uses_the_teachers_pixels():
    student, teacher = tiny_model(backbone="resnet50"), frozen(backbone="resnet50", backbone_style="caffe")
    inputs = tiny_batch()
    settings = resolve_settings(DistillationSection(), teacher)
    pairing = pair_up(student, teacher, settings)
    given = teacher_forward(teacher, inputs, settings, pairing).logits
    own = teacher(pixel_values=pairing.pixels(inputs["pixel_values"], None)).logits
    assert torch.equal(given, own)
    assert not torch.allclose(given, teacher_forward(teacher, inputs, settings).logits)


# Losses -------------------------------------------------------------------------------------------------------------


def test_kd_cls_is_on_the_shared_names_only():
    """A teacher of more classes in another order gives the terms of one that has only the student's."""
    student, teacher = tiny_model(seed=1), frozen()
    wide = frozen(id2label={0: "emu", 1: "dog", 2: "fox", 3: "cat"})
    wide.load_state_dict({k: v for k, v in teacher.state_dict().items() if "cls_predictor" not in k}, strict=False)
    for name in ("weight", "bias"):
        own, other = getattr(teacher.head.cls_predictor, name), getattr(wide.head.cls_predictor, name)
        other.data[3], other.data[1] = own.data[0], own.data[1]
        other.data[0], other.data[2] = own.data[0] + 1, own.data[1] - 1  # must not matter
    inputs = tiny_batch()
    expected, _ = losses(student, teacher, inputs)
    found, pairing = losses(student, wide, inputs)
    assert [index.tolist() for index in pairing.labels] == [[0, 1], [3, 1]]
    assert set(found) == set(expected) == {"kd_cls", "kd_box"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_classes_are_picked_from_the_logits():
    logits = torch.arange(12.0).view(1, 3, 4)
    pairing = Pairing(labels=(torch.tensor([1]), torch.tensor([3])))
    predictions = Predictions(logits, torch.zeros(1, 3, 4), None)
    assert pairing.shared_classes(predictions, TEACHER).logits.flatten().tolist() == [3, 7, 11]
    assert pairing.shared_classes(predictions, STUDENT).logits.flatten().tolist() == [1, 5, 9]


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("fewer", ["student", "teacher"])
def test_distils_at_the_shared_strides(detector, fewer):
    """Terms a level of a pair with levels missing = those of the full pair, but for the normalisers."""
    ranges = (
        {"regress_ranges": [[-1.0, 64.0], [64.0, 128.0], [128.0, 256.0], [256.0, 1e8]]} if detector == "fcos" else {}
    )
    short = {"strides": [8, 16, 32, 64], **ranges}
    student, teacher = tiny_model(detector, seed=1), frozen(detector)
    cut = tiny_model(detector, seed=1, **short) if fewer == "student" else frozen(detector, **short)
    full = student if fewer == "student" else teacher
    cut.load_state_dict({k: v for k, v in full.state_dict().items() if k in cut.state_dict()})
    with torch.no_grad():
        for pyramid in (student, teacher):
            for level, scale in enumerate(pyramid.head.scales.parameters() if hasattr(pyramid.head, "scales") else ()):
                scale.fill_(1 + level / 10)
    pair_of_models = (cut, teacher) if fewer == "student" else (student, cut)
    settings = resolve_settings(DistillationSection(pkd=1.0), pair_of_models[1])
    inputs = tiny_batch()

    def terms(student, teacher):
        pairing = pair_up(student, teacher, settings)
        output, own = student_forward(student, inputs, settings), teacher_forward(teacher, inputs, settings, pairing)
        return distillation_losses(student, output, teacher, own, settings, pairing)

    if hasattr(cut.head, "scales"):
        cut.head.scales.load_state_dict({str(i): torch.tensor(1 + i / 10) for i in range(4)})
    found = terms(*pair_of_models)
    # Without P7's single cell; the feature loss has a value a level.
    anchors = 9 if detector == "retinanet" else 1
    shapes = {"kd_feature": (4,), "kd_cls": (2, 128 * anchors), "kd_box": (2, 128 * anchors)}
    assert {name: tuple(term.shape) for name, term in found.items() if name != "kd_centerness"} == shapes
    # The feature loss knows neither mask nor normaliser: equal level by level.
    expected = terms(student, teacher)
    torch.testing.assert_close(found["kd_feature"], expected["kd_feature"][:4])
    assert all(term.isfinite().all() and term.sum() > 0 for term in found.values())
    assert found["kd_feature"].gt(0).all()


def test_scales_of_a_level_are_its_own():
    """A head that gets only some levels scales each as in the whole."""
    teacher = frozen()
    with torch.no_grad():
        for level, scale in enumerate(teacher.head.scales.parameters()):
            scale.fill_(1 + level)
    maps = [torch.randn(1, 32, size, size) for size in (8, 4, 2, 1, 1)]
    whole = teacher.head(maps)
    part = teacher.head(maps[1:3], levels=(1, 2))
    for level in (1, 2):
        assert torch.equal(part.boxes[level - 1], whole.boxes[level])


@pytest.mark.parametrize(
    ("student", "teacher", "section"),
    [
        ({"head_channels": 16}, {}, {}),
        ({"fpn_channels": 16, "head_channels": 64}, {}, {"pkd": 1.0}),
        ({"head_blocks": 2}, {}, {"student_tap_index": 1}),
        ({"head_blocks": 2, "head_channels": 16}, {"head_blocks": 4}, {"tap_index": 4, "student_tap_index": 2}),
        ({}, {"head_blocks": 2}, {"tap_index": 0, "student_tap_index": 4}),
        ({}, {"id2label": {0: "emu", 1: "cat", 2: "dog"}}, {}),
        ({"id2label": {0: "cat", 1: "newt"}}, {}, {}),
        ({"strides": [8, 16, 32]}, {}, {}),
    ],
)
def test_gradients_reach_adapters_and_blocks_before_the_tap_only(student, teacher, section):
    small, big = tiny_model(seed=1, frozen_stages=0, **student), frozen(**teacher)
    terms, pairing = losses(small, big, tiny_batch(), **section)
    sum(terms.values()).backward()
    tap = resolve_settings(DistillationSection(**section), big).student_tap_index
    for tower in (small.head.cls_tower, small.head.reg_tower):
        for number, block in enumerate(tower):
            touched = block.conv.weight.grad is not None and bool(block.conv.weight.grad.any())
            assert touched == (number < tap), number
    assert small.head.cls_predictor.weight.grad is None, "the student's own predictions see the ground truth only"
    assert small.fpn.lateral_convs[0].weight.grad.any() and small.backbone.body.conv1.weight.grad.any()
    assert all(convolution.weight.grad.any() for convolution in pairing.adapters.values())
    assert all(parameter.grad is None for parameter in big.parameters())


def test_mimicking_another_kind_of_detector_compares_scores_and_boxes():
    student, teacher = tiny_model("gfl", seed=1), frozen("atss")
    inputs = tiny_batch()
    settings = resolve_settings(DistillationSection(crosskd=0.0, mimic=1.0), teacher)
    output, own = student_forward(student, inputs, settings), teacher_forward(teacher, inputs, settings)
    terms = distillation_losses(student, output, teacher, own, settings)
    assert set(terms) == {"mimic_cls", "mimic_box"}
    weights = own.logits.sigmoid().amax(-1)
    pairs = ((student, output), (teacher, own))
    boxes = [m.decode(out.predictions.boxes, out.priors).flatten(0, 1) for m, out in pairs]
    giou = generalized_box_iou(*boxes).diagonal().view_as(weights)
    expected = ((1 - giou) * weights).sum() / output.detection.class_normalizer
    torch.testing.assert_close(terms["mimic_box"].sum(), expected)


@pytest.mark.parametrize(("student", "teacher"), [("gfl", "retinanet"), ("retinanet", "atss")])
def test_mimicking_needs_as_many_priors(student, teacher):
    (problem,) = problems(model(student), model(teacher), mimic=1.0)
    assert "priors a cell" in problem and "CrossKD needs no equal ones" in problem


@pytest.mark.parametrize("teacher", ["fcos", "gfl", "atss"])
def test_every_mimicked_kind_is_finite(teacher):
    for student in ("gfl", "fcos", "atss"):
        terms, _ = losses(tiny_model(student, seed=1), frozen(teacher), tiny_batch(), crosskd=0.0, mimic=1.0)
        assert all(term.isfinite() and term >= 0 for term in terms.values()), (student, terms)


# Training -----------------------------------------------------------------------------------------------------------

PAIRS = {
    "width": ({"head_channels": 16, "fpn_channels": 16}, {}, {"pkd": 1.0}),
    "blocks": ({"head_blocks": 2}, {"head_blocks": 4}, {"tap_index": 3, "student_tap_index": 2}),
    "classes": ({}, {"id2label": dict(enumerate(("ant", "dog", "cow", "cat", "elk")))}, {}),
}


def trainer_of(folder: Path, name: str, steps: int, **options) -> DistillationTrainer:
    student, teacher, section = PAIRS[name]
    small = tiny_model(seed=1, freeze_batchnorm_statistics=False, frozen_stages=0, **student)
    big = frozen(**teacher)
    split = tiny_split(folder / "data", images=4)
    args = tiny_args(
        folder / "run", **{"max_steps": steps, "optim": "adamw_torch_fused", "learning_rate": 3e-3, **options}
    )
    section = DistillationSection(**section)
    return DistillationTrainer(small, big, args, split, split, tiny_processor(small), section)


@pytest.mark.parametrize("name", PAIRS)
def test_trains_and_the_kd_loss_falls(tmp_path, name):
    trainer = trainer_of(tmp_path, name, steps=30)
    before = {key: value.clone() for key, value in trainer.teacher.state_dict().items()}
    adapters = {key: value.clone() for key, value in trainer.pairing.adapters.state_dict().items()}
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "kd_cls" in entry]
    kd = [sum(value for key, value in entry.items() if key.startswith("kd_")) for entry in logs]
    assert len(kd) == 30 and sum(kd[-5:]) < 0.8 * sum(kd[:5])
    assert all(torch.equal(value, before[key]) for key, value in trainer.teacher.state_dict().items())
    for key, value in trainer.pairing.adapters.state_dict().items():
        assert not torch.equal(value, adapters[key]), "the optimizer knows it"


def test_a_saved_student_has_no_adapter(tmp_path):
    trainer = trainer_of(tmp_path, "width", steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    assert not hasattr(trainer.model, ATTRIBUTE), "only while it is trained"
    trainer.save_model()
    trainer.model.save_pretrained(tmp_path / "by_hand")
    run = tmp_path / "run"
    for folder in (run, tmp_path / "by_hand", run / "checkpoint-1"):
        loaded, info = AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert not hasattr(loaded, ATTRIBUTE)
    batch = tiny_batch()["pixel_values"]
    assert torch.equal(loaded.eval()(batch).logits.isfinite().all(), torch.tensor(True))
    assert (run / "checkpoint-1" / ADAPTERS_FILE).is_file() and not (run / ADAPTERS_FILE).exists()


def test_adapters_resume_bit_for_bit(tmp_path):
    whole = trainer_of(tmp_path / "whole", "width", steps=4)
    whole.train()
    first = trainer_of(tmp_path / "cut", "width", steps=4, save_strategy="steps", save_steps=2, save_total_limit=None)
    first.train()
    again = trainer_of(tmp_path / "cut", "width", steps=4, save_strategy="steps", save_steps=2, save_total_limit=None)
    started = {key: value.clone() for key, value in again.pairing.adapters.state_dict().items()}
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "run" / "checkpoint-2"))
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    for key, value in whole.pairing.adapters.state_dict().items():
        assert torch.equal(value, again.pairing.adapters.state_dict()[key]) and not torch.equal(value, started[key])


def test_a_checkpoint_without_adapters_is_told(tmp_path):
    trainer = trainer_of(tmp_path, "width", steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-1"
    (folder / ADAPTERS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-1 has no adapters\.safetensors"):
        trainer_of(tmp_path, "width", steps=2).train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize(("first", "then"), [("width", "classes"), ("classes", "width")])
def test_a_checkpoint_of_other_adapters_is_refused(tmp_path, first, then):
    trainer_of(tmp_path, first, steps=1, save_strategy="steps", save_steps=1).train()
    folder = tmp_path / "run" / "checkpoint-1"
    if first == "width":
        with pytest.raises(ValueError, match=r"checkpoint-1 holds adapters \{'cls.weight': .*this pair needs none"):
            Adapters().load(folder)
        with pytest.raises(ValueError, match=r"this pair needs \{'cls.weight': \(8, 4, 1, 1\)\}: its teacher"):
            Adapters({"cls": (4, 8)}).load(folder)
    else:
        Adapters().load(folder)
        with pytest.raises(FileNotFoundError, match="which a student whose widths differ"):
            Adapters({"cls": (4, 8)}).load(folder)


def test_another_trainer_of_the_same_student_takes_no_adapters_away(tmp_path):
    """It did: they were left out of the optimizer, and so never learnt."""
    trainer = trainer_of(tmp_path, "width", steps=2)
    student, adapters = trainer.model, trainer.pairing.adapters
    before = {key: value.clone() for key, value in adapters.state_dict().items()}
    split = tiny_split(tmp_path / "more")
    other = DetectionTrainer(student, tiny_args(tmp_path / "other"), split, split, tiny_processor(student))
    assert not hasattr(student, ATTRIBUTE)
    trainer.train()
    assert all(not torch.equal(value, before[key]) for key, value in adapters.state_dict().items())
    assert not any(ATTRIBUTE in key for key in student.state_dict())
    other.evaluate()


def test_averaged_weights_have_no_adapter_either(tmp_path):
    trainer = trainer_of(tmp_path, "width", steps=2, ema_decay=0.5)
    trainer.train()
    trainer.save_model()
    assert not hasattr(trainer.average.model, ATTRIBUTE)
    _, info = AutoModelForObjectDetection.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_unused_parameters_of_ddp_and_adapters_are_refused_together(tmp_path):
    with pytest.raises(ValueError, match="ddp_find_unused_parameters DDP would take them for unused"):
        trainer_of(tmp_path, "width", steps=1, ddp_find_unused_parameters=True)
    trainer_of(tmp_path / "other", "classes", steps=1, ddp_find_unused_parameters=True)


def test_adapters_are_drawn_by_the_seed_and_leave_the_random_state_alone():
    torch.manual_seed(3)
    first = Adapters({"cls": (4, 8)}, seed=1)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))
    assert torch.equal(first["cls"].weight, Adapters({"cls": (4, 8)}, seed=1)["cls"].weight)
    assert not torch.equal(first["cls"].weight, Adapters({"cls": (4, 8)}, seed=2)["cls"].weight)


def test_an_optimizer_that_does_not_know_the_adapters_is_refused(tmp_path):
    small, split = tiny_model(seed=1, head_channels=16), tiny_split(tmp_path / "data")
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"adapters are trained too.*leave optimizers out"):
        DistillationTrainer(small, frozen(), tiny_args(tmp_path), split, optimizers=(optimizer, None))


def test_a_pairing_moves_as_a_whole():
    labels = torch.tensor([0]), torch.tensor([1])
    change = PixelChange(False, torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1))
    moved = Pairing(labels, None, change, Adapters({"cls": (2, 4)})).to(torch.device("meta"))
    assert moved.labels[0].is_meta and moved.pixels.scale.is_meta and moved.adapters["cls"].weight.is_meta
    assert replace(moved, labels=None).labels is None
