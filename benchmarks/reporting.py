"""What benchmarks share: medians with intervals, tables, JSON, and the comparison with an earlier JSON."""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESAMPLES = 2000


def add_output(parser: argparse.ArgumentParser) -> None:
    """The arguments of every benchmark."""
    parser.add_argument("--output", type=_writable, help="write the results there, as JSON")
    parser.add_argument("--compare", type=_results, metavar="OLD.json", help="show what changed since those results")


def _writable(name: str) -> Path:
    """A file that can be written; known before anything is measured."""
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{name} can't be written ({error.strerror})") from error
    return path


def _results(name: str) -> tuple[str, list[dict]]:
    """An earlier file of results, and its rows."""
    try:
        return name, json.loads(Path(name).read_text(encoding="utf-8"))["rows"]
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{name} can't be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{name} isn't what --output writes") from error


def median_with_interval(values: Sequence[float]) -> dict[str, float]:
    """Median and its 95% interval, by resampling (always the same samples)."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    low, high = medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES) - 1]
    return {"median": statistics.median(values), "low": low, "high": high, "count": len(values)}


def shown(value: object) -> str:
    """A cell of a table."""
    if isinstance(value, dict):
        return f"{value['median']:.3f} ({value['low']:.3f}..{value['high']:.3f})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[dict], columns: Sequence[str] | None = None) -> str:
    """Rows as a Markdown table."""
    columns = list(columns or dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(shown(row.get(c, "")) for c in columns) + " |" for row in rows])


def write(path: Path, rows: list[dict]) -> None:
    """Write the rows as JSON, with machine and commit."""
    content = {"machine": machine(), "commit": commit(), "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def finish(arguments: argparse.Namespace, rows: list[dict], key: Sequence[str], by: str | None = None) -> None:
    """Write and print the rows, and compare them with earlier ones of equal `key` fields.

    Args:
        arguments: see `add_output`.
        rows: of the table.
        key: fields that name a row.
        by: a field, each value of which gets a table of its own.
    """
    if arguments.output:
        write(arguments.output, rows)
    for value in dict.fromkeys(row.get(by) for row in rows):
        own = [{name: cell for name, cell in row.items() if name != by} for row in rows if row.get(by) == value]
        print((f"\n{value}\n\n" if by else "") + table(own))
    if arguments.compare:
        name, old = arguments.compare
        print(f"\nAgainst {name}:\n{comparison(rows, old, key)}")


def comparison(rows: list[dict], old: list[dict], key: Sequence[str]) -> str:
    """New / old of every number, row by row."""
    before = {tuple(row.get(k) for k in key): row for row in old}
    lines = []
    for row in rows:
        other = before.get(tuple(row.get(k) for k in key))
        if other is None:
            lines.append({**{k: row.get(k) for k in key}, "": "new"})
            continue
        ratios = {}
        for name, value in row.items():
            if name in key or name not in other:
                continue
            mine, theirs = (v["median"] if isinstance(v, dict) else v for v in (value, other[name]))
            if isinstance(mine, (int, float)) and isinstance(theirs, (int, float)):
                ratios[name] = f"{mine / theirs:.3f}" if theirs else ("same" if mine == theirs else f"0 -> {mine}")
        lines.append({**{k: row.get(k) for k in key}, **ratios})
    return table(lines)


def machine() -> dict[str, object]:
    """On what was measured."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def commit() -> str:
    """The checkout's commit."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
