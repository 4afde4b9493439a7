"""timm models as backbones: maps, frozen parts, BatchNorm, strides of the caffe style, refusals."""

import pytest
import timm
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


@pytest.fixture(scope="module")
def swin() -> Backbone:
    return backbone(SWIN, frozen_stages=0).eval()


# Maps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(64, 96), (65, 97), (33, 31), (1, 1)])
def test_maps_have_strides_8_16_32_rounded_up(height, width):
    model = backbone().eval()
    features = model(torch.randn(2, 3, height, width))
    assert model.channels == [128, 256, 512]
    for feature, channels, stride in zip(features, model.channels, (8, 16, 32), strict=True):
        assert feature.shape == (2, channels, -(-height // stride), -(-width // stride))


@pytest.mark.parametrize(
    ("name", "channels"), [("convnext_atto", [80, 160, 320]), ("mobilenetv3_small_050", [16, 24, 288])]
)
def test_other_families(name, channels):
    model = backbone(name, frozen_stages=0).eval()
    assert model.channels == channels
    assert [tuple(x.shape) for x in model(torch.randn(1, 3, 64, 96))] == [
        (1, c, 64 // s, 96 // s) for c, s in zip(channels, (8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize(("height", "width"), [(64, 96), (65, 97)])
def test_swin_gives_normalised_maps_with_channels_first(swin, height, width):
    model = swin
    assert model.channels == [192, 384, 768]
    with torch.no_grad():
        features = model(torch.randn(2, 3, height, width))
    for feature, channels, stride in zip(features, model.channels, (8, 16, 32), strict=True):
        assert feature.shape == (2, channels, -(-height // stride), -(-width // stride))
        assert feature.is_contiguous()
        # A fresh LayerNorm: zero mean and unit deviation over the channels of each cell.
        torch.testing.assert_close(feature.mean(dim=1), torch.zeros_like(feature[:, 0]), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            feature.std(dim=1, unbiased=False), torch.ones_like(feature[:, 0]), atol=1e-2, rtol=0
        )


def test_swin_does_not_mix_the_images_of_a_batch(swin):
    images = torch.randn(2, 3, 40, 72)
    with torch.no_grad():
        both, alone = swin(images), swin(images[1:])
    for x, y in zip(both, alone, strict=True):
        torch.testing.assert_close(x[1:], y, atol=1e-4, rtol=1e-4)


def test_maps_are_timms_own():
    model = backbone(backbone_style="pytorch").eval()
    images = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(x, y) for x, y in zip(model(images), model.body(images)[-3:], strict=True))


def test_drop_path_rate_is_given_to_the_model(swin):
    rates = [
        module.drop_prob for module in backbone(SWIN, drop_path_rate=0.2).modules() if hasattr(module, "drop_prob")
    ]
    assert max(rates) == pytest.approx(0.2)
    assert not any(getattr(module, "drop_prob", 0) for module in swin.modules()), "timm's own rate is 0.1"


# Frozen parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet26"])
@pytest.mark.parametrize("stages", [-1, 0, 1, 2, 3, 4])
def test_frozen_stages_of_a_resnet(stages, name):
    model = backbone(name, frozen_stages=stages)
    stem = {"conv1", "bn1"} if stages > 0 else set()
    assert frozen(model) == stem | {f"layer{i}" for i in range(1, stages + 1)}


@pytest.mark.parametrize(
    ("name", "stages", "expected"),
    [
        ("convnext_atto", 0, set()),
        ("convnext_atto", 1, {"stem_0", "stem_1", "stages_0"}),
        ("convnext_atto", 2, {"stem_0", "stem_1", "stages_0", "stages_1"}),
        ("regnetx_002", 1, {"stem", "s1"}),
        (SWIN, 2, {"patch_embed", "layers_0", "layers_1"}),
    ],
)
def test_frozen_stages_of_other_families(name, stages, expected):
    assert frozen(backbone(name, frozen_stages=stages)) == expected


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientnet_lite0"])
def test_frozen_stages_leave_the_later_blocks_of_an_efficientnet(name):
    model = backbone(name, frozen_stages=1)
    ends = {info["reduction"]: int(info["module"].split(".")[1]) for info in model.body.feature_info.info[1:]}
    for number, block in enumerate(model.body.blocks):
        assert {p.requires_grad for p in block.parameters()} == {number > ends[4]}, number


def test_frozen_parameters_get_no_gradient_and_the_others_do():
    model = backbone(frozen_stages=2).train()
    sum(feature.square().mean() for feature in model(torch.randn(2, 3, 64, 64))).backward()
    for name, parameter in model.body.named_parameters():
        assert (parameter.grad is None) == name.startswith(("conv1", "bn1", "layer1", "layer2")), name


@pytest.mark.parametrize("stages", [0, 1])
def test_batchnorm_is_trained_only_from_the_first_free_stage_on(stages):
    model = backbone(frozen_stages=stages)
    for name, parameter in model.body.named_parameters():
        assert parameter.requires_grad != (stages == 1 and name.startswith(("conv1", "bn1", "layer1"))), name


@pytest.mark.parametrize("stages", [0, 1])
def test_no_batchnorm_parameter_is_trained_if_so_configured(stages):
    model = backbone("resnet26", frozen_stages=stages, train_batchnorm=False)
    norms = {id(p) for norm in batchnorms(model.body) for p in norm.parameters()}
    assert norms
    for name, parameter in model.body.named_parameters():
        free = id(parameter) not in norms and not (stages and name.startswith(("conv1", "layer1")))
        assert parameter.requires_grad == free, name


def test_stages_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"frozen_stages is 5, but backbone 'resnet18' has no stage of stride 64"):
        backbone(frozen_stages=5)


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


def test_batchnorm_learns_statistics_if_so_configured():
    model = backbone(freeze_batchnorm_statistics=False, frozen_stages=0).train()
    assert all(norm.training for norm in batchnorms(model.body))
    model(torch.randn(2, 3, 64, 64) + 3)
    assert model.body.bn1.running_mean.abs().max() > 0
    assert not any(norm.training for norm in batchnorms(model.eval().body))


def test_batchnorm_of_frozen_stages_learns_no_statistics():
    body = backbone(freeze_batchnorm_statistics=False, frozen_stages=1).train().body
    assert not any(norm.training for part in (body.bn1, body.layer1) for norm in batchnorms(part))
    assert all(norm.training for norm in batchnorms(body.layer2))


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


def test_caffe_changes_values_but_not_shapes():
    models = [backbone("resnet26", backbone_style=style).eval() for style in ("pytorch", "caffe")]
    for norm in batchnorms(models[0].body):
        nn.init.ones_(norm.weight)  # timm starts each block's last one at 0, which would hide the convolutions
    models[1].load_state_dict(models[0].state_dict())
    images = torch.randn(1, 3, 65, 97)
    with torch.no_grad():
        first, second = (model(images) for model in models)
    for x, y in zip(first, second, strict=True):
        assert x.shape == y.shape and not torch.allclose(x, y)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_caffe_needs_bottlenecks(name):
    with pytest.raises(ValueError, match=rf"'caffe' needs a bottleneck ResNet such as resnet50, not '{name}'"):
        backbone(name, backbone_style="caffe")


# Refusals -----------------------------------------------------------------------------------------------------------


def test_unknown_name_is_refused_with_close_ones():
    with pytest.raises(ValueError, match=r"backbone 'resnet999' is no timm model\. Close names: .*resne"):
        backbone("resnet999")
    with pytest.raises(ValueError, match="Close names: none"):
        backbone("qqqqqqq")


def test_model_without_the_strides_is_refused():
    with pytest.raises(ValueError, match=r"strides \[8, 32\] are missing"):
        backbone("vit_tiny_patch16_224")


def test_model_without_feature_maps_is_refused():
    with pytest.raises(ValueError, match=r"'mixer_s16_224' (can't be used|has maps)"):
        backbone("mixer_s16_224")


def test_drop_path_rate_of_a_model_that_has_none_is_refused():
    with pytest.raises(ValueError, match=r"backbone 'vgg11' can't be used: .*drop_path_rate 0\.2"):
        backbone("vgg11", drop_path_rate=0.2)


def test_a_tag_of_weights_is_part_of_the_name(monkeypatch):
    asked = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: asked.append(name) or create(name, **options))
    assert backbone("resnet18.tv_in1k").channels == [128, 256, 512]
    assert asked == ["resnet18.tv_in1k"]
