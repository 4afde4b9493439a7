"""COCO's metrics for people: in percent, as a table."""

from collections.abc import Mapping

from ..utils.escaping import printable
from .coco_metrics import SUMMARY_NAMES


def format_metrics(metrics: Mapping[str, float]) -> str:
    """A table in percent: the 12 numbers of `SUMMARY_NAMES` in two rows, then a line per class.

    Args:
        metrics: as `CocoEvaluator.compute` returns them, in 0..1. -1 (no ground truth) is shown as a dash, and other
            names than those of `compute` are left out.
    """
    lines = []
    for names in (SUMMARY_NAMES[:6], SUMMARY_NAMES[6:]):
        present = [name for name in names if name in metrics]
        if present:
            lines.append("".join(f"{name:>8}" for name in present))
            lines.append("".join(f"{percent(metrics[name]):>8}" for name in present))
    classes = [(printable(name[3:]), value) for name, value in metrics.items() if name.startswith("AP/")]
    if classes:
        width = max(len("class"), *(len(name) for name, _ in classes))
        lines += ["", f"{'class':<{width}}{'AP':>8}"]
        lines += [f"{name:<{width}}{percent(value):>8}" for name, value in classes]
    return "\n".join(lines)


def percent(value: float) -> str:
    """A metric of 0..1 in percent; -1, which no ground truth speaks for, as a dash."""
    return "-" if value == -1 else f"{100 * value:.1f}"
