"""Losses and overlaps by hand: values, gradients, bounds."""

import math

import pytest
import torch
from tiny import tiny_model
from torchvision.ops import sigmoid_focal_loss

from crosskd_hf.models.assigners import Assignment
from crosskd_hf.models.box_coding import boxes_to_distances
from crosskd_hf.models.losses import (
    bin_kl_loss,
    binary_kd_loss,
    box_iou,
    distance_overlaps,
    distribution_focal_loss,
    focal_loss,
    quality_focal_loss,
)
from crosskd_hf.models.outputs import GroundTruth, HeadPredictions, Priors

LN2, LN4 = math.log(2), math.log(4)  # a logit of ln 4 is a probability of .8
BINS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()  # logits whose softmax is .2 .3 .5


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Class losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logit", "target", "beta", "expected"),
    [
        (0.0, 0.0, 2.0, 0.25 * LN2),  # p = .5: |0 - .5|^2 * -ln(.5)
        (0.0, 1.0, 2.0, 0.25 * LN2),
        (0.0, 0.8, 2.0, 0.09 * LN2),  # BCE(.5, anything) = ln 2
        (0.0, 0.8, 1.0, 0.3 * LN2),
        (0.0, 0.5, 2.0, 0.0),  # p = target: 0, though the entropy isn't
        (LN4, 0.0, 2.0, 0.64 * math.log(5)),  # p = .8: -ln(1 - .8) = ln 5
        (LN4, 0.4, 2.0, 0.16 * (0.4 * math.log(1.25) + 0.6 * math.log(5))),
    ],
)
def test_quality_focal_loss_by_hand(logit, target, beta, expected):
    loss = quality_focal_loss(double(logit), double(target), beta)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("logit", "teacher", "expected"),
    [
        (0.0, LN4, 0.3 * LN2),  # p = .5, teacher .8: |.3| * ln 2
        (LN4, 0.0, 0.3 * (-0.5 * math.log(0.8) - 0.5 * math.log(0.2))),
        (1.3, 1.3, 0.0),
    ],
)
def test_binary_kd_loss_by_hand(logit, teacher, expected):
    assert binary_kd_loss(double(logit), double(teacher)).item() == pytest.approx(expected)


def test_gradients_flow_through_the_factor():
    # L = (1 - p)^2 * -ln p, p' = p(1 - p) = .25: dL/dx = -2(1 - p) p' * -ln p + (1 - p)^2 (p - 1)
    #   = -.25 ln 2 - .125. A detached factor would give -.125.
    logit = double(0.0).requires_grad_()
    (gradient,) = torch.autograd.grad(quality_focal_loss(logit, double(1.0)), logit)
    assert gradient.item() == pytest.approx(-0.25 * LN2 - 0.125)
    # L = (t - p) * BCE, t = .8, p = .5: dL/dx = -p' ln 2 + (t - p)(p - t) = -.25 ln 2 - .09.
    (gradient,) = torch.autograd.grad(binary_kd_loss(logit, double(LN4)), logit)
    assert gradient.item() == pytest.approx(-0.25 * LN2 - 0.09)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_class_losses_by_finite_differences(power):
    logits, targets = random(3, 4).requires_grad_(), random(3, 4, seed=1).sigmoid()
    if power >= 1:
        assert torch.autograd.gradcheck(lambda x: quality_focal_loss(x, targets, power), logits)
    assert torch.autograd.gradcheck(lambda x: focal_loss(x, targets.round(), 0.25, power), logits)


@pytest.mark.parametrize("gamma", [1.0, 2.0, 2.5])
def test_focal_loss_is_torchvisions(gamma):
    logits, targets = (random(50, 7) * 4).requires_grad_(), (random(50, 7, seed=1) > 1).double()
    ours = focal_loss(logits, targets, 0.25, gamma)
    theirs = sigmoid_focal_loss(logits, targets, 0.25, gamma).sum(dim=-1)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs)))


@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0])
def test_quality_focal_loss_sums_classes_and_is_finite_everywhere(beta):
    logits = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]]).repeat(3, 1).unsqueeze(-1).requires_grad_()
    loss = quality_focal_loss(logits, torch.tensor([[0.0], [0.5], [1.0]]).expand(3, 5).unsqueeze(-1), beta)
    loss.sum().backward()
    assert loss.shape == (3, 5) and loss.isfinite().all() and logits.grad.isfinite().all()
    assert loss[0, 0] == 0 and loss[2, 4] == 0
    both = quality_focal_loss(torch.zeros(2, 2), torch.tensor([[0.0, 1], [0, 0]]))
    assert both.tolist() == pytest.approx([0.5 * LN2, 0.5 * LN2])


# Bins ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0.0, -math.log(0.2)),
        (0.25, -0.75 * math.log(0.2) - 0.25 * math.log(0.3)),
        (1.0, -math.log(0.3)),
        (1.9, -0.1 * math.log(0.3) - 0.9 * math.log(0.5)),  # as near the last bin as targets come
    ],
)
def test_distribution_focal_loss_by_hand(target, expected):
    for logits in (BINS, BINS + 5):
        loss = distribution_focal_loss(logits.expand(2, 4, 3), double(target).expand(2, 4))
        assert loss.shape == (2, 4) and loss.flatten().tolist() == pytest.approx([expected] * 8, abs=1e-12)


def test_gradients_of_bins_are_differences_of_distributions():
    logits = BINS.clone().requires_grad_()
    # At an integer target: softmax minus one-hot of bin 1.
    (gradient,) = torch.autograd.grad(distribution_focal_loss(logits, double(1.0)[0]), logits)
    assert gradient.tolist() == pytest.approx([0.2, -0.7, 0.5])
    (gradient,) = torch.autograd.grad(bin_kl_loss(logits, double(0.6, 0.3, 0.1).log()), logits)
    assert gradient.tolist() == pytest.approx([-0.4, 0.0, 0.4])


def test_bin_kl_loss_by_hand_and_in_this_direction():
    student, teacher = double(0.25, 0.75).log(), double(0.5, 0.5).log()
    # .5 ln(.5 / .25) + .5 ln(.5 / .75); the other direction is .25 ln .5 + .75 ln 1.5.
    assert bin_kl_loss(student, teacher).item() == pytest.approx(0.5 * LN2 + 0.5 * math.log(2 / 3))
    assert bin_kl_loss(teacher, student).item() == pytest.approx(-0.25 * LN2 + 0.75 * math.log(1.5))
    equal = bin_kl_loss(random(2, 3, 4, 17) + 7, random(2, 3, 4, 17))  # a constant changes no softmax
    assert equal.shape == (2, 3, 4) and equal.abs().max() < 1e-12


@pytest.mark.parametrize("loss_of", [binary_kd_loss, bin_kl_loss])
def test_distillation_losses_are_never_negative_and_finite_everywhere(loss_of):
    student, teacher = (random(200, 17, seed=seed).float() * 50 for seed in (0, 1))
    student[0], teacher[1] = 1e4, -1e4
    student[2, 3], teacher[2, 4] = 1e4, 1e4
    student.requires_grad_()
    loss = loss_of(student, teacher)
    loss.sum().backward()
    assert loss.isfinite().all() and (loss >= -1e-5).all() and student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("box", "bins"),
    [
        ([-8.0, -12.0, 20.0, 4.0], [1, 1.5, 2.5, 0.5]),  # nothing to clip
        ([-126.4, -127.2, 127.2, 128.0], [15.8, 15.9, 15.9, 15.9]),  # 15.8 isn't clipped, 16 is
        ([8.0, -8.0, 16.0, 4000.0], [0, 1, 2, 15.9]),  # the centre outside of the box: -1 stride; 500 strides
    ],
)
def test_gfl_clips_bin_targets_to_the_last_bin_but_a_tenth(box, bins):
    # One positive prior: the anchor centre (0, 0) at stride 8, a class probability of .5 and bin i's logit i / 4.
    priors = Priors.of(torch.tensor([[-32.0, -32.0, 32.0, 32.0]]), [1], torch.tensor([[8.0]]), torch.zeros(1, 2))
    logits = (torch.arange(17.0) / 4).repeat(4).reshape(1, 1, 68)
    predictions = HeadPredictions(torch.tensor([[[0.0, -9.0]]]), logits, None)
    truth = GroundTruth(torch.tensor([[box]]), torch.tensor([[0]]), torch.tensor([[True]]))
    assignment = Assignment(torch.tensor([[True]]), torch.tensor([[0]]), torch.ones(1, 1))
    terms = tiny_model("gfl").detection_losses(predictions, priors, assignment, truth).terms
    # DFL of a target t between bins is ln Z - t / 4, because the bins' log probabilities are linear in the bin. The
    # mean over the sides times the weight .5 (class probability), over a normaliser of 1 (.5 is clamped), times .25.
    log_z = math.log(sum(math.exp(i / 4) for i in range(17)))
    expected = sum(log_z - t / 4 for t in bins) / 4 * 0.5 * 0.25
    assert terms["loss_dfl"].item() == pytest.approx(expected, rel=1e-5)


# Overlaps -----------------------------------------------------------------------------------------------------------


def overlaps(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU and GIoU of boxes xyxy, as distances from a point that lies in neither."""
    point = torch.tensor([-0.5, 7.25], dtype=a.dtype)
    return distance_overlaps(boxes_to_distances(point, a), boxes_to_distances(point, b))


@pytest.mark.parametrize(
    ("a", "b", "iou", "giou"),
    [
        ([0, 0, 2, 2], [0, 0, 2, 2], 1, 1),
        ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7, 1 / 7 - 2 / 9),  # 1 of 7; the enclosing 9 has 2 empty
        ([0, 0, 4, 4], [1, 1, 3, 3], 1 / 4, 1 / 4),  # one inside the other: enclosing = union
        ([0, 0, 1, 1], [2, 0, 3, 1], 0, -1 / 3),  # apart: 1 of 3 empty
        ([0, 0, 1, 1], [1, 0, 2, 1], 0, 0),  # a common side
        ([0, 0, 1, 1], [3, 3, 4, 4], 0, -14 / 16),
        ([-2, -2, 0, 0], [-1, -1, 1, 1], 1 / 7, 1 / 7 - 2 / 9),  # negative coordinates
        # Union and enclosing area are at least a millionth, which is no addend.
        ([3, 3, 3, 3], [3, 3, 3, 3], 0, 0),  # 0 / 1e-6
        ([3, 3, 3, 8], [3, 3, 3, 8], 0, 0),
        ([3, 3, 3.001, 3.0005], [3, 3, 3.001, 3.0005], 0.5, 0.5),  # 5e-7 / 1e-6
        ([3, 3, 3.001, 3.002], [3, 3, 3.001, 3.002], 1, 1),  # 2e-6 / 2e-6
        ([0, 0, 0, 0], [10, 10, 10, 10], 0, -(100 - 1e-6) / 100),
    ],
)
def test_iou_and_giou_by_hand(a, b, iou, giou):
    for first, second in ((double(*a), double(*b)), (double(*b), double(*a))):
        assert box_iou(first, second).item() == pytest.approx(iou, abs=1e-9)
        assert [value.item() for value in overlaps(first, second)] == pytest.approx([iou, giou], abs=1e-9)


def test_iou_broadcasts():
    a = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3]])
    ious = box_iou(a[:, None], torch.cat([a, a[:1]])[None])
    torch.testing.assert_close(ious, torch.tensor([[1, 1 / 7, 1], [1 / 7, 1, 1 / 7]]))


def test_overlaps_of_degenerate_boxes_have_finite_gradients():
    boxes = torch.tensor([[0.0, 0, 0, 0], [5, 5, 5, 9], [4, 4, 2, 2], [0, 0, 2, 2]], requires_grad=True)
    targets = torch.tensor([[0.0, 0, 0, 0], [5, 5, 5, 9], [1, 1, 3, 3], [7, 7, 7, 7]])
    iou, giou = overlaps(boxes, targets)
    losses = torch.stack([1 - giou, -iou.clamp(min=1e-6).log()])
    losses.sum().backward()
    assert losses.isfinite().all() and boxes.grad.isfinite().all()


def test_giou_gradient_pulls_separate_boxes_together():
    a = double(2, 0, 3, 1).requires_grad_()
    (1 - overlaps(a, double(0, 0, 1, 1))[1]).backward()
    # Union U = 1 + w_a, enclosing E = x2: GIoU = U / E - 1, dL/dx1 = 1 / E = 1/3, dL/dx2 = -1 / E + U / E^2.
    assert a.grad[0].item() == pytest.approx(1 / 3)
    assert a.grad[2].item() == pytest.approx(-1 / 3 + 2 / 9)


def autograd_overlaps(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The formulas over image coordinates, differentiated by autograd."""
    (a_start, a_end), (b_start, b_end) = ((-d[..., :2], d[..., 2:]) for d in (a, b))
    inter = (torch.minimum(a_end, b_end) - torch.maximum(a_start, b_start)).clamp(min=0).prod(-1)
    outer = (torch.maximum(a_end, b_end) - torch.minimum(a_start, b_start)).prod(-1)
    union = (a_end - a_start).prod(-1) + (b_end - b_start).prod(-1) - inter
    return inter / union, inter / union - (outer - union) / outer


@pytest.mark.parametrize("case", ["around the point", "beside the point", "apart", "equal"])
def test_overlap_gradients_are_autograds(case):
    a, b = (random(3, 40, 4, seed=seed).sigmoid() * 4 + 0.1 for seed in (0, 1))
    if case == "beside the point":
        a = a + torch.tensor([-3.0, 0, 3, 0])
    elif case == "apart":
        a[..., :2] += 5
        a[..., 2:] = 0.5 - a[..., :2]
    elif case == "equal":  # both of each pair of sides are the nearest: half the slope each, as autograd has it
        a = b.clone()
    a.requires_grad_()
    weights, results = random(2, 3, 40, seed=2), []
    for function in (distance_overlaps, autograd_overlaps):
        iou, giou = function(a, b)
        loss = (weights[0] * iou + weights[1] * giou).sum()
        results.append((iou.detach(), giou.detach(), torch.autograd.grad(loss, a)[0]))
    torch.testing.assert_close(*results, atol=1e-12, rtol=1e-12)
