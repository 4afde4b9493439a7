"""Drawn data sets with several faults at once: a report or a clear error in time, no crash, no NaN, no moved box."""

from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import pytest
from fuzzing import data_sets, examine, write
from hypothesis import HealthCheck, given, settings
from tiny import tiny_model, tiny_processor

COMMON = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@pytest.fixture(scope="module", autouse=True)
def no_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def check(spec: dict, model=None, processor=None) -> None:
    with TemporaryDirectory() as folder:
        write(spec, Path(folder, "data"))
        examine(Path(folder, "data"), model, processor)


@given(data_sets())
@settings(max_examples=20, **COMMON)
def test_any_data_set_is_loaded_or_refused(spec: dict) -> None:
    check(spec)


@pytest.mark.slow
def test_a_thousand_data_sets_with_losses() -> None:
    model = tiny_model().train()
    processor = tiny_processor(model)
    given(data_sets())(settings(max_examples=1000, **COMMON)(lambda spec: check(spec, model, processor)))()
