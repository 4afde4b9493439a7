"""Box formats by hand, and data sets that claim the wrong one."""

import numpy as np
import pytest

from crosskd_hf.data.box_formats import check_format, is_finite, misfits, note_box, to_xywh
from crosskd_hf.data.errors import DataError, Kind, Problems

SIZE = np.array([[200.0, 100.0]])


@pytest.mark.parametrize(
    ("box", "box_format", "unit"),
    [
        ([20, 30, 40, 10], "xywh", "pixel"),
        ([20, 30, 60, 40], "xyxy", "pixel"),
        ([40, 35, 40, 10], "cxcywh", "pixel"),
        ([0.1, 0.3, 0.2, 0.1], "xywh", "relative"),
        ([0.1, 0.3, 0.3, 0.4], "xyxy", "relative"),
        ([0.2, 0.35, 0.2, 0.1], "cxcywh", "relative"),
    ],
)
def test_every_format_is_the_same_box(box, box_format, unit):
    np.testing.assert_allclose(to_xywh([box], SIZE, box_format, unit), [[20, 30, 40, 10]], atol=1e-9)


@pytest.mark.parametrize(
    ("box", "wrong"),
    [
        ([0, 0, 200, 100], False),
        ([-4, -2, 200, 100], False),  # within 2% of the side
        ([-4.1, 0, 50, 50], True),
        ([160, 0, 44, 50], False),
        ([160, 0, 44.1, 50], True),
        ([5, 5, 1, 1], False),
        ([5, 5, 0.9, 9], True),
    ],
)
def test_boxes_that_nobody_draws(box, wrong):
    assert misfits(np.array([box], dtype=float), SIZE).tolist() == [wrong]


def random_boxes(count=60):
    rng = np.random.default_rng(0)
    sides = rng.uniform(10, 60, (count, 2))
    corner = rng.uniform(0, 1, (count, 2)) * (SIZE - sides)
    return np.concatenate([corner, sides], axis=1), np.repeat(SIZE, count, axis=0)


def test_the_right_format_is_named():
    xywh, sizes = random_boxes()
    xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    check_format(xywh, sizes, "xywh", "pixel", "here")
    check_format(xyxy, sizes, "xyxy", "pixel", "here")
    with pytest.raises(DataError, match=r"here: \d+ of 60 boxes .*data.box_format=xyxy data.box_unit=pixel"):
        check_format(xyxy, sizes, "xywh", "pixel", "here")
    with pytest.raises(DataError, match=r"data.box_format=xywh data.box_unit=pixel"):
        check_format(xywh, sizes, "xyxy", "pixel", "here")
    with pytest.raises(DataError, match=r"data.box_unit=relative"):
        check_format(xywh / np.tile(SIZE, 2), sizes, "xywh", "pixel", "here")
    with pytest.raises(DataError, match=r"data.box_unit=pixel"):
        check_format(xywh, sizes, "xywh", "relative", "here")


def test_small_boxes_of_another_format_are_told_by_those_at_the_edge():
    rng = np.random.default_rng(1)
    sides = rng.uniform(6, 14, (2000, 2))  # about 7% of the image; a few percent reach over the edge as xywh
    sizes = np.full((2000, 2), 150.0)
    centre = sides / 2 + rng.uniform(0, 1, (2000, 2)) * (sizes - sides)
    with pytest.raises(DataError, match=r"data.box_format=cxcywh"):
        check_format(np.concatenate([centre, sides], axis=1), sizes, "xywh", "pixel", "here")


def test_a_few_bad_boxes_are_no_other_format():
    xywh, sizes = random_boxes()
    xywh[:3, 2] = 0  # 5%
    check_format(xywh, sizes, "xywh", "pixel", "here")
    check_format(np.array([[150.0, 50, 180, 60]]), SIZE, "xywh", "pixel", "one box is not enough to tell")


@pytest.mark.parametrize(
    ("box", "usable", "kind"),
    [
        ([0, 0, 200, 100], True, None),
        ([-1, 0, 20, 20], True, None),
        ([-1.5, 0, 20, 20], True, Kind.BOX_EDGE),
        ([200, 0, 5, 5], True, Kind.BOX_OUTSIDE),
        ([10, 10, 0.5, 5], True, Kind.BOX_EMPTY),
        ([10, 10, 1, 1], True, None),
        ([10, 10, -1, 5], False, Kind.BOX_NEGATIVE),
    ],
)
def test_one_box(box, usable, kind):
    problems = Problems()
    assert note_box(box, 200, 100, "annotation 7", problems) is usable
    assert list(problems.counts) == ([] if kind is None else [kind])
    assert kind is None or kind.stops is not usable


@pytest.mark.parametrize(
    ("value", "finite"),
    [(1, True), (-1e9, True), (1.001e9, False), (10**400, False), (float("nan"), False), (True, False), ("1", False)],
)
def test_numbers_that_are_finite(value, finite):
    assert is_finite(value) is finite
