"""Annotations of the rooms that `[tool.mypy]` names agree with one another."""

import os
import subprocess
import sys

import pytest
from paths import ROOT


def test_types() -> None:
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--cache-dir", os.devnull]  # writing a cache takes longer than it saves
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
