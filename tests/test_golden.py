"""Equality with the reference implementation, number for number: `pytest tests/test_golden.py [--golden DIR]`."""

from pathlib import Path

import pytest
from golden_cases import GoldenCase


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--golden"))
        names = sorted(p.stem for p in folder.glob("*.json") if p.stem != "preprocessing")
        metafunc.parametrize("case", names)


def test_case(case: str, golden: Path, golden_report: dict[str, str]) -> None:
    result = GoldenCase(golden, case).run()
    golden_report[case] = result.summary()
    assert not result.failures, "\n".join(result.failures[:20])
