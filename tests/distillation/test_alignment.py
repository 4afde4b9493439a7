"""Maps with given statistics per channel: values, gradients and degenerate maps by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from crosskd_hf.distillation.alignment import align, channel_statistics, standardise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one(function, *maps: torch.Tensor, **options) -> torch.Tensor:
    """Of a single level."""
    (result,) = function(*([m] for m in maps), **options)
    return result


def test_statistics_are_a_channels_over_batch_and_space():
    # Channel 0: 0 and 2, mean 1, unbiased std sqrt(2). Channel 1: 5 and 11, mean 8, std 3 sqrt(2).
    mean, std = channel_statistics([torch.tensor([[0.0, 5.0], [2.0, 11.0]]).reshape(2, 2, 1, 1)])
    assert mean.shape == std.shape == (1, 2)
    assert mean.flatten().tolist() == [1, 8]
    assert std.flatten().tolist() == pytest.approx([math.sqrt(2), 3 * math.sqrt(2)])


def test_standardises_with_the_unbiased_deviation():
    # 0 1 2: mean 1, std 1 (the biased one would be .816).
    values = one(standardise, torch.tensor([0.0, 1.0, 2.0]).reshape(1, 1, 1, 3))
    assert values.flatten().tolist() == pytest.approx([-1, 0, 1], abs=2e-6)


def test_small_deviations_are_damped_by_a_millionth():
    # Mean 0, std sqrt(2) * 1e-6: -+1e-6 / (sqrt(2) * 1e-6 + 1e-6).
    values = one(standardise, torch.tensor([-1e-6, 1e-6], dtype=torch.float64).reshape(2, 1, 1, 1))
    assert values.flatten().tolist() == pytest.approx([-1 / (1 + math.sqrt(2)), 1 / (1 + math.sqrt(2))])


def test_gradient_flows_through_mean_and_deviation():
    features = torch.randn(2, 3, 4, 5, generator=generator(), dtype=torch.float64, requires_grad=True)
    # Shifting or scaling a channel changes nothing that is standardised: its gradient is orthogonal to both.
    weights = torch.randn(2, 3, 4, 5, generator=generator(1), dtype=torch.float64)
    (one(standardise, features) * weights).sum().backward()
    assert features.grad.abs().max() > 0.1
    assert features.grad.sum(dim=(0, 2, 3)).abs().max() < 1e-9
    assert (features.grad * features.detach()).sum(dim=(0, 2, 3)).abs().max() < 1e-4
    small = torch.randn(2, 2, 2, 2, generator=generator(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: one(standardise, x), (small,))


def test_alignment_gives_the_teachers_mean_and_deviation():
    student = torch.randn(2, 3, 4, 5, generator=generator()) * 7 - 3
    teacher = torch.randn(2, 3, 4, 5, generator=generator(1)) * torch.tensor([0.1, 1.0, 30.0]).view(1, 3, 1, 1) + 5
    aligned = one(align, student, teacher)
    torch.testing.assert_close(aligned.mean(dim=(0, 2, 3)), teacher.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(aligned.std(dim=(0, 2, 3)), teacher.std(dim=(0, 2, 3)))


def test_alignment_by_hand():
    # 0 1 2 -> -1 0 1 -> times 6, plus 10; the teacher's 4 10 16 has mean 10 and std 6.
    row = lambda *values: torch.tensor(values, dtype=torch.float32).reshape(1, 1, 1, 3)  # noqa: E731
    assert one(align, row(0, 1, 2), row(16, 10, 4)).flatten().tolist() == pytest.approx([4, 10, 16], abs=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_maps_of_one_cell_are_finite(batch):
    student = torch.randn(batch, 3, 1, 1, generator=generator(), requires_grad=True)
    teacher = torch.randn(batch, 3, 1, 1, generator=generator(1))
    aligned = one(align, student, teacher)
    (aligned * torch.randn(batch, 3, 1, 1, generator=generator(2))).sum().backward()
    assert aligned.isfinite().all() and student.grad.isfinite().all()
    if batch == 1:  # a single value: nothing but the teacher's mean is left
        assert torch.equal(aligned, teacher) and not student.grad.any()
    else:  # two values: those of the teacher, maybe swapped
        torch.testing.assert_close(aligned.sort(dim=0).values, teacher.sort(dim=0).values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e4])
def test_constant_channels_are_finite(value):
    student = torch.full((2, 3, 4, 5), value, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 5, generator=generator())
    aligned = one(align, student, teacher)
    (aligned * torch.randn(2, 3, 4, 5, generator=generator(1))).sum().backward()
    assert aligned.isfinite().all() and student.grad.isfinite().all()
    if value == 0:
        torch.testing.assert_close(aligned, teacher.mean(dim=(0, 2, 3), keepdim=True).expand_as(teacher))


def test_dead_channels_of_a_tower_get_no_gradient():
    raw = torch.randn(2, 2, 4, 5, generator=generator())
    raw[:, 0] = -raw[:, 0].abs()
    raw.requires_grad_()
    one(align, F.relu(raw), torch.randn(2, 2, 4, 5, generator=generator(1))).square().sum().backward()
    assert not raw.grad[:, 0].any() and raw.grad[:, 1].isfinite().all()


def test_constant_channels_of_the_teacher_make_the_student_constant():
    student = torch.randn(2, 3, 4, 5, generator=generator(), requires_grad=True)
    aligned = one(align, student, torch.full((2, 3, 4, 5), 2.0))
    aligned.sum().backward()
    assert (aligned == 2).all() and student.grad.abs().max() < 1e-12


# Gradients ----------------------------------------------------------------------------------------------------------


def autograd_align(student: torch.Tensor, teacher: torch.Tensor, rectify: bool) -> torch.Tensor:
    """The formula, differentiated by autograd."""
    dims, correction = (0, 2, 3), min(1, student[:, 0].numel() - 1)
    mean, std = (
        s(dim=dims, keepdim=True) for s in (student.mean, lambda **k: student.std(**k, correction=correction))
    )
    target_mean, target_std = teacher.mean(dims, True), teacher.std(dims, correction=correction, keepdim=True)
    aligned = (student - mean) / (std + 1e-6) * target_std + target_mean
    return F.relu(aligned) if rectify else aligned


@pytest.mark.parametrize("rectify", [False, True])
def test_values_and_gradients_are_autograds_own(rectify):
    shapes = [(2, 3, 4, 5), (2, 3, 2, 2), (2, 3, 1, 1)]
    teacher = [torch.randn(shape, generator=generator(1), dtype=torch.float64) for shape in shapes]
    weights = [torch.randn(shape, generator=generator(2), dtype=torch.float64) for shape in shapes]
    results = []
    for function in (align, lambda s, t, r: [autograd_align(*pair, r) for pair in zip(s, t, strict=True)]):
        student = [torch.randn(shape, generator=generator(), dtype=torch.float64).requires_grad_() for shape in shapes]
        outputs = function(student, teacher, rectify)
        sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True)).backward()
        results.append(([output.detach() for output in outputs], [level.grad for level in student]))
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=1e-9)


def test_gradients_by_finite_differences():
    student, teacher = (torch.randn(2, 2, 2, 3, generator=generator(i), dtype=torch.float64) for i in (0, 1))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: one(align, x, teacher, rectify=True), (student,))


def test_a_level_without_gradient_among_others():
    student = [torch.randn(1, 2, 3, 3, generator=generator(i)) for i in range(2)]
    student[0].requires_grad_()
    outputs = align(student, [torch.randn(1, 2, 3, 3, generator=generator(3)) for _ in range(2)])
    outputs[0].square().sum().backward()  # nothing comes from the other
    assert student[0].grad.isfinite().all()
