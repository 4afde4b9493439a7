"""Boxes from a head's numbers and back, by hand."""

import math

import pytest
import torch

from crosskd_hf.models.box_coding import (
    MAX_LOG_RATIO,
    box_centers,
    boxes_to_distances,
    centerness,
    deltas_to_distances,
    distances_to_boxes,
    distances_to_deltas,
    expected_bins,
)

ONES, STDS = (1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2)


def test_distances_are_left_top_right_bottom():
    point, box = torch.tensor([10.0, 20.0]), torch.tensor([9.0, 18.0, 13.0, 24.0])
    assert distances_to_boxes(point, torch.tensor([1.0, 2, 3, 4])).tolist() == box.tolist()
    assert boxes_to_distances(point, box).tolist() == [1, 2, 3, 4]
    # Of a point outside, some are negative.
    assert boxes_to_distances(torch.zeros(2), torch.tensor([2.0, -1, 5, 1])).tolist() == [-2, 1, 5, 1]
    points, boxes = torch.rand(7, 2), torch.rand(3, 7, 4)
    distances = boxes_to_distances(points, boxes)
    assert distances.shape == (3, 7, 4)
    torch.testing.assert_close(distances_to_boxes(points, distances), boxes)


def test_box_centers():
    assert box_centers(torch.tensor([[0.0, 2, 4, 10], [-3, -3, 3, 3]])).tolist() == [[2, 6], [0, 0]]


def test_expected_bins():
    torch.testing.assert_close(expected_bins(torch.full((2, 68), 3.0)), torch.full((2, 4), 8.0))  # uniform: the middle
    logits = torch.full((4, 17), -1e4)  # side-major
    logits[0, 0] = logits[1, 3] = logits[2, 16] = 0  # one bin for certain
    logits[3, 2] = logits[3, 6] = 0  # two bins: 4
    assert expected_bins(logits.flatten()).tolist() == [0, 3, 16, 4]
    # Three bins a side: softmax .2 .3 .5 has expectation .3 + 1.0.
    assert expected_bins(torch.tensor([0.2, 0.3, 0.5]).log().repeat(4)).tolist() == pytest.approx([1.3] * 4)


# Deltas -------------------------------------------------------------------------------------------------------------


def boxes_to_deltas(anchors: torch.Tensor, boxes: torch.Tensor, *stds) -> torch.Tensor:
    centers = box_centers(anchors)
    return distances_to_deltas(*(boxes_to_distances(centers, b) for b in (boxes, anchors)), *stds)


def deltas_to_boxes(anchors: torch.Tensor, deltas: torch.Tensor, *stds) -> torch.Tensor:
    centers = box_centers(anchors)
    return distances_to_boxes(centers, deltas_to_distances(deltas, boxes_to_distances(centers, anchors), *stds))


@pytest.mark.parametrize(
    ("stds", "box", "deltas"),
    [
        # Anchor: centre (5, 10), 10 x 20. Box: centre (15, 5), 20 x 10. One width right, a quarter height up.
        ((), [5.0, 0, 25, 10], [1.0, -0.25, math.log(2), -math.log(2)]),
        ((STDS,), [5.0, 0, 25, 10], [10.0, -2.5, 5 * math.log(2), -5 * math.log(2)]),
        ((), [0.0, 0, 10, 20], [0.0, 0, 0, 0]),
        # The shift is neither clamped nor clipped to an image.
        ((), [-1000.0, 2000, -990, 2020], [-100.0, 100, 0, 0]),
    ],
)
def test_deltas_by_hand(stds, box, deltas):
    anchor = torch.tensor([0.0, 0, 10, 20])
    assert boxes_to_deltas(anchor, torch.tensor(box), *stds).tolist() == pytest.approx(deltas, abs=1e-5)
    assert deltas_to_boxes(anchor, torch.tensor(deltas), *stds).tolist() == pytest.approx(box, abs=1e-5)


@pytest.mark.parametrize("stds", [ONES, STDS])
def test_deltas_invert(stds):
    corners = torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(0)) * 100
    anchors, boxes = torch.cat([corners, corners + 1 + corners.roll(1, 0) * 0.6], dim=-1)
    decoded = deltas_to_boxes(anchors, boxes_to_deltas(anchors, boxes, stds), stds)
    assert (decoded - boxes).abs().max() < 1e-3


@pytest.mark.parametrize("stds", [ONES, STDS])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("log_ratio", "ratio"),
    [(MAX_LOG_RATIO + 1, 62.5), (math.log(62), 62.0), (-math.log(62), 1 / 62), (-100.0, 1 / 62.5)],
)
def test_size_ratio_is_clamped_after_the_stds(log_ratio, ratio, axis, stds):
    deltas = torch.zeros(4)
    deltas[2 + axis] = log_ratio / stds[2 + axis]
    box = deltas_to_boxes(torch.tensor([-5.0, -10, 5, 10]), deltas, stds)
    sizes = (box[2:] - box[:2]).tolist()
    assert sizes[axis] == pytest.approx((10, 20)[axis] * ratio, rel=1e-4)
    assert sizes[1 - axis] == (10, 20)[1 - axis]


def test_clamped_ratio_gets_no_gradient():
    deltas = torch.tensor([0.0, 0.0, 5.0, 1.0], requires_grad=True)
    deltas_to_boxes(torch.tensor([0.0, 0, 10, 10]), deltas)[2:].sum().backward()
    # x2 = 5 + 5 * 62.5 and y2 = 5 + 5 e: d/d(dh) = 5 e.
    assert deltas.grad.tolist() == pytest.approx([10, 10, 0, 5 * math.e])


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ((4.0, 5.0), 1.0),
        ((2.0, 5.0), math.sqrt(2 / 6)),
        ((6.0, 5.0), math.sqrt(2 / 6)),
        ((4.0, 1.0), math.sqrt(1 / 9)),
        ((2.0, 8.0), math.sqrt(2 / 6 * 2 / 8)),
        ((0.0, 5.0), 0.0),  # on a side
        ((-1.0, 5.0), 0.0),  # outside
        ((-1.0, -1.0), 0.0),  # outside in both axes: the product of two negative ratios is no centerness
    ],
)
def test_centerness_by_hand(point, expected):
    distances = boxes_to_distances(torch.tensor(point), torch.tensor([0.0, 0, 8, 10]))
    both = centerness(torch.stack([distances, torch.zeros(4)]))  # that of a point of a box is finite
    assert both.tolist() == pytest.approx([expected, 0])
