"""`benchmarks/gpu.py` on the CPU: its checks pass on small sizes, and one that fails leaves the others alone."""

import dataclasses
import importlib
import json
import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path

import gpu
import gpu_backward
import gpu_checks
import gpu_speed
import pytest
import torch

import crosskd_hf

FORK = multiprocessing.get_context("fork")  # at once: nothing is to be imported
SMALL = {"size": (64, 64), "batch": 1, "side": 64, "small": ("lcnet_050", "lcnet_050"), "steps": 1, "runs": 1}
TINY = dataclasses.replace(gpu.CPU, detectors=("gfl",), precisions=("fp32",), **SMALL)


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "WARM_UP", 1)


def rows_of(section: Callable, options: gpu.Options = TINY) -> list[dict]:
    return list(gpu.rows_of("section", section, options))


@pytest.mark.parametrize("section", [gpu.folding, gpu.backward, gpu.steps, gpu.speed])
def test_sections_pass_on_the_cpu(section: Callable) -> None:
    rows = rows_of(section)
    assert rows and [row["result"] for row in rows] == ["ok"] * len(rows)


def test_the_detectors_of_torchvision_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_speed, "RIVALS", {"fcos": gpu_speed.RIVALS["fcos"]})
    assert [row["result"] for row in rows_of(gpu.rivals)] == ["ok", "ok"]  # training and inference


def test_every_backward_that_is_written_by_hand_is_checked() -> None:
    names = [module.name for module in pkgutil.walk_packages(crosskd_hf.__path__, "crosskd_hf.")]
    modules = [importlib.import_module(name) for name in names]
    written = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, torch.autograd.Function) and value.__module__ in names
    }
    assert written == {pair.hand for pair in gpu_backward.PAIRS.values()} - {None}


def test_a_wrong_backward_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = gpu_backward.PAIRS["quality_focal_loss"]
    wrong = dataclasses.replace(pair, plain=lambda x: gpu_backward.scaled_entropy(x[0], x[0].detach(), 2))
    monkeypatch.setattr(gpu_backward, "PAIRS", {"wrong": wrong})
    assert all(row["result"].startswith("FAILED: they differ") for row in rows_of(gpu.backward))


def test_a_teacher_that_is_not_folded_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "prepared_teacher", lambda teacher: teacher)
    (row,) = rows_of(gpu.folding)
    assert "20 of 20 BatchNorms are left" in row["result"]


@pytest.mark.parametrize("wait", [lambda loss: loss.item(), lambda loss: torch.tensor([1.0], device=loss.device)])
def test_a_step_that_waits_for_the_device_fails(monkeypatch: pytest.MonkeyPatch, wait: Callable) -> None:
    losses = gpu_checks.DistillationTrainer.compute_loss

    def waiting(self, *args, **options):
        loss = losses(self, *args, **options)
        wait(loss)
        return loss

    monkeypatch.setattr(gpu_checks.DistillationTrainer, "compute_loss", waiting)
    result = gpu_checks.train_steps(TINY, "gfl", "fp32", [])
    assert result["problem"] == "the host waits 1 times"


# Failures -----------------------------------------------------------------------------------------------------------


def failing(options: gpu.Options) -> gpu.Checks:
    """Checks that fail in each way, between two that pass."""

    def broken() -> dict:
        raise ValueError("two\nlines")

    yield "first", lambda: {"value": 1}
    yield "problem", lambda: {"problem": "too large", "value": 2}
    yield "error", broken
    yield "last", lambda: {"value": 3}


def half(options: gpu.Options) -> gpu.Checks:
    yield "first", lambda: {}
    raise RuntimeError("no more")


def dying(options: gpu.Options) -> gpu.Checks:
    yield "first", lambda: {}
    yield "second", lambda: os._exit(7)


def test_a_check_that_fails_leaves_the_others_alone() -> None:
    results = {row["check"]: (row["result"], row.get("value")) for row in rows_of(failing)}
    assert results == {
        "first": ("ok", 1),
        "problem": ("FAILED: too large", 2),
        "error": ("FAILED: ValueError: two lines", None),
        "last": ("ok", 3),
    }
    assert [row["result"] for row in rows_of(half)] == ["ok", "FAILED: RuntimeError: no more"]


def test_a_section_that_dies_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu, "SECTIONS", {"dying": dying, "half": half})
    monkeypatch.setattr(gpu, "isolating_context", lambda device: FORK)
    output = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--output", str(output)])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    rows = json.loads(output.read_text())["rows"]
    found = [(row["section"], row["result"]) for row in rows]
    assert found[0] == ("dying", "ok") and "status 7" in found[1][1]
    assert found[2] == ("half", "ok") and "no more" in found[3][1]
    said = capsys.readouterr().out
    assert "status 7" in said and "2 failed" in said
