"""What a step dispatches beyond its convolutions: few operators, no host sync, whatever the batch holds.

The counts are the same on every machine: a change that adds an operator shows here. (Class maps of over
2.6 million scores are gone through in two or three parts, with some 40 operators each, to hold less memory.)
"""

import argparse
from functools import cache

import pytest
import reporting
import step as benchmark
import torch

DETECTORS = ["gfl", "retinanet", "fcos", "atss"]
# Operators beyond the floor, at most (reference: 684 to 2782, more with every image and box). Both models' priors,
# made anew in each step, are about 80 of them, RetinaNet's 120.
BEYOND = {"gfl": 559, "retinanet": 653, "fcos": 479, "atss": 666}
SMALL = {"size": (64, 96), "backbones": ("resnet18", "resnet18"), "num_labels": 5}


@cache
def beyond(detector: str, images: int, boxes: int) -> tuple[int, int]:
    """Operators beyond the floor, and syncs."""
    step = benchmark.Step.build(detector, images, boxes, **SMALL)
    full, floor = benchmark.count(step, step.full), benchmark.count(step, step.folded_floor)
    return full.total - floor.total, full.syncs


@pytest.mark.parametrize("detector", DETECTORS)
def test_few_operators_and_no_sync(detector):
    operators, syncs = beyond(detector, 2, 8)
    assert operators <= BEYOND[detector] and syncs == 0


@pytest.mark.parametrize(("detector", "images", "boxes"), [*((d, 5, 40) for d in DETECTORS), ("gfl", 1, 1)])
def test_as_many_whatever_the_batch_holds(detector, images, boxes):
    assert beyond(detector, images, boxes) == beyond(detector, 2, 8)


# 2 images of 1161 priors and 5 classes: 11,610 scores.
@pytest.mark.parametrize(("at_once", "operators"), [(11_610, 653), (11_609, 704), (100, 743)])
def test_large_class_maps_take_three_parts_at_most(monkeypatch, at_once, operators):
    """So that the operators of two losses don't grow with the images."""
    step = benchmark.Step.build("retinanet", 2, 8, **SMALL)
    monkeypatch.setattr("crosskd_hf.models.losses.MAX_CLASS_SCORES", at_once)
    assert benchmark.count(step, step.full).total - benchmark.count(step, step.folded_floor).total <= operators


def test_syncs_are_seen():
    with benchmark.Counts() as counts:
        values = torch.arange(4.0)
        values[values > 1].sum().item()  # a mask's nonzero, and the item
    assert counts.syncs == 2


def test_memory_is_what_is_held_at_once():
    with benchmark.Counts() as counts:
        first = torch.zeros(1000)  # 4000 bytes
        second = first + 1
        del first
        third = second + 1
        view = third.view(10, 100)  # no memory of its own
        del second, third, view
    assert (counts.peak, counts.bytes) == (8000, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "nowhere.json"], "nowhere.json can't be read"),
        (["--compare", __file__], "isn't what --output writes"),
        (["--output", f"{__file__}/new.json"], "can't be written"),
    ],
)
def test_files_of_results_are_looked_at_before_anything_is_measured(arguments, message, capsys):
    parser = argparse.ArgumentParser()
    reporting.add_output(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(arguments)
    assert message in capsys.readouterr().err


def test_medians_have_intervals_and_comparisons_ratios():
    found = reporting.median_with_interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert found["median"] == 3 and 1 <= found["low"] < 3 < found["high"] <= 100 and found["count"] == 5
    rows = [{"name": "a", "ops": 300, "time": found}, {"name": "b", "ops": 1}]
    old = [{"name": "a", "ops": 400, "time": {"median": 6.0, "low": 5.0, "high": 7.0}}]
    text = reporting.comparison(rows, old, ("name",))
    assert "| a | 0.750 | 0.500 |" in text and "| b |" in text and "new" in text
