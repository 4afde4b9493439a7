"""Labels that can't be right, on both sides of each edge."""

import pytest
import torch

from crosskd_hf.utils.label_checks import check_labels, check_relative_labels

NAN = float("nan")


def check(*boxes, classes=None, num_labels=None):
    """Check the boxes of one image of 60 x 40 pixels."""
    values = torch.tensor(boxes, dtype=torch.float32).reshape(1, -1, 4)
    classes = torch.tensor([classes or [0] * len(boxes)])
    check_labels(values, classes, torch.ones(1, len(boxes), dtype=torch.bool), torch.tensor([[40, 60]]), num_labels)


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ([], None),
        ([[0, 0, 60, 40]], None),
        ([[0.1, 0.2, 0.9, 1]], None),  # a small one
        ([[-5, -5, 0.1, 0.1], [59.9, 39.9, 70, 50]], None),  # partly outside
        ([[5, 5, 9, 9], [30, 20, 10, 30]], r"box 1 of image 0 has \[30.0, 20.0, 10.0, 30.0\].*x2.*xywh"),
        ([[5, 9, 9, 9]], r"\[5.0, 9.0, 9.0, 9.0\].*y2"),
        ([[5, NAN, 9, 9]], r"\[5.0, nan, 9.0, 9.0\], which isn't finite"),
        ([[5, 5, float("inf"), 9]], r"\[5.0, 5.0, inf, 9.0\], which isn't finite"),
        ([[60, 5, 70, 9]], r"\[60.0, 5.0, 70.0, 9.0\], outside its 60 x 40 pixels"),
        ([[5, -9, 9, 0]], "outside its 60 x 40 pixels"),
        ([[-60, -40, 120, 80]], None),
        ([[5, 5, 120.5, 9]], "outside its 60 x 40 pixels"),  # as pixels of a larger, original image
        ([[5, -40.5, 9, 9]], "outside its 60 x 40 pixels"),
    ],
)
def test_boxes_must_be_pixels_of_the_image(boxes, words):
    if words is None:
        check(*boxes)
        return
    with pytest.raises(ValueError, match=f"{words}.*xyxy in pixels of pixel_values"):
        check(*boxes)


def check_relative(*boxes, classes=None, num_labels=None):
    values = torch.tensor(boxes, dtype=torch.float32).reshape(1, -1, 4)
    classes = torch.tensor([classes or [0] * len(boxes)])
    check_relative_labels(values, classes, torch.ones(1, len(boxes), dtype=torch.bool), num_labels)


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ([], None),
        ([[0, 0, 1, 1], [1, 1, 2, 2]], None),  # as far outside as boxes before clipping are
        ([[0.5, 0.5, 0.6, 0.6]], None),  # could be xyxy, but is inside
        ([[0.3, 0.3, 0.9, 0.9], [0.9, 0.9, 0.2, 0.2]], None),  # partly outside, but the second is no xyxy
        ([[0.5, 0.5, 0.2, 0.2], [0.4, 1.01, 0.1, 0.1]], r"box 1 of image 0 has \[0.4, 1.01, 0.1, 0.1\], .*outside"),
        ([[-0.01, 0.5, 0.2, 0.2]], "outside"),
        ([[0.5, 0.5, 2.1, 0.2]], "in pixels or outside"),
        ([[30, 20, 10, 30]], r"\[30.0, 20.0, 10.0, 30.0\], which is in pixels"),
        ([[0.5, 0.5, 0, 0.2]], "width or height isn't above 0"),
        ([[0.5, NAN, 0.1, 0.2]], "which isn't finite"),
        ([[0.3, 0.3, 0.5, 0.5], [0.7, 0.7, 0.9, 0.8]], r"box 1 of image 0 has \[0.7, 0.7, 0.9, 0.8\].*look like xyxy"),
    ],
)
def test_relative_boxes_must_be_detrs(boxes, words):
    if words is None:
        check_relative(*boxes)
        return
    with pytest.raises(ValueError, match=f"{words}.*cxcywh, relative to the image"):
        check_relative(*boxes)
    check_relative([0.5, 0.5, 0.1, 0.1], classes=[2], num_labels=3)
    with pytest.raises(ValueError, match=r"box 0 of image 0 has 3, .*from 0 to 2"):
        check_relative([0.5, 0.5, 0.1, 0.1], classes=[3], num_labels=3)


def test_classes_must_be_the_models():
    check([5, 5, 9, 9], [5, 5, 9, 9], classes=[0, 2], num_labels=3)
    check([5, 5, 9, 9], classes=[2])
    with pytest.raises(ValueError, match=r"box 1 of image 0 has 3, .*from 0 to 2"):
        check([5, 5, 9, 9], [5, 5, 9, 9], classes=[0, 3], num_labels=3)
    with pytest.raises(ValueError, match="has -1"):
        check([5, 5, 9, 9], classes=[-1])


def test_padding_is_not_looked_at_and_the_image_is_named():
    boxes = torch.tensor([[[5, 5, 9, 9], [0, 0, 0, 0]], [[0, 0, 0, 0], [9, 9, 5, 5]]], dtype=torch.float32)
    classes, sizes = torch.tensor([[0, -1], [9, 9]]), torch.tensor([[40, 60], [10, 10]])
    mask = torch.tensor([[True, False], [False, False]])
    check_labels(boxes, classes, mask, sizes, 1)
    mask[1, 1] = True
    with pytest.raises(ValueError, match=r"box 1 of dog\.png has"):
        check_labels(boxes, classes, mask, sizes, 1, ["cat.png", "dog.png"])
