"""What is told before a run starts."""

from types import SimpleNamespace

import pytest
import torch

from crosskd_hf.recipe.preflight import precision


@pytest.mark.parametrize(
    ("chosen", "told"), [("tf32", ", TF32 in convolutions and matrix products"), ("none", ", TF32 in convolutions")]
)
def test_tf32_is_read_as_transformers_sets_it(monkeypatch: pytest.MonkeyPatch, chosen: str, told: str) -> None:
    """Once it is set so, torch refuses to read the older `allow_tf32`."""
    monkeypatch.setattr(torch.backends, "fp32_precision", chosen)
    trainer = SimpleNamespace(precision="fp32", args=SimpleNamespace(device=torch.device("cuda")))
    assert precision(trainer) == f"fp32{told}"
