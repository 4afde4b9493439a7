"""Assignments by hand, on both sides of every edge, and against slow loops that follow the papers line by line."""

import math

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
from crosskd_hf.models.assigners import Assignment, gather_boxes, gather_labels, max_iou_assign, point_assign

CPU = torch.device("cpu")
SIZES, STRIDES = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)], [8, 16, 32, 64, 128]
PRIORS = 320 + 80 + 20 + 6 + 2

# Five anchors in the box (0, 0, 8, 8) of area 64, so that an anchor's IoU is its area / 64. Their IoUs
# .75 .75 .25 .25 .5 have mean .5 and unbiased deviation sqrt(4 * .25^2 / 4) = .25, all exact in binary: the threshold
# is the .75 of the first two. Every centre lies at least 2 pixels inside.
BOX = [0.0, 0.0, 8.0, 8.0]
FIVE = [[0, 0, 8, 6], [0, 2, 8, 8], [0, 0, 4, 4], [4, 4, 8, 8], [0, 0, 8, 4]]


def atss_assign(levels: list[torch.Tensor], *rest, **options) -> Assignment:
    return assigners.atss_assign(torch.cat(levels), [len(level) for level in levels], *rest, **options)


def valid_anchors(image_sizes: torch.Tensor, num_anchors: int = 1) -> torch.Tensor:
    return valid_cells(per_prior(grid_cells(SIZES, STRIDES, CPU)[0], num_anchors), image_sizes, 32)


def atss(anchors: list[list], boxes: list[list], valid=None, topk: int = 9) -> Assignment:
    """One image, one level (a list of boxes) or several (a list of lists of boxes)."""
    levels = anchors if isinstance(anchors[0][0], list) else [anchors]
    tensors = [torch.tensor(level, dtype=torch.float32) for level in levels]
    count = sum(len(level) for level in levels)
    valid = torch.ones(1, count, dtype=torch.bool) if valid is None else torch.tensor([valid])
    truth = torch.tensor(boxes, dtype=torch.float32).reshape(1, -1, 4)
    return atss_assign(tensors, valid, truth, torch.ones(1, truth.shape[1], dtype=torch.bool), topk)


def positives(assignment: Assignment, image: int = 0) -> list[int]:
    return assignment.positive[image].nonzero().flatten().tolist()


def assert_same(a: Assignment, b: Assignment) -> None:
    assert torch.equal(a.positive, b.positive)
    assert torch.equal(a.box_index, b.box_index)
    assert torch.equal(a.class_weights, b.class_weights)


def random_truth(seed: int, counts: list[int], dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes in an image of 128 x 160 pixels, padded with boxes that would match if they weren't masked out."""
    generator = torch.Generator().manual_seed(seed)
    most = max(counts)
    corner = torch.rand(len(counts), most, 2, generator=generator, dtype=dtype) * torch.tensor([120.0, 90.0])
    size = torch.rand(len(counts), most, 2, generator=generator, dtype=dtype) ** 2 * 110 + 2
    mask = torch.arange(most) < torch.tensor(counts)[:, None]
    return torch.cat([corner, corner + size], dim=-1), mask


def iou(a, b) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / max(union, 1e-6)


# Gathering ----------------------------------------------------------------------------------------------------------


def test_gathers_each_priors_box_and_label():
    boxes = torch.arange(16.0).reshape(2, 2, 4)
    index = torch.tensor([[1, 0, 1], [0, 0, 1]])
    assert gather_boxes(boxes, index)[0, :, 0].tolist() == [4, 0, 4]
    assert gather_boxes(boxes, index)[1, :, 3].tolist() == [11, 11, 15]
    assert gather_labels(torch.tensor([[7, 8], [9, 5]]), index).tolist() == [[8, 7, 8], [9, 9, 5]]


def test_gathers_zeros_where_no_image_has_a_box():
    index = torch.zeros(2, 3, dtype=torch.long)
    assert torch.equal(gather_boxes(torch.zeros(2, 0, 4), index), torch.zeros(2, 3, 4))
    assert torch.equal(gather_labels(torch.zeros(2, 0, dtype=torch.long), index), index)


# ATSS: threshold ----------------------------------------------------------------------------------------------------


def test_atss_iou_exactly_at_mean_plus_std_is_positive():
    assignment = atss(FIVE, [BOX])
    assert positives(assignment) == [0, 1]
    assert assignment.box_index.tolist() == [[0, 0, 0, 0, 0]]
    assert assignment.class_weights.tolist() == [[1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("height", "expected"),
    [
        # IoU .515625 instead of .5: mean .503125, std sqrt(.2501953 / 4) = .250098, threshold .75322: out of reach.
        (4.125, []),
        # IoU .484375: mean .496875, the same std, threshold .74697: both .75 reach it.
        (3.875, [0, 1]),
    ],
)
def test_atss_iou_just_below_and_above_the_threshold(height, expected):
    assert positives(atss([*FIVE[:4], [0, 0, 8, height]], [BOX])) == expected


def test_atss_deviation_is_unbiased():
    # IoUs 1 and 1/16, 1/16, 1/16: b = 1/16, d = 15/16, n = 4: threshold b + d * (1/n + 1/sqrt(n)) = b + .75 d < 1.
    corners = [[0, 0, 2, 2], [6, 6, 8, 8], [0, 6, 2, 8]]
    assert positives(atss([BOX, *corners], [BOX])) == [0]
    # Two different IoUs: threshold b + d * (1/2 + 1/sqrt(2)) = b + 1.207 d > b + d; the biased one is b + d.
    assert positives(atss([BOX, corners[0]], [BOX])) == []


def test_atss_single_candidate_has_no_deviation_and_is_positive():
    # Its threshold is its own IoU, 1/64.
    assert positives(atss([[3, 3, 4, 4]], [BOX])) == [0]


def test_atss_single_valid_candidate_among_many_anchors():
    assert positives(atss(FIVE, [BOX], valid=[False, False, True, False, False])) == [2]


# ATSS: centre -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", range(4))
@pytest.mark.parametrize(
    ("margin", "inside"), [(0.01, False), (0.0101, True), (0.5, True), (0.0, False), (-1.0, False)]
)
def test_atss_centre_is_more_than_a_hundredth_of_a_pixel_inside(side, margin, inside):
    # The anchor's centre is (0, 0); the box reaches 4 pixels to all sides but one. A lone candidate has the IoU.
    box = [-4.0, -4.0, 4.0, 4.0]
    box[side] = -margin if side < 2 else margin
    assert positives(atss([[-4, -4, 4, 4]], [box])) == ([0] if inside else [])


# ATSS: candidates ---------------------------------------------------------------------------------------------------


def test_atss_takes_the_nearest_centres_of_each_level():
    # The box's centre is (4, 4). One candidate a level: the anchor with IoU 1/64 beats the one with IoU 36/64, whose
    # centre (5, 5) is farther, and is then the only candidate.
    near, far = [3.5, 3.5, 4.5, 4.5], [2, 2, 8, 8]
    assert positives(atss([near, far], [BOX], topk=1)) == [0]
    assert positives(atss([far, near], [BOX], topk=1)) == [1]
    # In a level of their own both are candidates; two different IoUs then have none at the threshold (see above).
    assert positives(atss([[near], [far]], [BOX], topk=1)) == []


def test_atss_distance_is_euclidean():
    # Centres (7, 7) and (4, 9) seen from (4, 4): L2 4.24 and 5, L1 6 and 5, largest axis 3 and 5.
    box = [-6.0, -6.0, 14.0, 14.0]
    assert positives(atss([[6, 6, 8, 8], [3, 8, 5, 10]], [box], topk=1)) == [0]
    # Centres (8, 8) and (4, 9): L2 5.66 and 5, largest axis 4 and 5.
    assert positives(atss([[7, 7, 9, 9], [3, 8, 5, 10]], [box], topk=1)) == [1]


def test_atss_level_with_fewer_valid_anchors_than_topk():
    # Image 0 can't use the anchor that equals the box: its candidates are FIVE, over two levels of 3 anchors.
    # Image 1 can: IoUs 1 .75 .75 .25 .25 .5, mean 3.5 / 6, std sqrt(.458333 / 5) = .30277, threshold .8861.
    levels = [torch.tensor([FIVE[0], FIVE[2], BOX]), torch.tensor([FIVE[1], FIVE[3], FIVE[4]], dtype=torch.float32)]
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, 2] = False
    boxes = torch.tensor([[BOX], [BOX]])
    assignment = atss_assign(levels, valid, boxes, torch.ones(2, 1, dtype=torch.bool))
    assert positives(assignment, 0) == [0, 3]
    assert positives(assignment, 1) == [2]
    assert assignment.class_weights.tolist() == [[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]


def test_atss_invalid_anchors_are_never_positive():
    boxes, mask = random_truth(3, [8, 8])
    valid = torch.rand(2, PRIORS, generator=torch.Generator().manual_seed(0)) < 0.5
    assignment = atss_assign(grid(square_anchors, 8), valid, boxes, mask)
    assert assignment.positive.any(dim=1).all()
    assert not (assignment.positive & ~valid).any()
    assert torch.equal(assignment.class_weights, valid.double())


def test_atss_without_any_valid_anchor_assigns_nothing():
    assignment = atss(FIVE, [BOX], valid=[False] * 5)
    assert positives(assignment) == [] and assignment.class_weights.sum() == 0


# ATSS: conflicts ----------------------------------------------------------------------------------------------------


def test_atss_anchor_claimed_by_two_boxes_goes_to_the_highest_iou():
    anchor, lower, higher = [0, 0, 8, 8], [0, 0, 8, 5], [0, 0, 8, 6]  # IoU 40/64 and 48/64; centre (4, 4) in both
    assert atss([anchor], [lower, higher]).box_index.tolist() == [[1]]
    assert atss([anchor], [higher, lower]).box_index.tolist() == [[0]]
    assert atss([anchor], [lower, higher, lower]).box_index.tolist() == [[1]]


def test_atss_anchor_with_equal_ious_goes_to_the_first_box():
    top, bottom, worse = [0, 0, 8, 6], [0, 2, 8, 8], [0, 0, 8, 5]  # IoU 48/64 twice, 40/64
    assert atss([[0, 0, 8, 8]], [top, bottom]).box_index.tolist() == [[0]]
    assert atss([[0, 0, 8, 8]], [bottom, top]).box_index.tolist() == [[0]]
    assert atss([[0, 0, 8, 8]], [worse, bottom, top]).box_index.tolist() == [[1]]


def test_atss_box_that_only_comes_near_does_not_take_the_anchor():
    # The second box has the higher IoU (28/64 against 20/64) but doesn't hold the centre: it is no claim.
    anchor = [0, 0, 8, 8]
    assert atss([anchor], [[2, 2, 7, 6], [0, 0, 8, 3.5]]).box_index.tolist() == [[0]]
    assert atss([anchor], [[0, 0, 8, 3.5], [2, 2, 7, 6]]).box_index.tolist() == [[1]]


# ATSS: batches ------------------------------------------------------------------------------------------------------


def grid(make, *options: float) -> list[torch.Tensor]:
    cells = [height * width for height, width in SIZES]
    return list(make(*grid_cells(SIZES, STRIDES, CPU), *options).double().split(cells))


def test_atss_without_boxes():
    valid = torch.tensor([[True, False, True, True, True]] * 2)
    anchors = [torch.tensor(FIVE, dtype=torch.float32)]
    assignment = atss_assign(anchors, valid, torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool))
    assert not assignment.positive.any() and assignment.positive.shape == (2, 5)
    assert assignment.box_index.dtype == torch.long and not assignment.box_index.any()
    assert torch.equal(assignment.class_weights, valid.float())


def test_atss_image_without_boxes_beside_one_with_boxes():
    anchors = [torch.tensor(FIVE, dtype=torch.float32)]
    boxes = torch.tensor([[[0.0, 0, 0, 0]], [BOX]])
    assignment = atss_assign(anchors, torch.ones(2, 5, dtype=torch.bool), boxes, torch.tensor([[False], [True]]))
    assert positives(assignment, 0) == [] and positives(assignment, 1) == [0, 1]


def test_atss_batch_equals_its_images():
    counts = [5, 0, 12, 1]
    boxes, mask = random_truth(11, counts)
    anchors = grid(square_anchors, 8)
    sizes = torch.tensor([[128, 160], [60, 160], [90, 100], [128, 33]])
    valid = valid_anchors(sizes)
    batch = atss_assign(anchors, valid, boxes, mask)
    for i, count in enumerate(counts):
        alone = atss_assign(anchors, valid[i : i + 1], boxes[i : i + 1, :count], mask[i : i + 1, :count])
        assert torch.equal(batch.positive[i], alone.positive[0])
        assert torch.equal(batch.box_index[i], alone.box_index[0])
        assert torch.equal(batch.class_weights[i], alone.class_weights[0])


def test_atss_place_of_padding_is_irrelevant():
    boxes, mask = random_truth(5, [4, 7])
    anchors, valid = grid(square_anchors, 8), torch.ones(2, PRIORS, dtype=torch.bool)
    order = torch.tensor([6, 0, 5, 1, 4, 2, 3])  # of image 0: the box numbers 4, 5, 6 are padding
    first = atss_assign(anchors, valid, boxes, mask)
    second = atss_assign(anchors, valid, boxes[:, order], mask[:, order])
    assert torch.equal(first.positive, second.positive)
    assert torch.equal(first.box_index[first.positive], order[second.box_index[first.positive]])


def slow_atss(levels: list, valid: list, boxes: list, topk: int) -> dict[int, int]:
    """Algorithm 1 of the paper, one box and one anchor at a time: anchor -> box."""
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
        if not ious:
            continue
        mean = sum(ious) / len(ious)
        std = math.sqrt(sum((x - mean) ** 2 for x in ious) / (len(ious) - 1)) if len(ious) > 1 else 0.0
        for i, overlap in zip(candidates, ious, strict=True):
            x, y = (anchors[i][0] + anchors[i][2]) / 2, (anchors[i][1] + anchors[i][3]) / 2
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if overlap >= mean + std and inside and overlap > best.get(i, (-1.0, 0))[0]:
                best[i] = overlap, number
    return {i: number for i, (_, number) in best.items()}


@pytest.mark.parametrize("seed", range(6))
def test_atss_equals_a_slow_loop(seed):
    counts = [seed * 3, 10, 1]
    boxes, mask = random_truth(seed, counts)
    sizes = torch.tensor([[128, 160], [70, 130], [128, 60]])
    anchors, valid = grid(square_anchors, 8), valid_anchors(sizes)
    topk = (9, 9, 3)[seed % 3]
    assignment = atss_assign(anchors, valid, boxes, mask, topk)
    levels = [level.tolist() for level in anchors]
    for i, count in enumerate(counts):
        expected = slow_atss(levels, valid[i].tolist(), boxes[i, :count].tolist(), topk)
        assert {p: int(assignment.box_index[i, p]) for p in positives(assignment, i)} == expected
        assert expected or count < 10


def test_chunks_keep_the_stated_size_and_miss_no_box():
    chunks = assigners.box_chunks((8, 500, 4), 200_000)
    assert all((part.stop - part.start) * 8 * 200_000 <= assigners.MAX_PAIRS for part in chunks)
    assert [i for part in chunks for i in range(part.start, part.stop)] == list(range(500))
    assert assigners.box_chunks((2, 40, 4), 22_000) == [slice(0, 40)], "ordinary batches aren't cut"
    assert len(assigners.box_chunks((2, 3, 4), 10**9)) == 3, "one box at a time at least"


@pytest.mark.parametrize("pairs", [1, 2 * PRIORS * 9, 2 * PRIORS * 9 * 4])
def test_boxes_in_chunks_are_assigned_as_together(pairs, monkeypatch):
    boxes, mask = random_truth(5, [3, 11])
    boxes = torch.cat([boxes, boxes[:, :4]], dim=1)  # ties between chunks
    mask = torch.cat([mask, mask[:, :4]], dim=1)
    valid = valid_anchors(torch.tensor([[128, 160], [60, 160]]))
    anchors = grid(square_anchors, 8)
    octaves = octave_anchors(*grid_cells(SIZES, STRIDES, CPU), 4, [0.5, 1.0, 2.0], 3).double()
    points = cell_centers(*grid_cells(SIZES, STRIDES, CPU)).double()
    lower, upper = torch.zeros(PRIORS).double(), torch.full((PRIORS,), 80.0).double()

    def assignments() -> list[Assignment]:
        return [
            atss_assign(anchors, valid, boxes, mask),
            max_iou_assign(octaves, valid.repeat_interleave(9, dim=1), boxes, mask, 0.5, 0.4),
            point_assign(points, lower, upper, boxes, mask),
        ]

    together = assignments()
    monkeypatch.setattr(assigners, "MAX_PAIRS", pairs)
    for chunked, whole in zip(assignments(), together, strict=True):
        assert whole.positive.any()
        assert_same(chunked, whole)


# Highest IoU --------------------------------------------------------------------------------------------------------


def max_iou(anchors: list[list], boxes: list[list], valid=None) -> Assignment:
    valid = torch.ones(1, len(anchors), dtype=torch.bool) if valid is None else torch.tensor([valid])
    truth = torch.tensor(boxes, dtype=torch.float32).reshape(1, -1, 4)
    mask = torch.ones(1, truth.shape[1], dtype=torch.bool)
    return max_iou_assign(torch.tensor(anchors, dtype=torch.float32), valid, truth, mask, 0.5, 0.4)


def test_max_iou_thresholds_on_both_sides():
    # The last anchor equals the box, so that the others aren't its best. IoUs .5, .4375, .4, .375, 0, 1.
    anchors = [[0, 0, 8, 4], [0, 0, 8, 3.5], [0, 0, 8, 3.2], [0, 0, 8, 3], [20, 20, 28, 28], BOX]
    assignment = max_iou(anchors, [BOX])
    assert positives(assignment) == [0, 5]
    assert assignment.class_weights.tolist() == [[1, 0, 0, 1, 1, 1]]


def test_max_iou_every_anchor_tied_at_a_boxs_best_is_positive():
    # Both .25, a third .1875: the best are positive though far below .5, the third is background.
    assignment = max_iou([[0, 0, 4, 4], [4, 4, 8, 8], [0, 0, 4, 3]], [BOX])
    assert positives(assignment) == [0, 1]
    assert assignment.class_weights.tolist() == [[1, 1, 1]]


def test_max_iou_best_anchor_in_the_ignored_band_is_positive():
    assignment = max_iou([[0, 0, 8, 3.5]], [BOX])  # .4375
    assert positives(assignment) == [0] and assignment.class_weights.tolist() == [[1]]


def test_max_iou_best_anchor_of_a_box_overwrites_a_better_match():
    # The anchor overlaps box 0 fully (1), box 1 by 16/64; it is the best of both. Later boxes win, in either order.
    small = [0, 0, 4, 4]
    assert max_iou([BOX], [BOX, small]).box_index.tolist() == [[1]]
    assert max_iou([BOX], [small, BOX]).box_index.tolist() == [[1]]
    # With a second, better anchor for the small box, the first stays with the box that it equals.
    assignment = max_iou([BOX, small], [BOX, small])
    assert positives(assignment) == [0, 1] and assignment.box_index.tolist() == [[0, 1]]


def test_max_iou_positive_goes_to_its_highest_box():
    # Anchor 0 has IoU .75 with box 0 and 40/56 with box 1; both boxes have a better anchor of their own.
    boxes = [[0, 0, 8, 8], [0, 1, 8, 6]]
    anchors = [[0, 0, 8, 6], *boxes]
    # IoU(anchor 0, box 0) = 48/64 = .75; IoU(anchor 0, box 1) = 40/48 = .83.
    assignment = max_iou(anchors, boxes)
    assert assignment.box_index.tolist() == [[1, 0, 1]] and positives(assignment) == [0, 1, 2]


def test_max_iou_box_that_overlaps_no_anchor_makes_none_positive():
    assignment = max_iou([[20, 20, 28, 28], [30, 30, 38, 38]], [BOX])
    assert positives(assignment) == [] and assignment.class_weights.tolist() == [[1, 1]]


def test_max_iou_invalid_anchors_take_no_part():
    # The anchor that equals the box is invalid: the next best one, IoU .25, becomes the box's best.
    assignment = max_iou([BOX, [0, 0, 4, 4], [0, 0, 4, 3]], [BOX], valid=[False, True, True])
    assert positives(assignment) == [1] and assignment.class_weights.tolist() == [[0, 1, 1]]


def test_max_iou_without_boxes():
    valid = [True, False]
    assignment = max_iou([BOX, BOX], [], valid=valid)
    assert positives(assignment) == [] and assignment.class_weights.tolist() == [[1, 0]]


def slow_max_iou(anchors: list, valid: list, boxes: list) -> tuple[dict[int, int], set[int]]:
    """Anchor -> box, and the ignored anchors."""
    usable = [i for i in range(len(anchors)) if valid[i]]
    matched, ignored = {}, set()
    for i in usable:
        overlaps = [iou(anchors[i], box) for box in boxes]
        best = max(overlaps, default=-1.0)
        if best >= 0.5:
            matched[i] = overlaps.index(best)
        elif best >= 0.4:
            ignored.add(i)
    for number, box in enumerate(boxes):
        overlaps = {i: iou(anchors[i], box) for i in usable}
        best = max(overlaps.values(), default=0.0)
        for i in usable:
            if best > 0 and overlaps[i] == best:
                matched[i] = number
                ignored.discard(i)
    return matched, ignored


@pytest.mark.parametrize("seed", range(4))
def test_max_iou_equals_a_slow_loop(seed):
    counts = [seed * 5, 25, 1]
    boxes, mask = random_truth(seed, counts)
    anchors = octave_anchors(*grid_cells(SIZES[1:], STRIDES[1:], CPU), 4, [0.5, 1.0, 2.0], 3).double()
    sizes = torch.tensor([[128, 160], [70, 130], [128, 60]])
    valid = valid_cells(per_prior(grid_cells(SIZES[1:], STRIDES[1:], CPU)[0], 9), sizes, 32)
    assignment = max_iou_assign(anchors, valid, boxes, mask, 0.5, 0.4)
    some_ignored = False
    for i, count in enumerate(counts):
        matched, ignored = slow_max_iou(anchors.tolist(), valid[i].tolist(), boxes[i, :count].tolist())
        assert {p: int(assignment.box_index[i, p]) for p in positives(assignment, i)} == matched
        weights = [float(v and p not in ignored) for p, v in enumerate(valid[i].tolist())]
        assert assignment.class_weights[i].tolist() == weights
        some_ignored |= bool(ignored)
    assert some_ignored


# Points -------------------------------------------------------------------------------------------------------------


def points(xy: list[list], boxes: list[list], lower: float = -1.0, upper: float = 64.0) -> Assignment:
    truth = torch.tensor(boxes, dtype=torch.float32).reshape(1, -1, 4)
    limits = torch.full((len(xy),), lower), torch.full((len(xy),), upper)
    mask = torch.ones(1, truth.shape[1], dtype=torch.bool)
    return point_assign(torch.tensor(xy, dtype=torch.float32), *limits, truth, mask)


def test_point_on_a_side_is_outside():
    xy = [[0, 4], [8, 4], [4, 0], [4, 8], [0.001, 4], [7.999, 4], [4, 0.001], [4, 7.999], [9, 4]]
    assert positives(points(xy, [BOX])) == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("farthest", "fits"), [(63.999, "low"), (64, "both"), (64.001, "middle"), (128, "middle"), (128.001, "none")]
)
def test_point_ranges_include_both_ends(farthest, fits):
    # The point is at the origin, the right side `farthest` away, the others 1 pixel.
    box = [-1, -1, farthest, 1]
    assert positives(points([[0, 0]], [box], -1, 64)) == ([0] if fits in ("low", "both") else [])
    assert positives(points([[0, 0]], [box], 64, 128)) == ([0] if fits in ("middle", "both") else [])


@pytest.mark.parametrize("side", range(4))
def test_point_range_is_of_the_farthest_side(side):
    box = [-1.0, -1.0, 1.0, 1.0]
    box[side] *= 100
    assert positives(points([[0, 0]], [box], 64, 128)) == [0]
    assert positives(points([[0, 0]], [box], -1, 64)) == []


def test_point_in_several_boxes_goes_to_the_smallest():
    large, small, as_small = [0, 0, 8, 8], [2, 2, 6, 6], [2, 3, 10, 5]  # areas 64, 16, 16; all hold (4, 4)
    assert points([[4, 4]], [large, small]).box_index.tolist() == [[1]]
    assert points([[4, 4]], [small, large]).box_index.tolist() == [[0]]
    assert points([[4, 4]], [large, as_small, small]).box_index.tolist() == [[1]]
    assert points([[4, 4]], [large, small, as_small]).box_index.tolist() == [[1]]


def test_point_smallest_box_counts_only_if_its_size_suits_the_level():
    assert points([[4, 4]], [[2, 2, 6, 6], [-100, 0, 8, 8]], 64, 128).box_index.tolist() == [[1]]


def test_points_all_have_a_class_weight():
    assignment = points([[4, 4], [400, 4]], [BOX])
    assert positives(assignment) == [0] and assignment.class_weights.tolist() == [[1, 1]]
    assignment = points([[4, 4], [400, 4]], [])
    assert positives(assignment) == [] and assignment.class_weights.tolist() == [[1, 1]]


@pytest.mark.parametrize("seed", range(4))
def test_points_equal_a_slow_loop(seed):
    counts = [seed * 4, 0, 9]
    boxes, mask = random_truth(seed, counts)
    ranges = [(-1, 16), (16, 32), (32, 64), (64, 128), (128, 1e8)]
    levels = grid(cell_centers)
    limits = torch.cat(
        [torch.tensor(r, dtype=torch.float64).expand(len(p), 2) for r, p in zip(ranges, levels, strict=True)]
    )
    assignment = point_assign(torch.cat(levels), limits[:, 0], limits[:, 1], boxes, mask)
    for i, count in enumerate(counts):
        expected = {}
        for p, ((x, y), (lower, upper)) in enumerate(zip(torch.cat(levels).tolist(), limits.tolist(), strict=True)):
            suited = []
            for number, (x1, y1, x2, y2) in enumerate(boxes[i, :count].tolist()):
                sides = x - x1, y - y1, x2 - x, y2 - y
                if min(sides) > 0 and lower <= max(sides) <= upper:
                    suited.append(((x2 - x1) * (y2 - y1), number))
            if suited:
                expected[p] = min(suited)[1]
        assert {p: int(assignment.box_index[i, p]) for p in positives(assignment, i)} == expected
        assert bool(expected) == bool(count)


@pytest.mark.parametrize("assign", ["max_iou", "points"])
def test_others_batch_equals_its_images_wherever_the_padding_is(assign):
    boxes, mask = random_truth(7, [3, 0, 6])
    order = torch.tensor([5, 0, 4, 1, 3, 2])
    anchors = torch.cat(grid(square_anchors, 4))
    limits = torch.full((PRIORS,), -1.0), torch.full((PRIORS,), 1e8)

    def run(boxes, mask):
        if assign == "points":
            return point_assign((anchors[:, :2] + anchors[:, 2:]) / 2, *limits, boxes, mask)
        return max_iou_assign(anchors, torch.ones(len(boxes), PRIORS, dtype=torch.bool), boxes, mask, 0.5, 0.4)

    batch, reordered = run(boxes, mask), run(boxes[:, order], mask[:, order])
    assert torch.equal(batch.positive, reordered.positive)
    assert torch.equal(batch.class_weights, reordered.class_weights)
    assert torch.equal(batch.box_index[batch.positive], order[reordered.box_index[batch.positive]])
    for i, count in enumerate([3, 0, 6]):
        alone = run(boxes[i : i + 1, :count], mask[i : i + 1, :count])
        assert_same(
            alone, Assignment(batch.positive[i : i + 1], batch.box_index[i : i + 1], batch.class_weights[i : i + 1])
        )
