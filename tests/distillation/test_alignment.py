"""Maps with given statistics per channel: values, gradients and degenerate maps by hand."""

import math

import pytest
import torch

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


@pytest.mark.parametrize("value", [0.0, -3.7, 1e4])
def test_constant_channels_are_finite(value):
    student = torch.full((2, 3, 4, 5), value, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 5, generator=generator())
    aligned = one(align, student, teacher)
    (aligned * torch.randn(2, 3, 4, 5, generator=generator(1))).sum().backward()
    assert aligned.isfinite().all() and student.grad.isfinite().all()
    if value == 0:
        torch.testing.assert_close(aligned, teacher.mean(dim=(0, 2, 3), keepdim=True).expand_as(teacher))


def test_constant_channels_of_the_teacher_make_the_student_constant():
    student = torch.randn(2, 3, 4, 5, generator=generator(), requires_grad=True)
    aligned = one(align, student, torch.full((2, 3, 4, 5), 2.0))
    aligned.sum().backward()
    assert (aligned == 2).all() and student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("rectify", [False, True])
def test_gradients_flow_through_both_statistics(rectify):
    student, teacher = (torch.randn(2, 2, 2, 3, generator=generator(i), dtype=torch.float64) for i in (0, 1))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: one(align, x, teacher, rectify=rectify), (student,))
    assert torch.autograd.gradcheck(lambda x: one(standardise, x), (student,))


def test_levels_must_match_in_number():
    with pytest.raises(ValueError, match="2 maps can't be aligned to 1"):
        align([torch.zeros(1, 1, 2, 2)] * 2, [torch.zeros(1, 1, 2, 2)])
