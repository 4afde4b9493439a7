"""The pyramid with weights set by hand: every level is a constant that can be computed in the head."""

import pytest
import torch

from crosskd_hf.models.configuration import DenseDetectorConfig
from crosskd_hf.models.fpn import FPN


def fpn(channels: tuple[int, ...] = (1, 1, 1), **options) -> FPN:
    """One output channel. Laterals add up their input channels, and every 3x3 convolution copies its centre."""
    pyramid = FPN(DenseDetectorConfig(fpn_channels=1, **options), list(channels))
    with torch.no_grad():
        for parameter in pyramid.parameters():
            parameter.zero_()
        for conv in pyramid.lateral_convs:
            conv.weight.fill_(1)
        for conv in (*pyramid.output_convs, *pyramid.extra_convs):
            conv.weight[:, :, 1, 1] = 1
    return pyramid


def constants(c3: float = 1, c4: float = 10, c5: float = 100, sizes=((8, 12), (4, 6), (2, 3))) -> list[torch.Tensor]:
    return [torch.full((1, 1, *size), float(value)) for value, size in zip((c3, c4, c5), sizes, strict=True)]


def values(levels: list[torch.Tensor]) -> list[float]:
    assert all(level.min() == level.max() for level in levels)
    return [level.flatten()[0].item() for level in levels]


def test_sums_from_the_top_down():
    features = constants()
    levels = fpn()(features)
    assert values(levels) == [111, 110, 100, 100, 100]
    assert [tuple(level.shape[2:]) for level in levels] == [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    assert values(features) == [1, 10, 100], "inputs stay as they are"
    assert values(fpn(strides=[8, 16, 32])(features)) == [111, 110, 100]
    assert len(fpn(strides=[8, 16, 32, 64, 128, 256])(features)) == 6


@pytest.mark.parametrize(("where", "extra"), [("on_output", 7200), ("on_input", 100)])
def test_output_convolutions_come_after_the_sum_and_extra_levels_start_from_p5_or_c5(where, extra):
    pyramid = fpn(fpn_extra_convs=where)
    with torch.no_grad():
        pyramid.lateral_convs[2].weight.fill_(2)
        pyramid.output_convs[2].bias.fill_(7000)
        pyramid.output_convs[1].bias.fill_(700)
    # P5 = 2 * 100 + 7000; P4 = 200 + 10 + 700 and P3 don't see the biases above them.
    assert values(pyramid(constants())) == [211, 910, 7200, extra, extra]


def test_extra_convolutions_take_c5s_channels_only_on_input():
    widths = (2, 3, 4)
    features = [torch.ones(1, c, *size) for c, size in zip(widths, ((8, 8), (4, 4), (2, 2)), strict=True)]
    assert [conv.in_channels for conv in fpn(widths, fpn_extra_convs="on_output").extra_convs] == [1, 1]
    # C3 + C4 + C5 = 2 + 3 + 4; P6 of C5 adds up its four channels.
    assert values(fpn(widths, fpn_extra_convs="on_input")(features)) == [9, 7, 4, 4, 4]


@pytest.mark.parametrize(("relu", "p7"), [(False, -94), (True, 6)])
@pytest.mark.parametrize("where", ["on_output", "on_input"])
def test_relu_before_p7_only(relu, p7, where):
    # P6 = -100 stays negative itself; P7 = P6 + 6 or relu(P6) + 6.
    pyramid = fpn(fpn_relu_before_p7=relu, fpn_extra_convs=where)
    with torch.no_grad():
        pyramid.extra_convs[1].bias.fill_(6)
    assert values(pyramid(constants(c5=-100)))[2:] == [-100, -100, p7]


def test_extra_convolutions_have_stride_two_and_padding_one():
    # P5 is a 4 x 4 ramp; a 3x3 kernel of ones centred on (0, 0), (0, 2), (2, 0), (2, 2).
    pyramid = fpn()
    with torch.no_grad():
        pyramid.extra_convs[0].weight.fill_(1)
    features = constants(0, 0, 0, ((16, 16), (8, 8), (4, 4)))
    features[2] = torch.arange(16.0).reshape(1, 1, 4, 4)
    p6 = pyramid(features)[3]
    # (0,0): 0+1+4+5; (0,2): 1+2+3+5+6+7; (2,0): 4+5+8+9+12+13; (2,2): 5+6+7+9+10+11+13+14+15.
    assert p6.flatten().tolist() == [10, 24, 51, 90]


def test_upsampling_is_nearest_also_between_odd_sizes():
    features = constants(0, 0, 0, ((5, 5), (3, 3), (2, 2)))
    features[2] = torch.tensor([[[[1.0, 2], [3, 4]]]])
    p3, p4 = fpn()(features)[:2]
    # Row i of 3 takes floor(2 i / 3) = 0 0 1; row i of 5 takes floor(3 i / 5) = 0 0 1 1 2 of those.
    assert p4[0, 0].tolist() == [[1, 1, 2], [1, 1, 2], [3, 3, 4]]
    assert p3[0, 0].tolist() == [[1, 1, 1, 1, 2]] * 4 + [[3, 3, 3, 3, 4]]
