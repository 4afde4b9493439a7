"""Drawn data sets with several faults at once: a report or a clear error in time, no crash, no NaN, no moved box."""

import shutil
from pathlib import Path
from tempfile import mkdtemp

import datasets
import pytest
import torch
from fuzzing import TOLERANCE, data_sets, examine, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tiny_processor

from crosskd_hf.data.transforms import RandomFlip, SizeToFit

COMMON = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module", autouse=True)
def no_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def check(spec: dict, model=None, processor=None) -> None:
    folder = Path(mkdtemp())
    try:
        write(spec, folder / "data")
        examine(folder / "data", model, processor)
    finally:
        shutil.rmtree(folder)


@given(data_sets())
@settings(max_examples=20, **COMMON)
def test_any_data_set_is_loaded_or_refused(spec: dict) -> None:
    check(spec)


@pytest.mark.slow
def test_a_thousand_data_sets_with_losses() -> None:
    model = tiny_model().train()
    processor = tiny_processor(model)
    given(data_sets())(settings(max_examples=1000, **COMMON)(lambda spec: check(spec, model, processor)))()


@st.composite
def placed_boxes(draw) -> tuple[int, int, list[float], int, bool]:
    """An image's height and width, a box in it, a short side, and whether it is flipped."""
    height, width = (draw(st.one_of(st.integers(1, 900), st.sampled_from([1, 2]))) for _ in range(2))
    x, y = draw(st.floats(0, width)), draw(st.floats(0, height))
    box = [x, y, draw(st.floats(x, width)), draw(st.floats(y, height))]
    return height, width, box, draw(st.sampled_from([2, 32, 480, 800])), draw(st.booleans())


@given(placed_boxes())
@settings(max_examples=100, **COMMON)
def test_a_box_comes_back_through_every_transform(case: tuple) -> None:
    """In original pixels, within a hundredth; images keep their ratio up to the rounding of their sides."""
    height, width, box, short_side, flip = case
    sample = {"image": torch.zeros(3, height, width, dtype=torch.uint8), "boxes": torch.tensor([box])}
    sample = SizeToFit(short_side, 1333)(RandomFlip(float(flip))(sample))
    new_height, new_width = sample["size"]
    left, top, right, bottom = sample["boxes"][0].tolist()
    if flip:
        left, right = new_width - right, new_width - left
    x, y = width / new_width, height / new_height
    back = left * x, top * y, right * x, bottom * y
    assert max(abs(a - b) for a, b in zip(back, box, strict=True)) <= TOLERANCE
