"""PKD by hand."""

import pytest
import torch
from tiny import tiny_batch, tiny_model

from crosskd_hf.distillation import PKD, DistillationPair
from crosskd_hf.distillation.methods.pkd import pkd_loss


def level(values: list[float]) -> torch.Tensor:
    """One image, one channel, one row."""
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, 1, -1)


def test_half_the_mean_squared_difference_of_standardised_values():
    # 0 and 2: mean 1, unbiased std sqrt(2): -+1/sqrt(2). Mirrored: differences of 2/sqrt(2), squared 2, half of it 1.
    assert pkd_loss([level([0, 2])], [level([7, 3])]).tolist() == pytest.approx([1.0], rel=1e-5)
    # 0 1 2: std 1: -1 0 1. 0 0 3: mean 1, std sqrt(3): -.577 -.577 1.155. Differences -.4226 .5774 -.1547, squares
    # .17863 .33333 .02393, mean .17863, half of it .08932.
    assert pkd_loss([level([0, 1, 2])], [level([0, 0, 3])]).item() == pytest.approx(0.0893164, rel=1e-4)


def test_scale_and_shift_of_a_channel_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 3, 4, 5, generator=generator)
    teacher = student * torch.tensor([2.0, 5, 0.5]).view(1, 3, 1, 1) + torch.tensor([0.0, -3, 9]).view(1, 3, 1, 1)
    assert pkd_loss([student], [teacher]).item() == pytest.approx(0, abs=1e-9)
    assert pkd_loss([student], [-teacher]).item() > 1


def test_a_value_a_level():
    first, second = level([0, 2]), level([0, 1, 2])
    losses = pkd_loss([first, second], [level([7, 3]), second])
    assert losses.shape == (2,)
    assert losses.tolist() == pytest.approx([1.0, 0.0], abs=1e-5)


def test_a_constant_channel_standardises_to_zero():
    # The teacher has unit unbiased variance: half of 17/18.
    teacher = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    assert pkd_loss([torch.zeros(2, 4, 3, 3)], [teacher]).item() == pytest.approx(0.5 * 17 / 18, rel=1e-4)


# The method ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "weight", "expected"),
    [("gfl", None, 6.0), ("retinanet", None, 2.0), ("fcos", None, 2.0), ("atss", None, 1.0), ("gfl", 0.5, 0.5)],
)
def test_the_weight_is_the_published_one_of_the_teachers_detector(teacher, weight, expected):
    pkd = PKD(PKD.Settings(weight=weight))
    pair = DistillationPair(tiny_model("atss"), tiny_model(teacher, seed=1), [pkd])
    assert pkd.weight == pkd.resolved.weight == expected and not pkd.adapters and not pair.notes


def test_the_term_is_the_weighted_sum_over_levels():
    batch, pkd = tiny_batch(), PKD(PKD.Settings(weight=3.0))
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    pair = DistillationPair(student, teacher, [pkd])
    features = [model.fpn(model.backbone(batch["pixel_values"])) for model in (student, teacher)]
    terms = pair(**batch).loss_dict
    torch.testing.assert_close(terms["kd_feature"], 3 * pkd_loss(*features).sum())
    assert {name for name in terms if name.startswith("kd_")} == {"kd_feature"}
