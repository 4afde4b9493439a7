"""Any student with any teacher: what both have is found, what can't work is refused, and the rest trains."""

from functools import cache
from pathlib import Path

import pytest
import torch
from tiny import tiny_args, tiny_batch, tiny_model, tiny_processor, tiny_split
from torchvision.ops import generalized_box_iou
from transformers import AutoModelForObjectDetection

from crosskd_hf.distillation import PKD, CrossKD, DistillationPair, KDMethod, Mimic, PairError, method_class
from crosskd_hf.distillation.compatibility import Pairing, PixelChange, pair_up
from crosskd_hf.distillation.pair import METHODS_FILE
from crosskd_hf.models import CONFIGS, MODELS
from crosskd_hf.models.image_processing import DenseDetectorImageProcessor, pixel_style
from crosskd_hf.training.distillation_trainer import DistillationTrainer
from crosskd_hf.training.trainer import DetectionTrainer
from crosskd_hf.utils.label_names import COCO_CLASSES
from crosskd_hf.weights.mmdet import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")

DETECTORS = ("gfl", "retinanet", "fcos", "atss")


@cache
def model(detector: str = "gfl", labels: tuple[str, ...] = ("cat", "dog"), **options):
    """A detector that has these settings and no weights: it is on the meta device."""
    settings = {"backbone": "resnet18", "fpn_channels": 32, "head_channels": 32, "id2label": dict(enumerate(labels))}
    with torch.device("meta"):
        return MODELS[detector](CONFIGS[detector](**{**settings, **options}))


def config(detector: str = "gfl", labels: tuple[str, ...] = ("cat", "dog"), **options):
    """Of such a detector."""
    return CONFIGS[detector](**{"backbone": "resnet18", "id2label": dict(enumerate(labels)), **options})


def crosskd(**settings) -> CrossKD:
    return CrossKD(CrossKD.Settings(**settings))


def problems(student, teacher, *methods: KDMethod) -> list[str]:
    with pytest.raises(PairError, match="this student can't learn from this teacher:\n  - ") as error:
        DistillationPair(student, teacher, methods)
    return str(error.value).split("\n  - ")[1:]


def losses(student, teacher, inputs: dict, *methods: KDMethod) -> tuple[dict, DistillationPair]:
    """Every term of the methods of a batch, with its graph."""
    pair = DistillationPair(student, teacher, methods or (CrossKD(),))
    terms = pair(**inputs).loss_dict
    return {name: term for name, term in terms.items() if name.startswith(("kd_", "mimic_"))}, pair


def frozen(detector: str = "gfl", **options):
    return tiny_model(detector, **{"seed": 5, **options}).eval().requires_grad_(False)


# What both have -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", DETECTORS)
@pytest.mark.parametrize("student", DETECTORS)
def test_any_two_detectors_of_equal_shapes_share_everything(student, teacher):
    assert pair_up(config(student), config(teacher)) == Pairing()
    pair = DistillationPair(model(student), model(teacher), [CrossKD(), PKD()])
    assert not pair.notes and not list(pair.methods.parameters())


def test_other_backbones_extra_convolutions_and_frozen_parts_are_no_obstacle():
    other = config(backbone="resnet34", fpn_extra_convs="on_input", frozen_stages=0)
    assert pair_up(config(fpn_extra_convs="on_output"), other).notes == ()


def test_classes_are_matched_by_name():
    found = pair_up(config(labels=("cat", "dog", "emu")), config(labels=("fox", "emu", "cat", "cow")))
    assert [index.tolist() for index in found.classes] == [[0, 2], [2, 1]]
    assert found.notes == ("classes: 2 of the student's 3 are among the teacher's 4; learnt without the teacher: dog",)


def test_classes_in_another_order_are_all_shared():
    found = pair_up(config(labels=("cat", "dog")), config(labels=("dog", "cat")))
    assert [index.tolist() for index in found.classes] == [[0, 1], [1, 0]]
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
    (problem,) = pair_up(config(labels=(mine, "dog")), config(labels=("dog", theirs))).problems
    assert f"student {mine!r}, teacher {theirs!r}" in problem and "config.json" in problem


def test_a_name_with_an_equal_is_no_other_names_near_match():
    assert "1 of the student's 2" in pair_up(config(labels=("Cat", "cat")), config(labels=("cat", "fox"))).notes[0]


def test_coco_s_old_names_are_coco_s():
    """MMDetection 1.x wrote them with underscores."""
    old = tuple(name.replace(" ", "_") for name in COCO_CLASSES)
    found = pair_up(config(labels=COCO_CLASSES), config(labels=old))
    assert (found.classes, found.notes) == ((None, None), ()), "80 of 80, in one order"
    found = pair_up(config(labels=("stop sign", "gnu", "traffic_light")), config(labels=old))
    assert [index.tolist() for index in found.classes] == [[0, 2], [11, 9]]


def test_levels_are_matched_by_stride():
    found = pair_up(config(strides=[8, 16, 32, 64]), config(strides=[8, 16, 32, 64, 128]))
    assert found.levels == ((0, 1, 2, 3), (0, 1, 2, 3))
    assert "distilled at the strides [8, 16, 32, 64]" in found.notes[0]


def test_strides_of_which_none_is_shared_are_refused():
    student = config()
    student.strides = [4, 12]  # no FPN of this package has them
    (problem,) = pair_up(student, config()).problems
    assert problem == "strides, none of which both have: student [4, 12], teacher [8, 16, 32, 64, 128]"


def test_the_batch_must_be_padded_enough_for_the_teacher():
    assert pair_up(config(size_divisor=64), config(size_divisor=32)).notes == ()
    (problem,) = pair_up(config(size_divisor=32), config(size_divisor=64)).problems
    assert problem.startswith("size_divisor: student 32, teacher 64")


@pytest.mark.parametrize(
    ("options", "methods", "expected"),
    [
        ({"head_channels": 16}, {"crosskd": {}}, {"crosskd.cls": (16, 32), "crosskd.reg": (16, 32)}),
        ({"head_channels": 16}, {"crosskd": {"tap_index": 0}}, {}),
        ({"fpn_channels": 16}, {"crosskd": {}}, {}),
        ({"fpn_channels": 16}, {"crosskd": {"tap_index": 0}}, {"crosskd.cls": (16, 32), "crosskd.reg": (16, 32)}),
        (
            {"fpn_channels": 16},
            {"crosskd": {"student_tap_index": 0}},
            {"crosskd.cls": (16, 32), "crosskd.reg": (16, 32)},
        ),
        ({"fpn_channels": 16, "head_channels": 8}, {"pkd": {}}, {"pkd.fpn": (16, 32)}),
        (
            {"fpn_channels": 16, "head_channels": 8},
            {"crosskd": {}, "pkd": {}},
            {"crosskd.cls": (8, 32), "crosskd.reg": (8, 32), "pkd.fpn": (16, 32)},
        ),
        ({"fpn_channels": 16, "head_channels": 8}, {"mimic": {}}, {}),
    ],
)
def test_an_adapter_where_widths_differ(options, methods, expected):
    made = [method_class(name)(method_class(name).Settings(**settings)) for name, settings in methods.items()]
    pair = DistillationPair(model(**options), model(), made)
    found = {name: (p.shape[1], p.shape[0]) for name, p in pair.methods.named_parameters()}
    assert found == {name.replace(".", ".adapters.") + ".weight": shape for name, shape in expected.items()}
    notes = [note for note in pair.notes if "trained with the student and not saved with it" in note]
    assert len(notes) == bool(expected) and all(name in notes[0] for name in found)


@pytest.mark.parametrize(
    ("student", "teacher", "settings", "who"),
    [
        (2, 4, {"tap_index": 3}, "student_tap_index"),
        (4, 2, {"tap_index": 3}, "tap_index"),
        (2, 4, {"tap_index": 3, "student_tap_index": 2}, None),
        (4, 2, {"tap_index": 1, "student_tap_index": 3}, None),
        (2, 4, {"tap_index": 3, "student_tap_index": 3}, "student_tap_index"),
        (3, 3, {"tap_index": 3}, None),
        (1, 1, {"tap_index": 0}, None),
    ],
)
def test_a_head_with_fewer_blocks_than_its_tap_is_refused(student, teacher, settings, who):
    models = model(head_blocks=student), model(head_blocks=teacher)
    if who is None:
        DistillationPair(*models, [crosskd(**settings)])
        return
    (problem,) = problems(*models, crosskd(**settings))
    assert problem == f"crosskd.{who}: the tap is 3, the towers have 2 blocks: set it to 2 or less"


# Pixels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher"), [("pytorch", "caffe"), ("caffe", "pytorch"), ("caffe", "caffe"), ("pytorch", "pytorch")]
)
def test_the_teacher_sees_its_own_pixels(student, teacher):
    """Against the teacher's own image processor, padding included."""
    configs = [config(backbone="resnet50", backbone_style=style) for style in (student, teacher)]
    images = [
        torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(h))
        for h, w in ((40, 60), (64, 32))
    ]
    mine, expected = (DenseDetectorImageProcessor.for_model(c, 40, 64)(images, return_tensors="pt") for c in configs)
    change = pair_up(*configs).pixels
    if student == teacher:
        assert change is None
        return
    given = change(mine["pixel_values"], mine["pixel_mask"])
    torch.testing.assert_close(given, expected["pixel_values"], atol=1e-4, rtol=1e-5)
    assert (given[1, :, :, 40:] == 0).all() and (expected["pixel_mask"][1, :, 40:] == 0).all()


def test_a_backbone_of_its_own_normalisation_gets_it():
    # timm's Inception-style weights: mean and std 0.5.
    backbones = ("resnet18", "mobilenetv3_large_100.miil_in21k_ft_in1k")
    change = PixelChange(*(pixel_style(config(backbone=backbone)) for backbone in backbones))
    white = (torch.tensor([255.0, 255, 255]) - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor(
        [58.395, 57.12, 57.375]
    )
    torch.testing.assert_close(change(white.view(1, 3, 1, 1), None).flatten(), torch.ones(3))


def test_pixels_are_those_of_the_processor_that_makes_them():
    """Not those that a processor of the student's backbone would make."""
    configs = [config(backbone="resnet50")] * 2
    plain = DenseDetectorImageProcessor(image_mean=[0.0] * 3, image_std=[255.0] * 3)
    found = pair_up(*configs, processor=plain)
    grey = torch.full((1, 3, 1, 1), 127.5)
    expected = (grey.flatten() - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor([58.395, 57.12, 57.375])
    torch.testing.assert_close(found.pixels(grey / 255, None).flatten(), expected)
    assert pair_up(*configs, processor=DenseDetectorImageProcessor()).pixels is None
    (problem,) = pair_up(*configs, processor=DenseDetectorImageProcessor(size_divisor=8)).problems
    assert problem.startswith("size_divisor: student 8, teacher 32")


def test_the_distillation_uses_the_teachers_pixels():
    student, teacher = tiny_model(backbone="resnet50"), frozen(backbone="resnet50", backbone_style="caffe")
    inputs, pair = tiny_batch(), DistillationPair(student, teacher, [Mimic()])
    seen = []
    teacher.backbone.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    pair(**inputs)
    assert torch.equal(seen[0], pair.pixels(inputs["pixel_values"], None))
    assert not torch.allclose(seen[0], inputs["pixel_values"])


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
    found, pair = losses(student, wide, inputs)
    assert [o.classes.tolist() for o in (pair.student_observer, pair.teacher_observer)] == [[0, 1], [3, 1]]
    assert set(found) == set(expected) == {"kd_cls", "kd_box"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


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
    inputs = tiny_batch()

    def terms(student, teacher):
        pair = DistillationPair(student, teacher, [CrossKD(), PKD()])
        observers = pair.student_observer, pair.teacher_observer
        shown = observers[0](**inputs), observers[1](inputs["pixel_values"])
        found = (method.terms(*shown, *observers) for method in pair.methods.values())
        return {name: term for of_method in found for name, term in of_method.items()}

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
    ("student", "teacher", "methods"),
    [
        ({"head_channels": 16}, {}, [CrossKD]),
        ({"fpn_channels": 16, "head_channels": 64}, {}, [CrossKD, PKD]),
        ({"head_blocks": 2}, {}, [lambda: crosskd(student_tap_index=1)]),
        (
            {"head_blocks": 2, "head_channels": 16},
            {"head_blocks": 4},
            [lambda: crosskd(tap_index=4, student_tap_index=2)],
        ),
        ({}, {"head_blocks": 2}, [lambda: crosskd(tap_index=0, student_tap_index=4)]),
        ({}, {"id2label": {0: "emu", 1: "cat", 2: "dog"}}, [CrossKD]),
        ({"id2label": {0: "cat", 1: "newt"}}, {}, [CrossKD]),
        ({"strides": [8, 16, 32]}, {}, [CrossKD]),
    ],
)
def test_gradients_reach_adapters_and_blocks_before_the_tap_only(student, teacher, methods):
    small, big = tiny_model(seed=1, frozen_stages=0, **student), frozen(**teacher)
    terms, pair = losses(small, big, tiny_batch(), *(method() for method in methods))
    sum(terms.values()).backward()
    for tower in (small.head.cls_tower, small.head.reg_tower):
        for number, block in enumerate(tower):
            touched = block.conv.weight.grad is not None and bool(block.conv.weight.grad.any())
            assert touched == (number < pair.student_observer.tap_index), number
    assert small.head.cls_predictor.weight.grad is None, "the student's own predictions see the ground truth only"
    assert small.fpn.lateral_convs[0].weight.grad.any() and small.backbone.body.conv1.weight.grad.any()
    assert all(parameter.grad.any() for parameter in pair.methods.parameters())
    assert all(parameter.grad is None for parameter in big.parameters())


# Mimicking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTORS)
def test_mimicking_compares_the_students_own_predictions(name: str) -> None:
    student, inputs = tiny_model(name, seed=1), tiny_batch()
    terms, pair = losses(student, frozen(name), inputs, Mimic(Mimic.Settings(weight=2.0)))
    assert set(terms) == {"mimic_cls", "mimic_box"} | ({"mimic_centerness"} if name == "atss" else set())
    # By hand: |p - t| * BCE over the student's own logits, masked, over the normaliser
    shown = pair.student_observer(**inputs)
    p, t = (m(inputs["pixel_values"]).logits.sigmoid() for m in (student, pair.teacher))
    bce = torch.nn.functional.binary_cross_entropy(p, t, reduction="none")
    targets = shown.targets
    normalizer = (targets.box_normalizer if name == "fcos" else targets.class_normalizer).clamp(min=1)
    weight = 2.0 * (0.4 if name == "fcos" else 1.0)
    expected = weight * (((p - t).abs() * bce).sum(-1) * targets.mask).sum() / normalizer
    assert terms["mimic_cls"].item() == pytest.approx(expected.item(), rel=1e-4)
    sum(terms.values()).backward()
    assert student.head.cls_predictor.weight.grad.abs().sum() > 0, "unlike CrossKD, it reaches the predictor"


def test_mimicking_another_kind_of_detector_compares_scores_and_boxes():
    student, teacher, inputs = tiny_model("gfl", seed=1), frozen("atss"), tiny_batch()
    terms, pair = losses(student, teacher, inputs, Mimic())
    assert set(terms) == {"mimic_cls", "mimic_box"}
    outputs = [m(inputs["pixel_values"]) for m in (student, teacher)]
    weights = outputs[1].logits.sigmoid().amax(-1)
    giou = generalized_box_iou(*(out.pred_boxes.flatten(0, 1) for out in outputs)).diagonal().view_as(weights)
    expected = ((1 - giou) * weights).sum() / pair.student_observer(**inputs).targets.class_normalizer
    torch.testing.assert_close(terms["mimic_box"], expected)


@pytest.mark.parametrize(("student", "teacher"), [("gfl", "retinanet"), ("retinanet", "atss")])
def test_mimicking_needs_as_many_priors(student, teacher):
    (problem,) = problems(model(student), model(teacher), Mimic())
    assert "priors per cell" in problem and "CrossKD needs no equal ones" in problem


@pytest.mark.parametrize("teacher", ["fcos", "gfl", "atss"])
def test_every_mimicked_kind_is_finite(teacher):
    for student, options in (("gfl", {}), ("gfl", {"reg_max": 8}), ("fcos", {}), ("atss", {})):
        terms, _ = losses(tiny_model(student, seed=1, **options), frozen(teacher), tiny_batch(), Mimic())
        assert all(term.isfinite() and term >= 0 for term in terms.values()), (student, terms)


# Training -----------------------------------------------------------------------------------------------------------

PAIRS = {
    "width": ({"head_channels": 16, "fpn_channels": 16}, {}, lambda: [CrossKD(), PKD(PKD.Settings(weight=1.0))]),
    "blocks": ({"head_blocks": 2}, {"head_blocks": 4}, lambda: [crosskd(tap_index=3, student_tap_index=2)]),
    "classes": ({}, {"id2label": dict(enumerate(("ant", "dog", "cow", "cat", "elk")))}, lambda: [CrossKD()]),
}


def trainer_of(folder: Path, name: str, steps: int, **options) -> DistillationTrainer:
    student, teacher, methods = PAIRS[name]
    small = tiny_model(seed=1, freeze_batchnorm_statistics=False, frozen_stages=0, **student)
    big = frozen(**teacher)
    split = tiny_split(folder / "data", images=4)
    args = tiny_args(
        folder / "run", **{"max_steps": steps, "optim": "adamw_torch_fused", "learning_rate": 3e-3, **options}
    )
    return DistillationTrainer(small, big, args, split, split, tiny_processor(small), methods())


def methods_state(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in trainer.pair.methods.state_dict().items()}


@pytest.mark.parametrize("name", PAIRS)
def test_trains_and_the_kd_loss_falls(tmp_path, name):
    trainer = trainer_of(tmp_path, name, steps=30)
    before = {key: value.clone() for key, value in trainer.teacher.state_dict().items()}
    adapters = methods_state(trainer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "kd_cls" in entry]
    kd = [sum(value for key, value in entry.items() if key.startswith("kd_")) for entry in logs]
    assert len(kd) == 30 and sum(kd[-5:]) < 0.8 * sum(kd[:5])
    assert all(torch.equal(value, before[key]) for key, value in trainer.teacher.state_dict().items())
    for key, value in methods_state(trainer).items():
        assert not torch.equal(value, adapters[key]), "the optimizer knows it"


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
    logs = [entry for entry in trainer.state.log_history if "kd_cls" in entry]
    assert len(logs) == 2 and all(entry["kd_cls"] > 0 for entry in logs)


def test_a_saved_student_has_no_adapter(tmp_path):
    trainer = trainer_of(tmp_path, "width", steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.pair.student.save_pretrained(tmp_path / "by_hand")
    run = tmp_path / "run"
    for folder in (run, tmp_path / "by_hand", run / "checkpoint-1"):
        loaded, info = AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert loaded.eval()(tiny_batch()["pixel_values"]).logits.isfinite().all()
    assert (run / "checkpoint-1" / METHODS_FILE).is_file() and not (run / METHODS_FILE).exists()


def test_adapters_resume_bit_for_bit(tmp_path):
    whole = trainer_of(tmp_path / "whole", "width", steps=4)
    whole.train()
    first = trainer_of(tmp_path / "cut", "width", steps=4, save_strategy="steps", save_steps=2, save_total_limit=None)
    first.train()
    again = trainer_of(tmp_path / "cut", "width", steps=4, save_strategy="steps", save_steps=2, save_total_limit=None)
    started = methods_state(again)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "run" / "checkpoint-2"))
    resumed = again.pair.state_dict()
    assert all(torch.equal(value, resumed[key]) for key, value in whole.pair.state_dict().items())
    assert all(not torch.equal(value, started[key]) for key, value in methods_state(again).items())


def test_a_checkpoint_without_adapters_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, "width", steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-1"
    (folder / METHODS_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-1: distillation\.safetensors holds nothing"):
        trainer_of(tmp_path, "width", steps=2).train(resume_from_checkpoint=str(folder))


def test_a_checkpoint_of_other_adapters_is_refused(tmp_path):
    trainer_of(tmp_path, "width", steps=1, save_strategy="steps", save_steps=1).train()
    student, _, methods = PAIRS["width"]
    small = tiny_model(seed=1, freeze_batchnorm_statistics=False, frozen_stages=0, **student)
    split = tiny_split(tmp_path / "data", images=4)
    args = tiny_args(tmp_path / "run", max_steps=2)
    other = DistillationTrainer(small, frozen(**student), args, split, split, tiny_processor(small), methods())
    with pytest.raises(CheckpointError, match=r"checkpoint-1.*this pair needs nothing"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_another_trainer_of_the_same_student_takes_no_adapters_away(tmp_path):
    """It did: they were left out of the optimizer, and so never learnt."""
    trainer = trainer_of(tmp_path, "width", steps=2)
    student, before = trainer.pair.student, methods_state(trainer)
    split = tiny_split(tmp_path / "more")
    other = DetectionTrainer(student, tiny_args(tmp_path / "other"), split, split, tiny_processor(student))
    trainer.train()
    assert all(not torch.equal(value, before[key]) for key, value in methods_state(trainer).items())
    other.evaluate()


def test_averaged_weights_have_no_adapter_either(tmp_path):
    trainer = trainer_of(tmp_path, "width", steps=2, ema_decay=0.5)
    trainer.train()
    trainer.save_model()
    _, info = AutoModelForObjectDetection.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_an_optimizer_that_does_not_know_the_adapters_is_refused(tmp_path):
    small, split = tiny_model(seed=1, head_channels=16), tiny_split(tmp_path / "data")
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="leave optimizers out"):
        DistillationTrainer(small, frozen(), tiny_args(tmp_path), split, optimizers=(optimizer, None))
