"""Every published row against a table that was written by hand from the reference, not from the recipes."""

from typing import NamedTuple

import pytest

from crosskd_hf.recipe.load import load_recipe
from crosskd_hf.recipe.packaged import carried_recipes

QUERY_STUDENTS = ("rtdetrv2_r18", "dfine_s", "dfine_n", "deformable_detr_r18")
# Recipes of no published row. A new recipe must be named here or in TABLE.
NOT_PUBLISHED = {
    "coco_mini",
    "dfine_overfit",
    "gfl_r18_overfit",
    "shapes_crosskd",
    "shapes_teacher",
    "your_data",
    "your_data_dfine",
}
# Other methods in the settings that they are published with; no AP is known here.
NOT_PUBLISHED |= {"gfl_r50_bckd", "gfl_r50_cwd", "gfl_r50_fgd", "gfl_r50_ld", "retinanet_r50_cwd", "retinanet_r50_fgd"}
NOT_PUBLISHED |= {f"{name}{twin}" for name in QUERY_STUDENTS for twin in ("", "_crosskd")}

# How a detector starts: backbone, initial weights, frozen stages, whether BatchNorm is trained, drop path.
R18 = ("resnet18.tv_in1k", "pretrained", 1, True, 0.0)
R50 = ("resnet50.tv_in1k", "pretrained", 1, True, 0.0)
R101 = ("resnet101.tv_in1k", "pretrained", 1, True, 0.0)
SWIN_T = ("swin_tiny_patch4_window7_224.ms_in1k", "pretrained", 0, True, 0.2)
CAFFE = "https://download.openmmlab.com/pretrain/third_party/"
CAFFE_R50 = ("resnet50", f"{CAFFE}resnet50_caffe-788b5fa3.pth", 1, False, 0.0)
CAFFE_R101 = ("resnet101", f"{CAFFE}resnet101_caffe-3ad79236.pth", 1, False, 0.0)

# Published teachers: backbone and file.
ZOO = "https://download.openmmlab.com/mmdetection/v2.0/"
GFL_R101 = (
    "resnet101.tv_in1k",
    f"{ZOO}gfl/gfl_r101_fpn_mstrain_2x_coco/gfl_r101_fpn_mstrain_2x_coco_20200629_200126-dd12f847.pth",
)
GFL_R50 = ("resnet50.tv_in1k", f"{ZOO}gfl/gfl_r50_fpn_1x_coco/gfl_r50_fpn_1x_coco_20200629_121244-25944287.pth")
RETINANET_R101 = (
    "resnet101.tv_in1k",
    f"{ZOO}retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth",
)
RETINANET_R50 = (  # 1x, not 2x
    "resnet50.tv_in1k",
    f"{ZOO}retinanet/retinanet_r50_fpn_1x_coco/retinanet_r50_fpn_1x_coco_20200130-c2398f9e.pth",
)
RETINANET_SWIN_T = ("swin_tiny_patch4_window7_224.ms_in1k", "checkpoints/retinanet_swin-t_1x_coco.pth")  # by hand
FCOS_R101 = (
    "resnet101",
    f"{ZOO}fcos/fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco/"
    "fcos_r101_caffe_fpn_gn-head_mstrain_640-800_2x_coco-511424d6.pth",
)
ATSS_R101 = ("resnet101.tv_in1k", f"{ZOO}atss/atss_r101_fpn_1x_coco/atss_r101_fpn_1x_20200825-dfcadd6f.pth")

# Schedules: epochs, milestones, warm-up's style and first factor (over 500 steps).
ONE_X = (12, [8, 11], "linear", 0.001)
TWO_X = (24, [16, 22], "linear", 0.001)
FCOS_2X = (24, [16, 22], "constant", 1 / 3)

FIXED, GFL_SIDES, FCOS_SIDES = ("none", []), ("range", [480, 800]), ("choice", [640, 800])
EIGHT_TIMES_2, TWICE_8 = (8, 2), (2, 8)  # processes x images, 16 in all


class Row(NamedTuple):
    """What the reference says of a row; `distilled` is k, kd_cls, kd_box, kd_centerness and PKD."""

    detector: str
    start: tuple
    launch: tuple[int, int]
    schedule: tuple
    sides: tuple[str, list[int]] = FIXED
    teacher: tuple[str, str] | None = None
    distilled: tuple = ()


TABLE = {
    "gfl_r101_2x_ms": Row("gfl", R101, EIGHT_TIMES_2, TWO_X, GFL_SIDES),
    "gfl_r50_1x": Row("gfl", R50, EIGHT_TIMES_2, ONE_X),
    "gfl_r50_crosskd": Row("gfl", R50, EIGHT_TIMES_2, ONE_X, FIXED, GFL_R101, (3, 1, 4, None, 0)),
    "gfl_r50_crosskd_pkd": Row("gfl", R50, EIGHT_TIMES_2, ONE_X, FIXED, GFL_R101, (3, 1, 4, None, 6)),
    "gfl_r50_crosskd_pkd_inherit": Row("gfl", R50, EIGHT_TIMES_2, ONE_X, FIXED, GFL_R101, (3, 1, 4, None, 6)),
    "gfl_r18_crosskd": Row("gfl", R18, EIGHT_TIMES_2, ONE_X, FIXED, GFL_R50, (3, 1, 4, None, 0)),
    "retinanet_r101_2x": Row("retinanet", R101, EIGHT_TIMES_2, TWO_X),
    "retinanet_r50_2x": Row("retinanet", R50, EIGHT_TIMES_2, TWO_X),
    "retinanet_r50_1x": Row("retinanet", R50, EIGHT_TIMES_2, ONE_X),
    "retinanet_swint_1x": Row("retinanet", SWIN_T, EIGHT_TIMES_2, ONE_X),
    "retinanet_r50_crosskd": Row("retinanet", R50, EIGHT_TIMES_2, TWO_X, FIXED, RETINANET_R101, (3, 1, 1, None, 0)),
    "retinanet_r50_crosskd_pkd": Row(
        "retinanet", R50, EIGHT_TIMES_2, TWO_X, FIXED, RETINANET_R101, (3, 1, 1, None, 2)
    ),
    "retinanet_r18_crosskd": Row("retinanet", R18, EIGHT_TIMES_2, ONE_X, FIXED, RETINANET_R50, (3, 1, 1, None, 0)),
    "retinanet_r50_swint_crosskd": Row(
        "retinanet", R50, EIGHT_TIMES_2, ONE_X, FIXED, RETINANET_SWIN_T, (3, 1, 1, None, 0)
    ),
    "fcos_r101_2x_ms": Row("fcos", CAFFE_R101, EIGHT_TIMES_2, FCOS_2X, FCOS_SIDES),
    "fcos_r50_2x_ms": Row("fcos", CAFFE_R50, EIGHT_TIMES_2, FCOS_2X, FCOS_SIDES),
    "fcos_r50_crosskd": Row("fcos", CAFFE_R50, EIGHT_TIMES_2, FCOS_2X, FCOS_SIDES, FCOS_R101, (2, 0.4, 0.75, None, 0)),
    "fcos_r50_crosskd_pkd": Row(
        "fcos", CAFFE_R50, EIGHT_TIMES_2, FCOS_2X, FCOS_SIDES, FCOS_R101, (2, 0.4, 0.75, None, 2)
    ),
    "atss_r101_1x": Row("atss", R101, TWICE_8, ONE_X),
    "atss_r50_1x": Row("atss", R50, TWICE_8, ONE_X),
    "atss_r50_crosskd": Row("atss", R50, TWICE_8, ONE_X, FIXED, ATSS_R101, (3, 1, 1, 1, 0)),
    "atss_r50_crosskd_pkd": Row("atss", R50, TWICE_8, ONE_X, FIXED, ATSS_R101, (3, 1, 1, 1, 1)),
}


def test_every_recipe_is_in_the_table_or_named_as_another() -> None:
    assert set(carried_recipes()) == set(TABLE) | NOT_PUBLISHED
    assert not set(TABLE) & NOT_PUBLISHED


@pytest.mark.parametrize("name", TABLE)
def test_a_row_is_the_references(name: str) -> None:
    row, recipe = TABLE[name], load_recipe(name)
    model, data, training = recipe.model, recipe.data, recipe.training_values()
    style = "caffe" if row.detector == "fcos" else "pytorch"
    assert (recipe.teacher is None) == (row.teacher is None)
    start = model.backbone, model.backbone_weights, model.frozen_stages, model.train_batchnorm, model.drop_path_rate
    assert start == row.start and model.checkpoint is None
    # A RetinaNet alone, or as a teacher, makes P6 from C5; all others from P5.
    retinanet_source = "on_input" if row.detector == "retinanet" else "on_output"
    assert model.fpn_extra_convs == (retinanet_source if row.teacher is None else "on_output")
    assert (model.fpn_channels, model.head_channels, model.head_blocks) == (256, 256, 4)
    assert model.fpn_relu_before_p7 == (row.detector == "fcos")
    assert (model.detector, model.backbone_style, model.freeze_batchnorm_statistics) == (row.detector, style, True)
    assert model.inherit == (["neck", "head"] if name.endswith("_inherit") else [])

    processes, images = row.launch
    assert training["per_device_train_batch_size"] == images and training["gradient_accumulation_steps"] == 1
    assert training["base_batch_size"] == processes * images == 16
    launch = f"accelerate launch --multi_gpu --num_processes {processes} train.py recipes/{name}.yaml\n"
    assert launch in carried_recipes()[name].read_text(encoding="utf-8")

    epochs, milestones, warmup, factor = row.schedule
    assert (training["num_train_epochs"], training["lr_milestones"]) == (epochs, milestones)
    assert (training["warmup_steps"], training["warmup_style"]) == (500, warmup)
    assert training["warmup_start_factor"] == pytest.approx(factor, rel=1e-12)
    rate = {"optim": "sgd", "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 1e-4, "lr_gamma": 0.1}
    fcos = {"bias_lr_factor": 2, "bias_weight_decay": False, "max_grad_norm": 35}
    other = {"bias_lr_factor": 1, "bias_weight_decay": True, "max_grad_norm": 0}
    for key, value in (rate | (fcos if row.detector == "fcos" else other)).items():
        assert training[key] == value, key

    assert (data.multiscale, data.multiscale_short_sides) == row.sides
    assert (data.short_side, data.long_side, data.flip_probability) == (800, 1333, 0.5)
    assert (data.filter_empty, data.min_image_side, training["group_by_orientation"]) == (True, 32, True)


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.teacher])
def test_a_row_has_the_references_teacher_and_weights(name: str) -> None:
    row, recipe = TABLE[name], load_recipe(name)
    teacher, methods = recipe.teacher, recipe.distillation.methods
    terms, pkd = methods["crosskd"], methods["pkd"].weight if "pkd" in methods else 0
    assert (teacher.backbone, teacher.checkpoint, teacher.detector) == (*row.teacher, row.detector)
    assert teacher.backbone_style == recipe.model.backbone_style
    assert teacher.fpn_extra_convs == ("on_input" if row.detector == "retinanet" else "on_output")
    assert teacher.fpn_relu_before_p7 == (row.detector == "fcos")
    assert (teacher.fpn_channels, teacher.head_channels, teacher.head_blocks) == (256, 256, 4)
    weights = terms.tap_index, terms.cls_weight, terms.box_weight, terms.centerness_weight, pkd
    assert weights == row.distilled
    assert set(methods) <= {"crosskd", "pkd"}
    assert (terms.weight, terms.tap, terms.student_tap_index) == (1, "rectified", None)
