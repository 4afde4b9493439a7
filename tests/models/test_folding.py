import logging

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F

from crosskd_hf.models import CONFIGS, MODELS
from crosskd_hf.models.backbone import batchnorms
from crosskd_hf.models.batchnorm_folding import fold_batchnorms


def backbone(name: str, **options):
    """A backbone whose BatchNorms are far from being the identity."""
    torch.manual_seed(0)
    model = MODELS["gfl"](CONFIGS["gfl"](backbone=name, **options)).eval().requires_grad_(False)
    for norm in batchnorms(model.backbone):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    return model.backbone


@pytest.mark.parametrize(
    ("name", "left"),
    [("resnet18", 0), ("lcnet_050", 0), ("regnety_002", 0), ("resnetv2_50", 16)],  # the last norms before convolving
)
@torch.no_grad()
def test_maps_are_the_same_without_the_norms(name: str, left: int) -> None:
    original = backbone(name)
    state = {key: value.clone() for key, value in original.state_dict().items()}
    folded = fold_batchnorms(original)
    assert len(list(batchnorms(folded))) == left < len(list(batchnorms(original)))
    pixels = torch.randn(2, 3, 64, 96)
    for ours, theirs in zip(folded(pixels), original(pixels), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())
    assert all(torch.equal(value, state[key]) for key, value in original.state_dict().items())
    assert not any(p.requires_grad for p in folded.parameters())


def round_to_tf32(values: torch.Tensor) -> torch.Tensor:
    """10 bits of mantissa, as a GPU's fp32 convolutions take them."""
    if values.dtype != torch.float32:
        return values
    return ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_a_gpus_tf32_is_no_reason_not_to_fold(monkeypatch, caplog) -> None:
    convolve = F.conv2d

    def in_tf32(pixels, weight, *rest):
        return convolve(round_to_tf32(pixels), round_to_tf32(weight), *rest)

    original = backbone("resnet18")
    monkeypatch.setattr(F, "conv2d", in_tf32)
    with caplog.at_level(logging.INFO, "crosskd_hf"):
        folded = fold_batchnorms(original)
    assert "folded 20 of 20 BatchNorms" in caplog.text
    assert not list(batchnorms(folded))
    assert {p.dtype for p in folded.parameters()} == {torch.float32}


def test_a_norm_by_hand() -> None:
    # A convolution of weight 2, then (x - 1) / sqrt(3 + 1) * 5 + 7: for x = 3, (6 - 1) / 2 * 5 + 7 = 19.5.
    convolution, norm = nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1, eps=1.0)
    nn.init.constant_(convolution.weight, 2.0)
    norm.running_mean.fill_(1.0)
    norm.running_var.fill_(3.0)
    nn.init.constant_(norm.weight, 5.0)
    nn.init.constant_(norm.bias, 7.0)
    body = nn.Sequential(convolution, norm, nn.ReLU()).eval()
    folded = fold_batchnorms(_Maps(body))
    assert [type(module) for module in folded.body] == [nn.Conv2d, nn.Identity, nn.ReLU]
    assert folded(torch.full((1, 3, 1, 1), 3.0))[0].item() == pytest.approx(19.5)


def test_an_output_that_is_used_elsewhere_too_stays(caplog) -> None:
    body = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).eval()
    body[1].running_mean.fill_(1.0)
    given = _Both(body)
    assert fold_batchnorms(given) is given
    assert "folded 0 of 1 BatchNorms" in caplog.text and caplog.records[-1].levelno == logging.WARNING


def test_a_convolution_that_runs_twice_stays() -> None:
    body = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).eval()
    given = _Maps(nn.Sequential(body, body))
    assert len(list(batchnorms(fold_batchnorms(given)))) == 1


def test_activations_of_fused_norms_stay() -> None:
    body = nn.Sequential(nn.Conv2d(1, 1, 1), BatchNormAct2d(1)).eval()
    nn.init.constant_(body[0].weight, -1.0)
    nn.init.zeros_(body[0].bias)
    folded = fold_batchnorms(_Maps(body))
    assert not list(batchnorms(folded))
    assert folded(torch.ones(1, 3, 1, 1))[0].item() == 0  # by its ReLU


class _Maps(nn.Module):
    """One channel through a body."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        return [self.body(pixels[:, :1])]


class _Both(_Maps):
    """The convolution's output, and the norm's."""

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        raw = self.body[0](pixels[:, :1])
        return [raw, self.body[1](raw)]
