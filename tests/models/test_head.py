"""The head: towers, taps, resumed forwards, scales, errors."""

import math

import pytest
import torch
from torch.nn import functional as F

from crosskd_hf.models import CONFIGS, MODELS
from crosskd_hf.models.head import DenseHead, HeadOutput, HeadSpec, flatten_levels, num_groups

pytestmark = pytest.mark.usefixtures("one_thread")

GFL = {"box_channels": 20}
RETINANET = {"num_anchors": 3, "group_norm": False, "scale_boxes": False}
FCOS = {"exp_boxes": True, "centerness_from": "cls"}
ATSS = {"centerness_from": "reg"}
SHAPES = [(6, 5), (3, 3), (1, 1)]
SPEC = {
    "num_labels": 2,
    "in_channels": 8,
    "channels": 8,
    "num_blocks": 3,
    "num_levels": 3,
    "num_anchors": 1,
    "box_channels": 4,
    "group_norm": True,
    "scale_boxes": True,
}


def head_of(**options) -> DenseHead:
    """A head whose weights keep activations near unit scale, and whose scales differ."""
    torch.manual_seed(0)
    head = DenseHead(HeadSpec(**SPEC | options))
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name.startswith("scales"):
                parameter.fill_(0.5 + int(name.split(".")[1]))
            else:
                parameter.copy_(torch.randn(parameter.shape) * (0.2 if parameter.dim() > 1 else 0.5))
    return head.eval()


def maps(seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 8, *shape, generator=generator) for shape in SHAPES]


def same(a: list[torch.Tensor] | None, b: list[torch.Tensor] | None) -> bool:
    return (a is None) == (b is None) and all(map(torch.equal, a or [], b or []))


def assert_same(a: HeadOutput, b: HeadOutput) -> None:
    assert same(a.logits, b.logits) and same(a.boxes, b.boxes) and same(a.centerness, b.centerness)


@pytest.mark.parametrize("detector", ["gfl", "retinanet", "fcos", "atss"])
def test_each_detectors_head(detector):
    config = CONFIGS[detector](num_labels=7, fpn_channels=16, head_channels=64, head_blocks=2)
    made = MODELS[detector].head_spec(config)
    assert (made.num_labels, made.in_channels, made.channels, made.num_blocks, made.num_levels) == (7, 16, 64, 2, 5)
    assert (made.num_anchors, made.box_channels) == {"gfl": (1, 68), "retinanet": (9, 4)}.get(detector, (1, 4))
    assert made.group_norm is made.scale_boxes is (detector != "retinanet")
    assert made.exp_boxes is (detector == "fcos")
    assert made.centerness_from == {"fcos": "cls", "atss": "reg"}.get(detector)


def test_blocks_have_a_norm_or_a_bias():
    head = head_of(in_channels=4)
    assert [block.conv.in_channels for block in head.cls_tower] == [4, 8, 8]
    assert all(block.conv.bias is None and isinstance(block.norm, torch.nn.GroupNorm) for block in head.reg_tower)
    assert all(block.norm.eps == 1e-5 for block in head.cls_tower)
    plain = head_of(**RETINANET)
    assert all(block.conv.bias is not None for block in plain.cls_tower)
    assert not any(isinstance(module, torch.nn.GroupNorm) for module in plain.modules())


@pytest.mark.parametrize(("channels", "groups"), [(256, 32), (96, 32), (32, 16), (48, 16), (2, 1), (1, 1), (7, 1)])
def test_groups_hold_at_least_two_channels(channels, groups):
    assert num_groups(channels) == groups and channels % groups == 0


# Predictions by hand ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, (1.0, 3.0, 5.0)), (FCOS, (math.exp(1), math.exp(3), math.exp(5))), (RETINANET, (2.0, 2.0, 2.0))],
)
def test_scales_and_exponential_of_boxes(options, expected):
    # The convolution gives 2; the scales are .5, 1.5, 2.5; the exponential comes after them.
    head = head_of(**options)
    with torch.no_grad():
        head.box_predictor.weight.zero_()
        head.box_predictor.bias.fill_(2.0)
    for level, value in zip(head(maps()).boxes, expected, strict=True):
        torch.testing.assert_close(level, torch.full_like(level, value))


def test_exponential_is_in_single_precision():
    head = head_of(**FCOS).to(torch.bfloat16)
    output = head([level.to(torch.bfloat16) for level in maps()])
    assert output.boxes[0].dtype == torch.float32 and output.logits[0].dtype == torch.bfloat16


@pytest.mark.parametrize("source", ["cls", "reg"])
def test_centerness_comes_from_its_tower(source):
    head = head_of(centerness_from=source)
    first = head(maps(), maps(seed=2))
    other_cls, other_reg = head(maps(seed=3), maps(seed=2)), head(maps(), maps(seed=3))
    assert torch.equal(first.centerness[0], other_cls.centerness[0]) is (source == "reg")
    assert torch.equal(first.centerness[0], other_reg.centerness[0]) is (source == "cls")
    # The towers share nothing else.
    assert torch.equal(first.boxes[0], other_cls.boxes[0]) and not torch.equal(first.logits[0], other_cls.logits[0])
    assert torch.equal(first.logits[0], other_reg.logits[0]) and not torch.equal(first.boxes[0], other_reg.boxes[0])
    assert_same(head(maps()), head(maps(), maps()))


def test_flattens_by_level_row_column_anchor():
    # Channel a * 2 + c of cell (y, x) holds 100 y + 10 x + (a, c): two anchors of two numbers each.
    def level(height, width, offset):
        y, x, channel = torch.meshgrid(torch.arange(height), torch.arange(width), torch.arange(4), indexing="ij")
        return (offset + 100 * y + 10 * x + channel).permute(2, 0, 1)[None]

    flat = flatten_levels([level(2, 2, 0), level(1, 1, 1000)], 2)
    first_of_cells = torch.tensor([0, 10, 100, 110, 1000])
    assert torch.equal(flat, (first_of_cells[:, None] + torch.arange(4)).reshape(1, 10, 2))


# Taps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [GFL, RETINANET, FCOS, ATSS])
@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_a_forward_split_at_any_block_gives_the_same_predictions(k, options):
    head = head_of(**options)
    complete, untapped = head(maps(), maps(seed=2), tap_index=k), head(maps(), maps(seed=2))
    assert_same(head(complete.cls_taps, complete.reg_taps, start_block=k), untapped)
    assert untapped.cls_taps is untapped.reg_taps is None


@pytest.mark.parametrize("options", [GFL, RETINANET])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_taps_are_the_blocks_outputs(k, options):
    head = head_of(**options)
    rectified = head(maps(), maps(seed=2), tap_index=k)
    raw = head(maps(), maps(seed=2), tap_index=k, raw_taps=True)
    assert_same(raw, rectified)
    for tower, seed, after_relu, before_relu in (
        (head.cls_tower, 1, rectified.cls_taps, raw.cls_taps),
        (head.reg_tower, 2, rectified.reg_taps, raw.reg_taps),
    ):
        for feature, after, before in zip(maps(seed), after_relu, before_relu, strict=True):
            expected = feature
            for block in list(tower)[:k]:
                feature = block.norm(block.conv(expected))
                expected = F.relu(feature)
            assert torch.equal(after, expected) and torch.equal(before, feature)


def test_starting_after_the_last_block_leaves_the_prediction_convolutions():
    head = head_of(**ATSS)
    cls, reg = maps(), maps(seed=2)
    output = head(cls, reg, start_block=3)
    for i in range(3):
        assert torch.equal(output.logits[i], head.cls_predictor(cls[i]))
        assert torch.equal(output.boxes[i], head.scales(head.box_predictor(reg[i]), i))
        assert torch.equal(output.centerness[i], head.centerness_predictor(reg[i]))


def test_tapping_a_resumed_forward():
    head = head_of()
    complete, part = head(maps(), tap_index=3), head(maps(), tap_index=1)
    resumed = head(part.cls_taps, part.reg_taps, start_block=1, tap_index=3)
    assert same(resumed.reg_taps, complete.reg_taps)
    unmoved = head(part.cls_taps, part.reg_taps, start_block=1, tap_index=1)
    assert same(unmoved.cls_taps, part.cls_taps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_block": -1}, "start_block is -1, but the head has 3 blocks"),
        ({"start_block": 4}, "start_block is 4, but the head has 3 blocks"),
        ({"tap_index": 4}, "tap_index is 4, but the head has 3 blocks"),
        ({"start_block": 2, "tap_index": 1}, "tap_index 1 lies before start_block 2"),
    ],
)
def test_blocks_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        head_of()(maps(), **options)
