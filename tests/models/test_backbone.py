"""timm models as backbones: maps, frozen parts, BatchNorm, strides of the caffe style, refusals."""

import pytest
import torch
from torch import nn

from crosskd_hf.models.backbone import Backbone, batchnorms
from crosskd_hf.models.configuration import DenseDetectorConfig

pytestmark = pytest.mark.usefixtures("one_thread")

SWIN = "swin_tiny_patch4_window7_224"


def backbone(name: str = "resnet18", **options) -> Backbone:
    torch.manual_seed(0)
    return Backbone(DenseDetectorConfig(backbone=name, **options))


def frozen(model: Backbone) -> set[str]:
    """Top-level parts of which every parameter is frozen; a part that is frozen in parts is an error."""
    parts: dict[str, list[bool]] = {}
    for name, parameter in model.body.named_parameters():
        parts.setdefault(name.split(".")[0], []).append(parameter.requires_grad)
    assert all(len(set(flags)) == 1 for flags in parts.values())
    return {part for part, flags in parts.items() if not flags[0]}


# Maps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18.tv_in1k", [128, 256, 512]),
        ("convnext_atto", [80, 160, 320]),
        ("mobilenetv3_small_050", [16, 24, 288]),
        (SWIN, [192, 384, 768]),
    ],
)
def test_maps_have_strides_8_16_32_rounded_up(name, channels):
    model = backbone(name, frozen_stages=0).eval()
    assert model.channels == channels
    height, width = (64, 96) if name == "convnext_atto" else (65, 97)  # its patches leave the rest out
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        features, alone = model(images), model(images[1:])
    for feature, one, depth, stride in zip(features, alone, channels, (8, 16, 32), strict=True):
        assert feature.shape == (2, depth, -(-height // stride), -(-width // stride))
        torch.testing.assert_close(feature[1:], one, atol=1e-4, rtol=1e-4)  # images don't mix
        if name == SWIN:  # a fresh LayerNorm: zero mean and unit deviation over the channels of each cell
            assert feature.is_contiguous()
            assert feature.mean(dim=1).abs().max() < 1e-4
            assert (feature.std(dim=1, unbiased=False) - 1).abs().max() < 1e-2


def test_maps_are_timms_own():
    model = backbone().eval()
    for images in (torch.randn(1, 3, 64, 64), torch.randn(1, 3, 1, 1)):
        assert all(torch.equal(x, y) for x, y in zip(model(images), model.body(images)[-3:], strict=True))


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_drop_path_rate_is_given_to_the_model(rate):
    """timm's own rate is 0.1."""
    model = backbone(SWIN, drop_path_rate=rate)
    assert max(getattr(module, "drop_prob", 0) for module in model.modules()) == pytest.approx(rate)


# Frozen parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stages", "expected"),
    [
        ("resnet18", -1, set()),
        ("resnet18", 0, set()),
        ("resnet18", 1, {"conv1", "bn1", "layer1"}),
        ("resnet18", 2, {"conv1", "bn1", "layer1", "layer2"}),
        ("resnet18", 4, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}),
        ("convnext_atto", 2, {"stem_0", "stem_1", "stages_0", "stages_1"}),
        ("regnetx_002", 1, {"stem", "s1"}),
        (SWIN, 2, {"patch_embed", "layers_0", "layers_1"}),
    ],
)
def test_frozen_stages(name, stages, expected):
    assert frozen(backbone(name, frozen_stages=stages)) == expected


def test_frozen_stages_leave_the_later_blocks_of_an_efficientnet():
    model = backbone("mobilenetv3_small_050", frozen_stages=1)
    ends = {info["reduction"]: int(info["module"].split(".")[1]) for info in model.body.feature_info.info[1:]}
    for number, block in enumerate(model.body.blocks):
        assert {p.requires_grad for p in block.parameters()} == {number > ends[4]}, number


@pytest.mark.parametrize("stages", [0, 1])
def test_no_batchnorm_parameter_is_trained_if_so_configured(stages):
    model = backbone("resnet26", frozen_stages=stages, train_batchnorm=False)
    norms = {id(p) for norm in batchnorms(model.body) for p in norm.parameters()}
    assert norms
    for name, parameter in model.body.named_parameters():
        free = id(parameter) not in norms and not (stages and name.startswith(("conv1", "layer1")))
        assert parameter.requires_grad == free, name


# BatchNorm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_batchnorm_stays_in_eval_mode_while_training(name):
    model = backbone(name, frozen_stages=0)
    norms = list(batchnorms(model.body))
    expected = [m for m in model.modules() if hasattr(m, "running_mean")]  # timm's fused norms too
    assert norms and {id(m) for m in norms} == {id(m) for m in expected}
    holder = nn.Sequential(model)  # as a detector calls it
    assert holder.train() is holder and model.training and model.body.training
    assert not any(norm.training for norm in norms)
    before = [norm.running_mean.clone() for norm in norms]
    model(torch.randn(2, 3, 64, 64) + 3)
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    holder.eval()
    assert not model.training


def test_batchnorm_learns_statistics_if_so_configured_but_not_in_frozen_stages():
    model = backbone(freeze_batchnorm_statistics=False, frozen_stages=1).train()
    assert not any(norm.training for part in (model.body.bn1, model.body.layer1) for norm in batchnorms(part))
    assert all(norm.training for norm in batchnorms(model.body.layer2))
    model(torch.randn(2, 3, 64, 64) + 3)
    assert model.body.layer2[0].bn1.running_mean.abs().max() > 0
    assert not any(norm.training for norm in batchnorms(model.eval().body))


# Caffe style --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("style", "first", "second"), [("pytorch", (1, 1), (2, 2)), ("caffe", (2, 2), (1, 1))])
def test_caffe_puts_the_stride_on_the_first_convolution(style, first, second):
    body = backbone("resnet26", backbone_style=style).body
    for stage in ("layer2", "layer3", "layer4"):
        block = getattr(body, stage)[0]
        assert (block.conv1.stride, block.conv2.stride, block.conv3.stride) == (first, second, (1, 1))
        assert block.downsample[0].stride == (2, 2)
        others = getattr(body, stage)[1:]
        assert all(conv.stride == (1, 1) for block in others for conv in (block.conv1, block.conv2))
    assert body.layer1[0].conv1.stride == body.layer1[0].conv2.stride == (1, 1)
    assert body.conv1.stride == (2, 2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "resnet18",
            {"backbone_style": "caffe"},
            r"'caffe' needs a bottleneck .*resnet50, not 'resnet18'",
        ),
        ("convnext_atto", {"backbone_style": "caffe"}, "'caffe' needs a bottleneck ResNet"),
        ("resnet18", {"frozen_stages": 5}, "frozen_stages is 5, but backbone 'resnet18' has no stage of stride 64"),
        ("resnet999", {}, r"backbone 'resnet999' is no timm model\. Close names: .*resne"),
        ("qqqqqqq", {}, "Close names: none"),
        ("vit_tiny_patch16_224", {}, r"strides \[8, 32\] are missing"),
        ("mixer_s16_224", {}, r"'mixer_s16_224' (can't be used|has maps)"),
        ("vgg11", {"drop_path_rate": 0.2}, r"backbone 'vgg11' can't be used: .*drop_path_rate 0\.2"),
    ],
)
def test_refusals(name, options, message):
    with pytest.raises(ValueError, match=message):
        backbone(name, **options)
