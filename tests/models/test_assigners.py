"""Assignments by hand, on both sides of every edge, and against slow loops that follow the papers line by line."""

import math
from collections.abc import Callable

import pytest
import torch

from crosskd_hf.models import assigners
from crosskd_hf.models.anchors import (
    cell_centers,
    grid_cells,
    octave_anchors,
    per_prior,
    square_anchors,
    valid_cells,
)
from crosskd_hf.models.assigners import Assignment, gather_boxes, max_iou_assign, point_assign

CPU = torch.device("cpu")
SIZES, STRIDES = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)], [8, 16, 32, 64, 128]
PRIORS = 320 + 80 + 20 + 6 + 2

# Five anchors in the box (0, 0, 8, 8) of area 64, so that an anchor's IoU is its area / 64. Their IoUs
# .75 .75 .25 .25 .5 have mean .5 and unbiased deviation sqrt(4 * .25^2 / 4) = .25, all exact in binary: the threshold
# is the .75 of the first two. Every centre lies at least 2 pixels inside.
BOX = [0.0, 0.0, 8.0, 8.0]
FIVE = [[0, 0, 8, 6], [0, 2, 8, 8], [0, 0, 4, 4], [4, 4, 8, 8], [0, 0, 8, 4]]


def padded(boxes: list[list]) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes (1, G, 4) and mask (1, G) of one image, followed by a box that is padding."""
    truth = torch.tensor([*boxes, BOX], dtype=torch.float32)[None]
    return truth, torch.arange(len(boxes) + 1)[None] < len(boxes)


def atss(levels: list, boxes: list[list], valid: list[bool] | None = None, topk: int = 9) -> Assignment:
    """One image, one level (a list of boxes) or several (a list of lists of boxes)."""
    levels = levels if isinstance(levels[0][0], list) else [levels]
    anchors = torch.tensor([anchor for level in levels for anchor in level], dtype=torch.float32)
    mask = torch.tensor([valid or [True] * len(anchors)])
    return assigners.atss_assign(anchors, [len(level) for level in levels], mask, *padded(boxes), topk)


def max_iou(anchors: list[list], boxes: list[list], valid: list[bool] | None = None) -> Assignment:
    mask = torch.tensor([valid or [True] * len(anchors)])
    return max_iou_assign(torch.tensor(anchors, dtype=torch.float32), mask, *padded(boxes), 0.5, 0.4)


def points(xy: list[list], boxes: list[list], lower: float = -1.0, upper: float = 64.0) -> Assignment:
    limits = torch.full((len(xy),), lower), torch.full((len(xy),), upper)
    return point_assign(torch.tensor(xy, dtype=torch.float32), *limits, *padded(boxes))


def matches(assignment: Assignment, image: int = 0) -> dict[int, int]:
    """Prior -> box of the positive ones."""
    return {p: int(assignment.box_index[image, p]) for p in assignment.positive[image].nonzero().flatten().tolist()}


def test_gathers_each_priors_box():
    boxes = torch.arange(16.0).reshape(2, 2, 4)
    index = torch.tensor([[1, 0, 1], [0, 0, 1]])
    assert gather_boxes(boxes, index)[0, :, 0].tolist() == [4, 0, 4]
    assert gather_boxes(boxes, index)[1, :, 3].tolist() == [11, 11, 15]


# ATSS ---------------------------------------------------------------------------------------------------------------

TIGHT, CORNER = [3.5, 3.5, 4.5, 4.5], [2, 2, 8, 8]  # centres (4, 4) and (5, 5); IoU with BOX 1/64 and 36/64
LOWER, HIGHER, AS_HIGH = [0, 0, 8, 5], [0, 0, 8, 6], [0, 2, 8, 8]  # IoU with BOX 40/64, 48/64, 48/64


@pytest.mark.parametrize(
    ("anchors", "boxes", "topk", "expected"),
    [
        # The threshold, mean plus unbiased deviation: exactly reached; then with the last IoU .515625, mean .503125,
        # std .250098, threshold .75322, out of reach; then with .484375, threshold .74697.
        (FIVE, [BOX], 9, {0: 0, 1: 0}),
        ([*FIVE[:4], [0, 0, 8, 4.125]], [BOX], 9, {}),
        ([*FIVE[:4], [0, 0, 8, 3.875]], [BOX], 9, {0: 0, 1: 0}),
        # IoUs 1 and b: threshold b + (1 - b) * (1/2 + 1/sqrt(2)) > 1. The biased deviation would give 1.
        ([BOX, [0, 0, 2, 2]], [BOX], 9, {}),
        # A single candidate has no deviation: its threshold is its IoU, 1/64.
        ([TIGHT], [BOX], 9, {0: 0}),
        # The nearest centres per level: the nearer anchor is the only candidate; in two levels both are.
        ([TIGHT, CORNER], [BOX], 1, {0: 0}),
        ([CORNER, TIGHT], [BOX], 1, {1: 0}),
        ([[TIGHT], [CORNER]], [BOX], 1, {}),
        # By Euclidean distance: centres (7, 7) and (4, 9) from (4, 4) are 4.24 and 5 (L1: 6 and 5); (8, 8) is 5.66
        # (largest axis: 4 and 5).
        ([[6, 6, 8, 8], [3, 8, 5, 10]], [[-6, -6, 14, 14]], 1, {0: 0}),
        ([[7, 7, 9, 9], [3, 8, 5, 10]], [[-6, -6, 14, 14]], 1, {1: 0}),
        # An anchor that several boxes claim goes to the highest IoU, the first box on a tie.
        ([BOX], [LOWER, HIGHER, LOWER], 9, {0: 1}),
        ([BOX], [HIGHER, LOWER], 9, {0: 0}),
        ([BOX], [HIGHER, AS_HIGH], 9, {0: 0}),
        ([BOX], [LOWER, AS_HIGH, HIGHER], 9, {0: 1}),
        # The box of the higher IoU, 28/64 against 20/64, doesn't hold the centre: it claims nothing.
        ([BOX], [[2, 2, 7, 6], [0, 0, 8, 3.5]], 9, {0: 0}),
        ([BOX], [[0, 0, 8, 3.5], [2, 2, 7, 6]], 9, {0: 1}),
        (FIVE, [], 9, {}),
    ],
)
def test_atss_by_hand(anchors, boxes, topk, expected):
    assignment = atss(anchors, boxes, topk=topk)
    assert matches(assignment) == expected
    assert (assignment.class_weights == 1).all() and not assignment.box_index[~assignment.positive].any()


@pytest.mark.parametrize("side", range(4))
@pytest.mark.parametrize(("margin", "inside"), [(0.01, False), (0.0101, True), (0.5, True), (-1.0, False)])
def test_atss_centre_is_more_than_a_hundredth_of_a_pixel_inside(side, margin, inside):
    # The anchor's centre is (0, 0); the box reaches 4 pixels to all sides but one. A lone candidate has the IoU.
    box = [-4.0, -4.0, 4.0, 4.0]
    box[side] = -margin if side < 2 else margin
    assert matches(atss([[-4, -4, 4, 4]], [box])) == ({0: 0} if inside else {})


@pytest.mark.parametrize(
    ("valid", "expected"),
    [
        # Without the anchor that equals the box, the candidates are FIVE, over two levels of three anchors. With it:
        # IoUs 1 .75 .75 .25 .25 .5, mean 3.5 / 6, std sqrt(.458333 / 5) = .30277, threshold .8861.
        ([True, True, False, True, True, True], {0: 0, 3: 0}),
        ([True] * 6, {2: 0}),
        ([False, True, False, False, False, False], {1: 0}),
        ([False] * 6, {}),
    ],
)
def test_atss_candidates_are_valid_anchors(valid, expected):
    assignment = atss([[FIVE[0], FIVE[2], BOX], [FIVE[1], FIVE[3], FIVE[4]]], [BOX], valid)
    assert matches(assignment) == expected
    assert assignment.class_weights.tolist() == [[float(v) for v in valid]]


# Highest IoU --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("anchors", "boxes", "expected", "weights"),
    [
        # The last anchor equals the box, so that the others aren't its best. IoUs .5, .4375, .4, .375, 0, 1.
        (
            [[0, 0, 8, 4], [0, 0, 8, 3.5], [0, 0, 8, 3.2], [0, 0, 8, 3], [20, 20, 28, 28], BOX],
            [BOX],
            {0: 0, 5: 0},
            [1, 0, 0, 1, 1, 1],
        ),
        # Every anchor tied at a box's best, .25, is positive though far below .5; with .1875 it is background.
        ([[0, 0, 4, 4], [4, 4, 8, 8], [0, 0, 4, 3]], [BOX], {0: 0, 1: 0}, [1, 1, 1]),
        # The best anchor in the ignored band, .4375, is positive.
        ([[0, 0, 8, 3.5]], [BOX], {0: 0}, [1]),
        # Of boxes whose best is the same anchor, the later one wins, whatever its IoU.
        ([BOX], [BOX, [0, 0, 4, 4]], {0: 1}, [1]),
        ([BOX], [[0, 0, 4, 4], BOX], {0: 1}, [1]),
        ([BOX, [0, 0, 4, 4]], [BOX, [0, 0, 4, 4]], {0: 0, 1: 1}, [1, 1]),
        # Anchor 0 has IoU 48/64 with box 0 and 40/48 with box 1; both boxes have a better anchor.
        ([[0, 0, 8, 6], BOX, [0, 1, 8, 6]], [BOX, [0, 1, 8, 6]], {0: 1, 1: 0, 2: 1}, [1, 1, 1]),
        # A box that overlaps no anchor makes none positive.
        ([[20, 20, 28, 28], [30, 30, 38, 38]], [BOX], {}, [1, 1]),
        ([BOX, BOX], [], {}, [1, 1]),
    ],
)
def test_max_iou_by_hand(anchors, boxes, expected, weights):
    assignment = max_iou(anchors, boxes)
    assert matches(assignment) == expected and assignment.class_weights.tolist() == [weights]


def test_max_iou_invalid_anchors_take_no_part():
    # The anchor that equals the box is invalid: the next best one, IoU .25, becomes the box's best.
    assignment = max_iou([BOX, [0, 0, 4, 4], [0, 0, 4, 3]], [BOX], valid=[False, True, True])
    assert matches(assignment) == {1: 0} and assignment.class_weights.tolist() == [[0, 1, 1]]


# Points -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "low", "middle"),
    [
        # The point is (0, 0). Ranges -1..64 and 64..128 of the farthest side include both ends.
        ([-1, -1, 63.999, 1], True, False),
        ([-1, -1, 64, 1], True, True),
        ([-1, -1, 64.001, 1], False, True),
        ([-1, -1, 128, 1], False, True),
        ([-1, -1, 128.001, 1], False, False),
        ([-100, -1, 1, 1], False, True),
        ([-1, -100, 1, 1], False, True),
        ([-1, -1, 1, 100], False, True),
        # A point on a side is outside.
        ([0, -1, 1, 1], False, False),
        ([-1, 0, 1, 1], False, False),
        ([-1, -1, 0, 1], False, False),
        ([-1, -1, 1, 0], False, False),
        ([-0.001, -0.001, 0.001, 0.001], True, False),
    ],
)
def test_point_in_a_box_of_the_levels_size(box, low, middle):
    assert matches(points([[0, 0]], [box], -1, 64)) == ({0: 0} if low else {})
    assert matches(points([[0, 0]], [box], 64, 128)) == ({0: 0} if middle else {})


SMALL, AS_SMALL = [2, 2, 6, 6], [2, 3, 10, 5]  # of area 16; BOX has 64; all hold (4, 4)


@pytest.mark.parametrize(
    ("boxes", "limits", "expected"),
    [
        ([BOX, SMALL], (-1, 64), {0: 1}),
        ([SMALL, BOX], (-1, 64), {0: 0}),
        ([BOX, AS_SMALL, SMALL], (-1, 64), {0: 1}),
        ([BOX, SMALL, AS_SMALL], (-1, 64), {0: 1}),
        ([SMALL, [-100, 0, 8, 8]], (64, 128), {0: 1}),  # only the second suits the level
        ([], (-1, 64), {}),
    ],
)
def test_point_goes_to_the_smallest_box_the_first_on_a_tie(boxes, limits, expected):
    assignment = points([[4, 4], [400, 4]], boxes, *limits)
    assert matches(assignment) == expected
    assert assignment.class_weights.tolist() == [[1, 1]], "points on padding, too"


# Batches, against slow loops ----------------------------------------------------------------------------------------

RANGES = [(-1, 16), (16, 32), (32, 64), (64, 128), (128, 1e8)]
IMAGE_SIZES = torch.tensor([[128, 160], [70, 130], [128, 60]])


def random_truth(seed: int, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes in an image of 128 x 160 pixels, padded with boxes that would match if they weren't masked out."""
    generator = torch.Generator().manual_seed(seed)
    most = max(counts)
    corner = torch.rand(len(counts), most, 2, generator=generator).double() * torch.tensor([120.0, 90.0])
    size = torch.rand(len(counts), most, 2, generator=generator).double() ** 2 * 110 + 2
    mask = torch.arange(most) < torch.tensor(counts)[:, None]
    return torch.cat([corner, corner + size], dim=-1), mask


def iou(a, b) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / max(union, 1e-6)


def slow_atss(levels: list, valid: list, boxes: list, topk: int = 9) -> tuple[dict[int, int], list[float]]:
    """Algorithm 1 of the paper, one box and one anchor at a time: anchor -> box, and the class weights."""
    anchors = [anchor for level in levels for anchor in level]
    best: dict[int, tuple[float, int]] = {}
    for number, box in enumerate(boxes):
        candidates, start = [], 0
        for level in levels:
            by_distance = []
            for i, anchor in enumerate(level, start):
                dx = (anchor[0] + anchor[2] - box[0] - box[2]) / 2
                dy = (anchor[1] + anchor[3] - box[1] - box[3]) / 2
                if valid[i]:
                    by_distance.append((math.hypot(dx, dy), i))
            candidates += [i for _, i in sorted(by_distance)[:topk]]
            start += len(level)
        ious = [iou(anchors[i], box) for i in candidates]
        mean = sum(ious) / len(ious)
        std = math.sqrt(sum((x - mean) ** 2 for x in ious) / (len(ious) - 1)) if len(ious) > 1 else 0.0
        for i, overlap in zip(candidates, ious, strict=True):
            x, y = (anchors[i][0] + anchors[i][2]) / 2, (anchors[i][1] + anchors[i][3]) / 2
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if overlap >= mean + std and inside and overlap > best.get(i, (-1.0, 0))[0]:
                best[i] = overlap, number
    return {i: number for i, (_, number) in best.items()}, list(map(float, valid))


def slow_max_iou(levels: list, valid: list, boxes: list) -> tuple[dict[int, int], list[float]]:
    anchors = [anchor for level in levels for anchor in level]
    weights, matched = list(map(float, valid)), {}
    overlaps = {i: [iou(anchors[i], box) for box in boxes] for i in range(len(anchors)) if valid[i]}
    for i, values in overlaps.items():
        best = max(values, default=-1.0)
        if best >= 0.5:
            matched[i] = values.index(best)
        elif best >= 0.4:
            weights[i] = 0.0
    for number in range(len(boxes)):
        best = max(values[number] for values in overlaps.values())
        for i, values in overlaps.items():
            if best > 0 and values[number] == best:
                matched[i], weights[i] = number, 1.0
    return matched, weights


def slow_points(levels: list, valid: list, boxes: list) -> tuple[dict[int, int], list[float]]:
    matched = {}
    limited = [(point, limits) for limits, level in zip(RANGES, levels, strict=True) for point in level]
    for p, ((x, y), (lower, upper)) in enumerate(limited):
        suited = []
        for number, (x1, y1, x2, y2) in enumerate(boxes):
            sides = x - x1, y - y1, x2 - x, y2 - y
            if min(sides) > 0 and lower <= max(sides) <= upper:
                suited.append(((x2 - x1) * (y2 - y1), number))
        if suited:
            matched[p] = min(suited)[1]
    return matched, [1.0] * len(valid)


def fast(name: str) -> tuple[list[torch.Tensor], torch.Tensor, Callable]:
    """Priors per level, which are valid in each image, and the assigner."""
    make, anchors = {
        "atss": (lambda *cells: square_anchors(*cells, 8), 1),
        "max_iou": (lambda *cells: octave_anchors(*cells, 4, [0.5, 1.0, 2.0], 2), 6),
        "points": (cell_centers, 1),
    }[name]
    corners, strides = grid_cells(SIZES, STRIDES, CPU)
    level_sizes = [height * width * anchors for height, width in SIZES]
    priors = make(corners, strides).double()
    limits = torch.cat([torch.tensor(r).double().expand(n, 2) for r, n in zip(RANGES, level_sizes, strict=True)])
    assign = {
        "atss": lambda valid, *truth: assigners.atss_assign(priors, level_sizes, valid, *truth),
        "max_iou": lambda valid, *truth: max_iou_assign(priors, valid, *truth, 0.5, 0.4),
        "points": lambda valid, *truth: point_assign(priors, *limits.unbind(1), *truth),
    }[name]
    return list(priors.split(level_sizes)), valid_cells(per_prior(corners, anchors), IMAGE_SIZES, 32), assign


SLOW = {"atss": slow_atss, "max_iou": slow_max_iou, "points": slow_points}


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("seed", range(3))
def test_a_batch_equals_a_slow_loop_wherever_its_padding_is(name, seed):
    counts = [seed * 4, 12, 1]
    boxes, mask = random_truth(seed, counts)
    levels, valid, assign = fast(name)
    assignment = assign(valid, boxes, mask)
    for i, count in enumerate(counts):
        expected, weights = SLOW[name](
            [level.tolist() for level in levels], valid[i].tolist(), boxes[i, :count].tolist()
        )
        assert matches(assignment, i) == expected and assignment.class_weights[i].tolist() == weights
        assert expected or count < 10
    moved = assign(valid, boxes.roll(2, dims=1), mask.roll(2, dims=1))
    assert torch.equal(moved.positive, assignment.positive)
    # Boxes keep their order but for the last two of the second image.
    for i in (0, 2):
        order = (torch.arange(12) - 2) % 12
        assert torch.equal(order[moved.box_index[i]][moved.positive[i]], assignment.box_index[i][moved.positive[i]])


def test_chunks_keep_the_stated_size_and_miss_no_box():
    chunks = assigners.box_chunks((8, 500, 4), 200_000)
    assert all((part.stop - part.start) * 8 * 200_000 <= assigners.MAX_PAIRS for part in chunks)
    assert [i for part in chunks for i in range(part.start, part.stop)] == list(range(500))
    assert assigners.box_chunks((2, 40, 4), 22_000) == [slice(0, 40)], "ordinary batches aren't cut"
    assert len(assigners.box_chunks((2, 3, 4), 10**9)) == 3, "one box at a time at least"


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("pairs", [1, 3 * PRIORS * 6 * 4])
def test_boxes_in_chunks_are_assigned_as_together(name, pairs, monkeypatch):
    boxes, mask = random_truth(5, [3, 11, 6])
    boxes, mask = (torch.cat([values, values[:, :4]], dim=1) for values in (boxes, mask))  # ties between chunks
    _, valid, assign = fast(name)
    together = assign(valid, boxes, mask)
    monkeypatch.setattr(assigners, "MAX_PAIRS", pairs)
    chunked = assign(valid, boxes, mask)
    assert together.positive.any()
    for field in ("positive", "box_index", "class_weights"):
        assert torch.equal(getattr(chunked, field), getattr(together, field))


@pytest.mark.parametrize("name", SLOW)
def test_a_compiled_assigner_is_one_program_for_any_number_of_boxes(name):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    _, valid, assign = fast(name)
    compiled = torch.compile(assign, fullgraph=True, backend="eager")
    for count in (3, 20, 200):
        truth = random_truth(count, [count] * 3)
        for values in truth:
            torch._dynamo.mark_dynamic(values, 1)
        assert torch.equal(compiled(valid, *truth).box_index, assign(valid, *truth).box_index)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
