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

LN2 = math.log(2)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


# Quality focal loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logit", "target", "beta", "expected"),
    [
        (0.0, 0.0, 2.0, 0.25 * LN2),  # p = .5: |0 - .5|^2 * -ln(.5)
        (0.0, 1.0, 2.0, 0.25 * LN2),
        (0.0, 0.8, 2.0, 0.09 * LN2),  # BCE(.5, anything) = ln 2
        (0.0, 0.8, 1.0, 0.3 * LN2),
        (0.0, 0.5, 2.0, 0.0),  # p = target: 0, though the entropy isn't
        (math.log(4), 0.0, 2.0, 0.64 * math.log(5)),  # p = .8: -ln(1 - .8) = ln 5
        (math.log(4), 0.4, 2.0, 0.16 * (0.4 * math.log(1.25) + 0.6 * math.log(5))),
    ],
)
def test_quality_focal_loss_by_hand(logit, target, beta, expected):
    loss = quality_focal_loss(scalar(logit)[None], scalar(target).detach()[None], beta)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_quality_focal_loss_gradient_flows_through_the_factor():
    # L = (1 - p)^2 * -ln p, p' = p(1 - p) = .25: dL/dx = -2(1 - p) p' * -ln p + (1 - p)^2 (p - 1)
    #   = -.25 ln 2 - .125. A detached factor would give -.125.
    logit = scalar(0.0)
    quality_focal_loss(logit[None], torch.tensor([1.0], dtype=torch.float64)).backward()
    assert logit.grad.item() == pytest.approx(-0.25 * LN2 - 0.125)


def test_scaled_cross_entropy_by_finite_differences():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    targets = torch.rand(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for beta in (1.0, 1.5, 2.0, 3.0):
        assert torch.autograd.gradcheck(lambda x, b=beta: quality_focal_loss(x, targets, b), logits)
    for gamma in (0.5, 1.0, 2.0):
        assert torch.autograd.gradcheck(lambda x, g=gamma: focal_loss(x, targets.round(), 0.25, g), logits)


@pytest.mark.parametrize("gamma", [1.0, 2.0, 2.5])
def test_focal_loss_is_torchvisions(gamma):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(50, 7, generator=generator) * 4).requires_grad_()
    targets = (torch.rand(50, 7, generator=generator) < 0.2).float()
    ours, theirs = (
        focal_loss(logits, targets, 0.25, gamma),
        sigmoid_focal_loss(logits, targets, 0.25, gamma).sum(dim=-1),
    )
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_quality_focal_loss_sums_classes_and_is_finite_everywhere():
    logits = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]]).repeat(3, 1).unsqueeze(-1).requires_grad_()
    targets = torch.tensor([[0.0], [0.5], [1.0]]).expand(3, 5).unsqueeze(-1)
    for beta in (1.0, 1.5, 2.0):
        logits.grad = None
        loss = quality_focal_loss(logits, targets, beta)
        loss.sum().backward()
        assert loss.shape == (3, 5) and loss.isfinite().all() and logits.grad.isfinite().all()
        assert loss[0, 0] == 0 and loss[2, 4] == 0
    both = quality_focal_loss(torch.zeros(2, 2), torch.tensor([[0.0, 1], [0, 0]]))
    assert both.tolist() == pytest.approx([0.5 * LN2, 0.5 * LN2])


# Distribution focal loss --------------------------------------------------------------------------------------------

BINS = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()  # logits whose softmax is .2 .3 .5


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0.0, -math.log(0.2)),
        (0.25, -0.75 * math.log(0.2) - 0.25 * math.log(0.3)),
        (1.0, -math.log(0.3)),
        (1.5, -0.5 * math.log(0.3) - 0.5 * math.log(0.5)),
        (1.9, -0.1 * math.log(0.3) - 0.9 * math.log(0.5)),  # as near the last bin as targets come
    ],
)
def test_distribution_focal_loss_by_hand(target, expected):
    loss = distribution_focal_loss(BINS, torch.tensor(target, dtype=torch.float64))
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    shifted = distribution_focal_loss(BINS + 5, torch.tensor(target, dtype=torch.float64))
    assert shifted.item() == pytest.approx(expected, abs=1e-12)


def test_distribution_focal_loss_at_an_integer_is_the_cross_entropy_of_one_bin():
    logits = BINS.clone().requires_grad_()
    distribution_focal_loss(logits, torch.tensor(1.0, dtype=torch.float64)).backward()
    # Softmax minus one-hot of bin 1.
    assert logits.grad.tolist() == pytest.approx([0.2, -0.7, 0.5])


def test_distribution_focal_loss_takes_any_leading_shape():
    logits = torch.zeros(2, 5, 4, 17)
    targets = torch.linspace(0, 15.9, 40).reshape(2, 5, 4)
    loss = distribution_focal_loss(logits, targets)
    assert loss.shape == (2, 5, 4)
    torch.testing.assert_close(loss, torch.full((2, 5, 4), math.log(17)))


def gfl_dfl_loss(box: list[float]) -> float:
    """loss_dfl of a GFL with one positive prior: the anchor centre (0, 0) at stride 8, a class probability of .5 and
    bin i's logit i / 4."""
    model = tiny_model("gfl")
    priors = Priors.of(torch.tensor([[-32.0, -32.0, 32.0, 32.0]]), [1], torch.tensor([[8.0]]), torch.zeros(1, 2))
    bins = (torch.arange(17.0) / 4).repeat(4)
    predictions = HeadPredictions(torch.tensor([[[0.0, -9.0]]]), bins.reshape(1, 1, 68), None)
    truth = GroundTruth(torch.tensor([[box]]), torch.tensor([[0]]), torch.tensor([[True]]))
    assignment = Assignment(torch.tensor([[True]]), torch.tensor([[0]]), torch.ones(1, 1))
    return model.detection_losses(predictions, priors, assignment, truth).terms["loss_dfl"].item()


@pytest.mark.parametrize(
    ("box", "bins"),
    [
        ([-8.0, -12.0, 20.0, 4.0], [1, 1.5, 2.5, 0.5]),  # nothing to clip
        ([-126.4, -127.2, 127.2, 128.0], [15.8, 15.9, 15.9, 15.9]),  # 15.8 isn't clipped, 16 is
        ([-4000.0, -8.0, 8.0, 8.0], [15.9, 1, 1, 1]),  # 500 strides
        ([8.0, -8.0, 16.0, 8.0], [0, 1, 2, 1]),  # the centre outside of the box: -1 stride
    ],
)
def test_gfl_clips_bin_targets_to_the_last_bin_but_a_tenth(box, bins):
    # DFL of a target t between bins is ln Z - t / 4, because the bins' log probabilities are linear in the bin. The
    # mean over the sides times the weight .5 (class probability), over a normaliser of 1 (.5 is clamped), times .25.
    log_z = math.log(sum(math.exp(i / 4) for i in range(17)))
    expected = sum(log_z - t / 4 for t in bins) / 4 * 0.5 * 0.25
    assert gfl_dfl_loss(box) == pytest.approx(expected, rel=1e-5)


# Overlaps -----------------------------------------------------------------------------------------------------------


def pair(a: list[float], b: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)


def overlaps(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of boxes xyxy, as distances from a point that lies in neither."""
    point = torch.tensor([-0.5, 7.25], dtype=a.dtype)
    return distance_overlaps(boxes_to_distances(point, a), boxes_to_distances(point, b))


def giou_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return 1 - overlaps(a, b)[1]


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
    ],
)
def test_iou_and_giou_by_hand(a, b, iou, giou):
    for first, second in ((a, b), (b, a)):
        assert box_iou(*pair(first, second)).item() == pytest.approx(iou, abs=1e-12)
        found = [value.item() for value in overlaps(*pair(first, second))]
        assert found == pytest.approx([iou, giou], abs=1e-12)


def test_iou_broadcasts():
    a = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3]])
    ious = box_iou(a[:, None], torch.cat([a, a[:1]])[None])
    torch.testing.assert_close(ious, torch.tensor([[1, 1 / 7, 1], [1 / 7, 1, 1 / 7]]))


@pytest.mark.parametrize(
    ("size", "iou"),
    [
        ((0.0, 0.0), 0.0),  # 0 / 1e-6
        ((0.0, 5.0), 0.0),
        ((1e-3, 5e-4), 0.5),  # 5e-7 / 1e-6
        ((1e-3, 2e-3), 1.0),  # 2e-6 / 2e-6: the bound is no addend
    ],
)
def test_union_and_enclosing_area_are_at_least_a_millionth(size, iou):
    box = [3.0, 3.0, 3.0 + size[0], 3.0 + size[1]]
    assert box_iou(*pair(box, box)).item() == pytest.approx(iou, rel=1e-6)
    # A box and itself: union and enclosing area are clamped alike, so that nothing else remains.
    assert giou_loss(*pair(box, box)).item() == pytest.approx(1 - iou, rel=1e-6)


def test_giou_of_two_points_apart():
    # Union 1e-6, enclosing 100.
    assert giou_loss(*pair([0, 0, 0, 0], [10, 10, 10, 10])).item() == pytest.approx(1 + (100 - 1e-6) / 100, abs=1e-12)


def test_overlaps_of_degenerate_boxes_have_finite_gradients():
    boxes = torch.tensor([[0.0, 0, 0, 0], [5, 5, 5, 9], [4, 4, 2, 2], [0, 0, 2, 2]], requires_grad=True)
    targets = torch.tensor([[0.0, 0, 0, 0], [5, 5, 5, 9], [1, 1, 3, 3], [7, 7, 7, 7]])
    iou, giou = overlaps(boxes, targets)
    losses = torch.stack([1 - giou, -iou.clamp(min=1e-6).log()])
    losses.sum().backward()
    assert losses.isfinite().all() and boxes.grad.isfinite().all()


def test_giou_gradient_pulls_separate_boxes_together():
    # GIoU = -(enclosing - 2) / enclosing with enclosing = 3 - (shift of a to the left): moving a left lowers the loss.
    a, b = pair([2, 0, 3, 1], [0, 0, 1, 1])
    a.requires_grad_()
    giou_loss(a, b).backward()
    # Union = 1 + w_a, enclosing = x2: GIoU = U / E - 1, dL/dx1 = 1 / E = 1/3, dL/dx2 = -1 / E + U / E^2 = -1/3 + 2/9.
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
def test_overlap_gradients_are_autograds_own(case):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(3, 40, 4, generator=generator, dtype=torch.float64) * 4 + 0.1 for _ in range(2))
    if case == "beside the point":
        a = a + torch.tensor([-3.0, 0, 3, 0])
    elif case == "apart":
        a[..., :2] += 5
        a[..., 2:] = 0.5 - a[..., :2]
    elif case == "equal":  # both of each pair of sides are the nearest: half the slope each, as autograd has it
        a = b.clone()
    a.requires_grad_()
    weights = torch.rand(2, 3, 40, generator=generator, dtype=torch.float64)
    results = []
    for function in (distance_overlaps, autograd_overlaps):
        iou, giou = function(a, b)
        loss = (weights[0] * iou + weights[1] * giou).sum()
        results.append((iou.detach(), giou.detach(), torch.autograd.grad(loss, a)[0]))
    torch.testing.assert_close(*results, atol=1e-12, rtol=1e-12)
    if case != "equal":
        assert torch.autograd.gradcheck(lambda x: distance_overlaps(x, b), a)


# Distillation -------------------------------------------------------------------------------------------------------


def test_binary_kd_loss_by_hand():
    # p = .5, teacher .8: |.3| * ln 2.
    assert binary_kd_loss(scalar(0.0)[None], scalar(math.log(4))[None]).item() == pytest.approx(0.3 * LN2)
    # p = .8, teacher .5: .3 * (-.5 ln .8 - .5 ln .2).
    expected = 0.3 * (-0.5 * math.log(0.8) - 0.5 * math.log(0.2))
    assert binary_kd_loss(scalar(math.log(4))[None], scalar(0.0)[None]).item() == pytest.approx(expected)
    assert binary_kd_loss(scalar(1.3)[None], scalar(1.3)[None]).item() == 0


def test_binary_kd_loss_gradient_flows_through_the_factor():
    # L = (t - p) * BCE, t = .8, p = .5: dL/dx = -p' ln 2 + (t - p)(p - t) = -.25 ln 2 - .09.
    logit = scalar(0.0)
    binary_kd_loss(logit[None], torch.tensor([math.log(4)], dtype=torch.float64)).backward()
    assert logit.grad.item() == pytest.approx(-0.25 * LN2 - 0.09)


def test_bin_kl_loss_by_hand_and_in_this_direction():
    student = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    teacher = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    # .5 ln(.5 / .25) + .5 ln(.5 / .75); the other direction is .25 ln .5 + .75 ln 1.5.
    assert bin_kl_loss(student, teacher).item() == pytest.approx(0.5 * LN2 + 0.5 * math.log(2 / 3))
    assert bin_kl_loss(teacher, student).item() == pytest.approx(-0.25 * LN2 + 0.75 * math.log(1.5))


def test_bin_kl_loss_of_equal_distributions_is_zero_with_zero_gradient():
    teacher = torch.randn(2, 3, 4, 17, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    student = (teacher + 7).requires_grad_()  # a constant changes no softmax
    loss = bin_kl_loss(student, teacher)
    loss.sum().backward()
    assert loss.shape == (2, 3, 4)
    assert loss.abs().max() < 1e-12 and student.grad.abs().max() < 1e-12


def test_bin_kl_loss_gradient_is_the_difference_of_distributions():
    student = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log().requires_grad_()
    bin_kl_loss(student, torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()).backward()
    assert student.grad.tolist() == pytest.approx([-0.4, 0.0, 0.4])


def test_distillation_losses_are_never_negative_and_finite_everywhere():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(200, 17, generator=generator).mul(50).requires_grad_()
    teacher = torch.randn(200, 17, generator=generator) * 50
    with torch.no_grad():
        student[0], teacher[1] = 1e4, -1e4
        student[2, 3], teacher[2, 4] = 1e4, 1e4
    for loss in (binary_kd_loss(student, teacher), bin_kl_loss(student, teacher)):
        student.grad = None
        loss.sum().backward()
        assert loss.isfinite().all() and (loss >= -1e-5).all() and student.grad.isfinite().all()
