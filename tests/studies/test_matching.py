"""Detections and boxes of an image, matched by hand."""

import pytest
import torch

from crosskd_hf.studies.matching import confusion, match

BOXES = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])


def outcome(found: list, labels: list[int], truth=(0, 1, 2)):
    boxes = torch.tensor(found, dtype=torch.float32).reshape(-1, 4)
    return match(BOXES[: len(truth)], torch.tensor(truth, dtype=torch.int64), boxes, torch.tensor(labels).long())


@pytest.mark.parametrize(
    ("found", "labels", "of_truth", "right", "errors"),
    [
        ([], [], [-1, -1, -1], 0, 3),
        ([[0, 0, 10, 5]], [0], [0, -1, -1], 1, 2),  # an overlap of exactly one half
        ([[0, 0, 10, 4.9]], [0], [-1, -1, -1], 0, 4),
        ([[20, 0, 30, 10], [0, 0, 10, 10]], [1, 2], [1, 0, -1], 1, 2),  # the second is of another class
        # The better detection of another class doesn't take the box of the right one.
        ([[0, 0, 10, 10], [0, 0, 10, 9]], [1, 0], [1, -1, -1], 1, 2),
        ([[0, 0, 10, 10], [0, 0, 10, 9]], [0, 0], [0, -1, -1], 1, 2),  # found twice: the second isn't made up
        ([[60, 0, 70, 10]], [0], [-1, -1, -1], 0, 4),
    ],
)
def test_each_box_is_found_at_most_once(found, labels, of_truth, right, errors):
    one = outcome(found, labels)
    assert one.of_truth.tolist() == of_truth and (one.right, one.errors) == (right, errors)


def test_what_is_found_twice_or_made_up():
    one = outcome([[0, 0, 10, 10], [0, 0, 10, 9], [60, 0, 70, 10]], [0, 0, 2])
    assert one.double.tolist() == [False, True, False] and one.made_up.tolist() == [False, False, True]
    empty = outcome([[0, 0, 1, 1]], [0], truth=())
    assert empty.made_up.tolist() == [True] and empty.errors == 1 and empty.right == 0


def test_confusions_are_counted():
    first = outcome([[20, 0, 30, 10], [0, 0, 10, 10], [60, 0, 70, 10]], [1, 2, 1])
    second = outcome([], [])
    # Rows: true 0, 1, 2, made up. Columns: detected 0, 1, 2, missed.
    assert confusion([first, second], 3).tolist() == [[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 2], [0, 1, 0, 0]]
