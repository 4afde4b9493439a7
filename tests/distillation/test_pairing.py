"""Any student with any teacher: what both have is found, what can't work is refused, and the rest trains."""

import itertools
from functools import cache

import pytest
import torch
from tiny import tiny_args, tiny_batch, tiny_model, tiny_split
from torchvision.ops import box_convert, generalized_box_iou

from crosskd_hf.distillation import PKD, CrossKD, DistillationPair, KDMethod, Mimic, PairError
from crosskd_hf.distillation.compatibility import Pairing, pair_up
from crosskd_hf.distillation.observers.dense import DenseObserver
from crosskd_hf.models import CONFIGS, MODELS
from crosskd_hf.models.image_processing import DenseDetectorImageProcessor
from crosskd_hf.training.distillation_trainer import DistillationTrainer
from crosskd_hf.utils.label_names import COCO_CLASSES

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


def test_any_two_detectors_of_equal_shapes_share_everything():
    for student, teacher in itertools.product(DETECTORS, repeat=2):
        assert pair_up(config(student), config(teacher)) == Pairing()
        pair = DistillationPair(model(student), model(teacher), [CrossKD(), PKD()])
        assert not pair.notes and not list(pair.methods.parameters())
    other = config(backbone="resnet34", fpn_extra_convs="on_input", frozen_stages=0)
    assert pair_up(config(fpn_extra_convs="on_output"), other) == Pairing()


@pytest.mark.parametrize(
    ("student", "teacher", "shared", "note"),
    [
        (("cat", "dog"), ("dog", "cat"), [[0, 1], [1, 0]], "2 of the student's 2 are among the teacher's 2"),
        (
            ("cat", "dog", "emu"),
            ("fox", "emu", "cat", "cow"),
            [[0, 2], [2, 1]],
            "2 of the student's 3 are among the teacher's 4; learnt without the teacher: dog",
        ),
        # A name with an equal is no other name's near match.
        (("Cat", "cat"), ("cat", "fox"), [[1], [0]], "1 of the student's 2"),
    ],
)
def test_classes_are_matched_by_name(student, teacher, shared, note):
    found = pair_up(config(labels=student), config(labels=teacher))
    assert [index.tolist() for index in found.classes] == shared
    assert len(found.notes) == 1 and found.notes[0].startswith(f"classes: {note}")


def test_classes_of_which_none_is_shared_are_refused():
    (problem,) = problems(model(labels=("cat", "dog")), model(labels=("emu", "fox")))
    assert "none of which both know (student cat, dog; teacher emu, fox)" in problem
    assert "train the teacher on the student's data first" in problem


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("Cat", "cat"), ("polar bear", "polar_bear"), ("polar-bear", "polarbear"), ("traffic-light", "traffic light")],
)
def test_names_that_differ_in_spelling_only_are_refused(student, teacher):
    """Whichever other classes are shared: this one would be learnt without the teacher."""
    (problem,) = pair_up(config(labels=(student, "dog")), config(labels=("dog", teacher))).problems
    assert f"student {student!r}, teacher {teacher!r}" in problem and "config.json" in problem


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


TOWERS = {"crosskd.cls": (16, 32), "crosskd.reg": (16, 32)}


@pytest.mark.parametrize(
    ("options", "methods", "expected"),
    [
        ({"head_channels": 16}, [CrossKD()], TOWERS),
        ({"head_channels": 16}, [crosskd(tap_index=0)], {}),
        ({"fpn_channels": 16}, [CrossKD()], {}),
        ({"fpn_channels": 16}, [crosskd(tap_index=0)], TOWERS),
        ({"fpn_channels": 16}, [crosskd(student_tap_index=0)], TOWERS),
        ({"fpn_channels": 16, "head_channels": 16}, [CrossKD(), PKD()], TOWERS | {"pkd.fpn": (16, 32)}),
        ({"fpn_channels": 16, "head_channels": 8}, [Mimic()], {}),
    ],
)
def test_an_adapter_where_widths_differ(options, methods, expected):
    pair = DistillationPair(model(**options), model(), methods)
    shapes = {name: (p.shape[1], p.shape[0]) for name, p in pair.methods.named_parameters()}
    assert shapes == {name.replace(".", ".adapters.") + ".weight": shape for name, shape in expected.items()}
    notes = [note for note in pair.notes if "trained with the student and not saved with it" in note]
    assert len(notes) == bool(expected) and all(name in notes[0] for name in shapes)


@pytest.mark.parametrize(
    ("student", "teacher", "settings", "who"),
    [
        (2, 4, {"tap_index": 3}, "student_tap_index"),
        (4, 2, {"tap_index": 3}, "tap_index"),
    ],
)
def test_a_head_with_fewer_blocks_than_its_tap_is_refused(student, teacher, settings, who):
    (problem,) = problems(model(head_blocks=student), model(head_blocks=teacher), crosskd(**settings))
    assert problem == f"crosskd.{who}: the tap is 3, the towers have 2 blocks: set it to 2 or less"


# Pixels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("student", "teacher"), [("pytorch", "caffe"), ("caffe", "pytorch")])
def test_the_teacher_sees_its_own_pixels(student, teacher):
    """Against the teacher's own image processor, padding included."""
    configs = [config(backbone="resnet50", backbone_style=style) for style in (student, teacher)]
    images = [
        torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(h))
        for h, w in ((40, 60), (64, 32))
    ]
    shown, expected = (DenseDetectorImageProcessor.for_model(c, 40, 64)(images, return_tensors="pt") for c in configs)
    given = pair_up(*configs).pixels(shown["pixel_values"], shown["pixel_mask"])
    torch.testing.assert_close(given, expected["pixel_values"], atol=1e-4, rtol=1e-5)
    assert (given[1, :, :, 40:] == 0).all() and (expected["pixel_mask"][1, :, 40:] == 0).all()


WHITE = (torch.tensor([255.0, 255, 255]) - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor(
    [58.395, 57.12, 57.375]
)


def test_a_backbone_of_its_own_normalisation_gets_it():
    # timm's Inception-style weights: mean and std 0.5.
    found = pair_up(config(), config(backbone="mobilenetv3_large_100.miil_in21k_ft_in1k"))
    torch.testing.assert_close(found.pixels(WHITE.view(1, 3, 1, 1), None).flatten(), torch.ones(3))


def test_pixels_are_those_of_the_processor_that_makes_them():
    """Not those that a processor of the student's backbone would make."""
    configs = [config(backbone="resnet50")] * 2
    plain = DenseDetectorImageProcessor(image_mean=[0.0] * 3, image_std=[255.0] * 3)
    found = pair_up(*configs, processor=plain)
    torch.testing.assert_close(found.pixels(torch.ones(1, 3, 1, 1), None).flatten(), WHITE)
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


@pytest.mark.parametrize(
    ("student", "teacher", "methods"),
    [
        ({"fpn_channels": 16, "head_channels": 64}, {}, [CrossKD, PKD]),
        ({"head_blocks": 2}, {}, [lambda: crosskd(student_tap_index=1)]),
        ({}, {}, [lambda: crosskd(tap_index=0)]),
        (
            {"head_blocks": 2, "head_channels": 16},
            {"head_blocks": 4},
            [lambda: crosskd(tap_index=4, student_tap_index=2)],
        ),
        ({}, {"head_blocks": 2}, [lambda: crosskd(tap_index=0, student_tap_index=4)]),
        ({}, {"id2label": {0: "emu", 1: "cat", 2: "dog"}}, [CrossKD]),
        ({"strides": [8, 16, 32]}, {"detector": "retinanet"}, [CrossKD]),
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


def class_scores(model, pixels: torch.Tensor) -> torch.Tensor:
    """Without centerness."""
    observer = DenseObserver(model)
    observer.ask_for_predictions()
    return observer(pixels).predictions.logits.sigmoid()


@pytest.mark.parametrize("name", ["gfl", "fcos", "atss"])
def test_mimicking_compares_the_students_own_predictions(name: str) -> None:
    student, inputs = tiny_model(name, seed=1), tiny_batch()
    terms, pair = losses(student, frozen(name), inputs, Mimic(Mimic.Settings(weight=2.0)))
    assert set(terms) == {"mimic_cls", "mimic_box"} | ({"mimic_centerness"} if name == "atss" else set())
    # By hand: |p - t| * BCE over the student's own logits, masked, over the normaliser
    shown = pair.student_observer(**inputs)
    p, t = (class_scores(m, inputs["pixel_values"]) for m in (student, pair.teacher))
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
    weights = class_scores(teacher, inputs["pixel_values"]).amax(-1)
    frame = torch.tensor([96, 64, 96, 64])
    boxes = [box_convert(out.pred_boxes.flatten(0, 1), "cxcywh", "xyxy") * frame for out in outputs]
    giou = generalized_box_iou(*boxes).diagonal().view_as(weights)
    expected = ((1 - giou) * weights).sum() / pair.student_observer(**inputs).targets.class_normalizer
    torch.testing.assert_close(terms["mimic_box"], expected)


@pytest.mark.parametrize(("student", "teacher"), [("gfl", "retinanet"), ("retinanet", "atss")])
def test_mimicking_needs_as_many_priors(student, teacher):
    (problem,) = problems(model(student), model(teacher), Mimic())
    assert "priors per cell" in problem and "CrossKD needs no equal ones" in problem


# What is refused, and where a pair is trained -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"do_rescale": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}, 1),
        ({"do_normalize": False}, 1),
        ({"do_normalize": False, "do_rescale": True}, 255),
    ],
)
def test_the_teacher_gets_its_own_pixels_whatever_the_students_processor_does(options: dict, scale: int) -> None:
    image = torch.arange(3 * 32 * 32, dtype=torch.int64).remainder(256).to(torch.uint8).view(3, 32, 32)
    given = DenseDetectorImageProcessor(**options)
    own = DenseDetectorImageProcessor.for_model(config())
    pixels = given.normalize_and_pad([image])["pixel_values"]
    change = pair_up(config(), config(), given).pixels
    changed = pixels if change is None else change(pixels, None)
    torch.testing.assert_close(changed, own.normalize_and_pad([image])["pixel_values"], rtol=0, atol=1e-4)
    assert scale == 1 or pixels.max() <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossKD(2.0), r"CrossKD\(2\.0\): give a CrossKD\.Settings"),
        (lambda: crosskd(weight=-3.0), r"crosskd\.weight: -3\.0 must be at least 0"),
        (lambda: crosskd(tap="rectifeid"), r"crosskd\.tap: 'rectifeid' must be one of rectified, raw"),
        (lambda: DistillationPair(model(), model(), CrossKD()), r"CrossKD is no list.*\[CrossKD\(\), PKD\(\)\]"),
    ],
)
def test_methods_made_in_python_are_checked(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_method_belongs_to_one_pair():
    method = CrossKD()
    problems(model(labels=("cat", "dog")), model(labels=("emu", "fox")), method)  # of no pair, since it was refused
    DistillationPair(model(), model(), [method])
    (problem,) = problems(model(), model(), method)
    assert "this crosskd belongs to another pair" in problem


def test_an_optimizer_that_does_not_know_the_adapters_is_refused(tmp_path):
    small, split = tiny_model(seed=1, head_channels=16), tiny_split(tmp_path / "data")
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="leave optimizers out"):
        DistillationTrainer(small, frozen(), tiny_args(tmp_path), train_dataset=split, optimizers=(optimizer, None))
