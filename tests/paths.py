"""Folders of the repository."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
BENCHMARKS, EXAMPLES, RECIPES = ROOT / "benchmarks", ROOT / "examples", ROOT / "recipes"
