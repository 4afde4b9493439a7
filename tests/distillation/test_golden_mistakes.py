"""Golden cases notice mistakes: each of ten made on purpose fails one. Run with `pytest -m slow`."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import test_prediction_losses
import torch
from golden_cases import GoldenCase
from torch import Tensor
from torch.nn import functional as F

from crosskd_hf.distillation import alignment
from crosskd_hf.distillation import prediction_losses as losses
from crosskd_hf.distillation.observers import dense
from crosskd_hf.models.base import DenseDetector
from crosskd_hf.models.head import DenseHead

Patch = pytest.MonkeyPatch


def detached_factor(patch: Patch) -> None:
    """|p - p_teacher| of kd_cls without gradient: no loss differs."""

    def loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
        target = teacher_logits.sigmoid()
        factor = (logits.detach().sigmoid() - target).abs()
        return (factor * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).sum(dim=-1)

    patch.setattr(losses, "binary_kd_loss", loss)


def biased_deviation(patch: Patch) -> None:
    def statistics(maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        pairs = [torch.std_mean(m, dim=(0, 2, 3), correction=0) for m in maps]
        return torch.stack([mean for _, mean in pairs]), torch.stack([std for std, _ in pairs])

    patch.setattr(alignment, "channel_statistics", statistics)


def statistics_of_the_batch(patch: Patch) -> None:
    """One mean and deviation per channel for all levels."""

    def statistics(maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        std, mean = torch.std_mean(torch.cat([m.transpose(0, 1).flatten(1) for m in maps], dim=1), dim=1)
        return mean.expand(len(maps), -1), std.expand(len(maps), -1)

    patch.setattr(alignment, "channel_statistics", statistics)


def no_second_relu(patch: Patch) -> None:
    patch.setattr(dense, "align", lambda student, teacher, rectify: alignment.align(student, teacher))


def tap_off_by_one(patch: Patch) -> None:
    forward = DenseHead.forward

    def early(self: DenseHead, *args: list[Tensor], tap_index: int | None = None, **options):
        return forward(self, *args, tap_index=None if tap_index is None else tap_index - 1, **options)

    patch.setattr(DenseHead, "forward", early)


def swapped_normaliser(patch: Patch) -> None:
    published = dataclasses.replace(losses.PUBLISHED["crosskd_fcos"], box_normalizer=False)
    patch.setitem(losses.PUBLISHED, "crosskd_fcos", published)


def mask_of_the_teacher(patch: Patch) -> None:
    """Without the priors that the student's assignment ignores."""
    targets = losses.KDTargets.of

    def of_teacher(student, teacher, *options):
        return dataclasses.replace(targets(student, teacher, *options), mask=teacher.predictions.mask)

    patch.setattr(losses.KDTargets, "of", of_teacher)


def padding_counted(patch: Patch) -> None:
    valid_priors = DenseDetector.valid_priors
    patch.setattr(DenseDetector, "valid_priors", lambda *args: torch.ones_like(valid_priors(*args)))


def summed_sides(patch: Patch) -> None:
    """The KL divergence of a box's four sides, instead of their mean."""
    of_a_side = losses.bin_kl_loss
    patch.setattr(losses, "bin_kl_loss", lambda *args: 4 * of_a_side(*args))


MISTAKES: list[tuple[Callable[[Patch], None], str, str]] = [
    # What is wrong, the case that notices it, and the first kind of number that does.
    (detached_factor, "gfl_r18_crosskd", "grad"),
    (biased_deviation, "fcos_r50_crosskd_pkd", "losses"),
    (statistics_of_the_batch, "gfl_r18_crosskd", "probes"),
    (no_second_relu, "gfl_r18_crosskd", "probes"),
    (tap_off_by_one, "gfl_r18_crosskd", "probes"),
    (swapped_normaliser, "fcos_r50_crosskd", "losses"),
    (mask_of_the_teacher, "retinanet_r18_tap1_crowd", "losses"),
    (padding_counted, "gfl_r18_crosskd", "losses"),
    (summed_sides, "gfl_r18_crosskd", "losses"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mistake", "name", "kind"), MISTAKES, ids=[mistake.__name__ for mistake, _, _ in MISTAKES])
def test_a_case_notices(
    mistake: Callable[[Patch], None], name: str, kind: str, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = GoldenCase(golden, name)
    mistake(monkeypatch)
    assert any(failure.startswith(kind) for failure in case.run(steps=False).failures)


@pytest.mark.slow
def test_a_logarithm_without_clamp_is_noticed_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """No case binds the clamps of FCOS's -log IoU: both boxes always contain the same point."""
    monkeypatch.setattr(losses, "EPS", 0.0)
    with pytest.raises(AssertionError):
        test_prediction_losses.test_boxes_apart_have_a_bounded_logarithm()
