"""Priors and their validity by hand."""

import math

import pytest
import torch
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from crosskd_hf.models.anchors import (
    cell_centers,
    grid_cells,
    octave_anchors,
    per_prior,
    square_anchors,
    valid_cells,
)
from crosskd_hf.models.head import HeadOutput

CPU = torch.device("cpu")


def levels(make, sizes, strides, *options) -> list[torch.Tensor]:
    """Priors made of all cells together, split into levels."""
    made = make(*grid_cells(sizes, strides, CPU), *options)
    cells = [height * width for height, width in sizes]
    return list(made.split([count * len(made) // sum(cells) for count in cells]))


def test_grid_runs_along_rows_and_gives_x_first():
    corners, strides = grid_cells([(2, 3), (1, 2)], [8, 16], CPU)
    assert corners.tolist() == [[0, 0], [8, 0], [16, 0], [0, 8], [8, 8], [16, 8], [0, 0], [16, 0]]
    assert strides.tolist() == [[8]] * 6 + [[16]] * 2
    assert corners.dtype == strides.dtype == torch.float32


def test_square_anchors_are_centred_on_the_cells_corner():
    first, second = levels(square_anchors, [(2, 2), (1, 2)], [8, 16], 8)
    assert first.tolist() == [[-32, -32, 32, 32], [-24, -32, 40, 32], [-32, -24, 32, 40], [-24, -24, 40, 40]]
    assert second.tolist() == [[-64, -64, 64, 64], [-48, -64, 80, 64]]


def test_points_are_in_the_cells_middle():
    first, second = levels(cell_centers, [(1, 2), (2, 1)], [8, 16])
    assert first.tolist() == [[4, 4], [12, 4]]
    assert second.tolist() == [[8, 8], [8, 24]]


def test_octave_anchors_order_ratios_outside_and_scales_inside():
    (anchors,) = levels(octave_anchors, [(1, 1)], [8], 4, [0.5, 1.0, 2.0], 3)
    size = anchors[:, 2:] - anchors[:, :2]
    # 32 pixels, ratio = height / width: 32 * sqrt(2) wide and 32 / sqrt(2) high at ratio .5.
    expected = [
        [32 * scale / math.sqrt(ratio), 32 * scale * math.sqrt(ratio)]
        for ratio in (0.5, 1, 2)
        for scale in (1, 2 ** (1 / 3), 2 ** (2 / 3))
    ]
    torch.testing.assert_close(size, torch.tensor(expected))
    assert size[0].tolist() == pytest.approx([45.2548, 22.6274], abs=1e-4)  # not rounded
    torch.testing.assert_close((anchors[:, :2] + anchors[:, 2:]).abs(), torch.zeros(9, 2), atol=1e-5, rtol=0)


def test_octave_anchors_of_a_cell_are_neighbours():
    first, second = levels(octave_anchors, [(2, 2), (1, 1)], [8, 16], 4, [1.0], 2)
    centers = (first[:, :2] + first[:, 2:]) / 2
    expected = torch.tensor([[0.0, 0], [0, 0], [8, 0], [8, 0], [0, 8], [0, 8], [8, 8], [8, 8]])
    torch.testing.assert_close(centers, expected)
    assert first[0].tolist() == [-16, -16, 16, 16]
    assert second[0].tolist() == [-32, -32, 32, 32]


class Operators(TorchDispatchMode):
    """The names of what runs."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("detector", "most"), [("gfl", 55), ("fcos", 55), ("retinanet", 80)])
def test_priors_of_any_size_take_few_operators_and_no_copy_to_the_device(detector, most):
    model = tiny_model(detector, head_blocks=1)
    for side in (32, 40, 33):
        logits = [torch.empty(1, 1, side // 2**i, side) for i in range(5)]
        with Operators() as found:
            priors = model.priors(HeadOutput(logits, boxes=[]))
        assert len(found.names) <= most, len(found.names)
        # What torch.tensor() of a list is, before it is copied to its device.
        assert not [name for name in found.names if "lift_fresh" in name or "_to_copy" in name]
        assert len(priors.all) == len(priors.corners) == sum(priors.level_sizes)


# Validity -----------------------------------------------------------------------------------------------------------

SIZES, STRIDES = [(40, 40), (20, 20), (10, 10), (5, 5), (3, 3)], [8, 16, 32, 64, 128]  # an input of 320 x 320 pixels


def valid_rectangles(*image_size: int, sizes=SIZES, divisor: int = 32) -> list[tuple[int, int]]:
    """Valid rows and columns of each level, which must be rectangles at the top left."""
    corners, _ = grid_cells(sizes, STRIDES[: len(sizes)], CPU)
    # Beside another image, all of whose cells are valid.
    both = torch.tensor([[400, 400], image_size])
    other, mask = valid_cells(corners, both, divisor)
    assert other.all()
    rectangles = []
    for level, size in zip(mask.split([h * w for h, w in sizes]), sizes, strict=True):
        level = level.reshape(size)
        rows, columns = level.any(dim=1).sum().item(), level.any(dim=0).sum().item()
        assert level[:rows, :columns].all() and level.sum() == rows * columns
        rectangles.append((rows, columns))
    return rectangles


def test_image_size_is_rounded_up_before_cells_are_counted():
    # 200 x 260 -> 224 x 288: 28 x 36 cells of 8, ..., 224 / 64 = 3.5 -> 4, 288 / 64 = 4.5 -> 5, 1.75 -> 2, 2.25 -> 3.
    assert valid_rectangles(200, 260) == [(28, 36), (14, 18), (7, 9), (4, 5), (2, 3)]
    assert valid_rectangles(1, 1, sizes=[(1, 1)] * 5) == [(1, 1)] * 5
    # 33 / 8 -> 5 rows, 41 / 8 -> 6 columns.
    assert valid_rectangles(33, 41, sizes=[(10, 10)], divisor=1) == [(5, 6)]


@pytest.mark.parametrize(("side", "cells"), [(1, 4), (31, 4), (32, 4), (33, 8), (224, 28), (225, 32), (320, 40)])
def test_rounding_on_both_sides(side, cells):
    assert valid_rectangles(side, 320)[0] == (cells, 40)
    assert valid_rectangles(320, side)[0] == (40, cells)


def test_all_anchors_of_a_cell_share_its_values():
    corners, _ = grid_cells([(2, 3)], [8], CPU)
    nine = per_prior(corners, 9)
    assert nine.shape == (54, 2) and torch.equal(nine.reshape(6, 9, 2), corners[:, None].expand(-1, 9, -1))
