"""A student that starts from its teacher's FPN and head."""

import pytest
import torch
from tiny import tiny_model, write_tiny_recipe

from crosskd_hf.distillation.weight_inheritance import inherit_weights
from crosskd_hf.recipe.build import build_trainer
from crosskd_hf.recipe.load import load_recipe
from crosskd_hf.utils.strict_yaml import RecipeError


def taken(student, teacher, before: dict) -> set[str]:
    """Names that hold the teacher's values now; all others must be as they were."""
    after, given = student.state_dict(), teacher.state_dict()
    found = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert all(torch.equal(after[name], given[name]) for name in found)
    return found


def inherit(parts: list[str], teacher_options: dict | None = None, kinds=("gfl", "gfl"), **options):
    student = tiny_model(kinds[0], seed=1, **options)
    teacher = tiny_model(kinds[1], seed=2, **(teacher_options or {}))
    with torch.no_grad():  # everything differs
        for parameter in teacher.parameters():
            parameter.add_(0.01)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    report = inherit_weights(student, teacher, parts)
    return taken(student, teacher, before), report, student


def test_takes_neck_and_head_of_a_teacher_of_equal_shapes():
    names, report, student = inherit(["neck", "head"])
    assert names == {name for name in student.state_dict() if name.startswith(("fpn.", "head."))}
    neck, head = (sum(name.startswith(part) for name in names) for part in ("fpn.", "head."))
    assert report == f"inherited from the teacher: neck {neck} of {neck} tensors; head {head} of {head} tensors"


def test_leaves_what_has_another_shape():
    names, report, _ = inherit(["neck"], {"backbone": "resnet50"})  # other laterals, same outputs
    assert names and not any("lateral_convs" in name for name in names), "a layer's bias goes with its weight"
    assert "(new: fpn.lateral_convs.0.weight, fpn.lateral_convs.0.bias, " in report


def test_takes_the_class_predictor_only_of_the_same_classes():
    names, report, _ = inherit(["head"], {"id2label": {0: "dog", 1: "cat"}})
    assert "head.box_predictor.weight" in names and not any("cls_predictor" in name for name in names)
    assert "head.cls_predictor.weight" in report


def test_takes_the_class_predictor_of_coco_s_old_names():
    names, _, _ = inherit(["head"], {"id2label": {0: "cat", 1: "stop_sign"}}, id2label={0: "cat", 1: "stop sign"})
    assert "head.cls_predictor.weight" in names


def test_takes_only_towers_of_another_kind_of_detector():
    """FCOS's and ATSS's box outputs have one shape and two meanings."""
    names, _, _ = inherit(["head"], kinds=("fcos", "atss"))
    assert names and all("tower" in name for name in names)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("retinanet", {"anchor_ratios": [0.25, 1.0, 4.0]}),  # as many anchors of other shapes
        ("atss", {"delta_scales": [1.0, 1.0, 1.0, 1.0]}),
        ("gfl", {"anchor_scale": 4}),
        ("gfl", {"head_blocks": 3}),  # what they look at comes from another block
    ],
)
def test_predictors_are_taken_only_where_their_outputs_mean_the_same(kind, options):
    names, report, _ = inherit(["head"], kinds=(kind, kind), **options)
    assert names and all("tower" in name for name in names)
    assert "head.box_predictor.weight" in report or "head.cls_predictor.weight" in report


def test_extra_convolutions_are_taken_only_if_they_are_applied_to_the_same():
    names, _, student = inherit(
        ["neck"], kinds=("fcos", "fcos"), fpn_relu_before_p7=not tiny_model("fcos").config.fpn_relu_before_p7
    )
    assert names and not any("extra_convs" in name for name in names)
    assert any("extra_convs" in name for name in student.state_dict())


def test_says_it_if_nothing_fits():
    with pytest.raises(ValueError, match=r"of the teacher's head fits this student\. .* head_channels 16 and 32, "):
        inherit(["head"], {"fpn_channels": 16, "head_channels": 16})


def test_a_recipe_inherits_before_it_trains(tmp_path, capsys):
    trainer = build_trainer(load_recipe(write_tiny_recipe(tmp_path), ["model.inherit=[neck, head]"]))
    own, given = trainer.model.state_dict(), trainer.teacher.state_dict()
    assert all(torch.equal(own[name], given[name]) for name in own if name.startswith(("fpn.", "head.")))
    assert "inherited from the teacher: neck" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher=null", "distillation=null"], "model.inherit needs a teacher to inherit from"),
        (["model.checkpoint=runs/x"], "model.inherit and model.checkpoint both say where"),
        (["model.inherit=[backbone]"], "must be one of neck, head"),
    ],
)
def test_impossible_recipes(overrides, message):
    with pytest.raises(RecipeError) as error:
        load_recipe("gfl_r50_crosskd_pkd_inherit", overrides)
    assert message in str(error.value)
