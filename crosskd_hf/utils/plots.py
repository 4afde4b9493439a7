"""PNG charts. matplotlib is imported when one is drawn, not with the package."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .escaping import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of a size in inches, without any window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, format="png")


def bars(figure: "Figure", position: tuple[int, int, int], title: str, counts: Mapping[str, int]) -> None:
    """Horizontal bars in one field of a figure's grid, the first on top.

    Args:
        figure: to draw on.
        position: rows, columns and number of the field, as matplotlib counts.
        title: above the field.
        counts: name -> value.
    """
    axes = figure.add_subplot(*position)
    axes.barh(range(len(counts)), list(counts.values()))
    # Between two $ matplotlib reads a formula; equal names, once they are escaped, would share a bar.
    axes.set_yticks(range(len(counts)), [printable(name).replace("$", r"\$") for name in counts])
    axes.invert_yaxis()
    axes.set_title(printable(title).replace("$", r"\$"), fontsize="medium")
    axes.tick_params(labelsize="small")


def as_svg(figure: "Figure") -> str:
    """A figure as an SVG document."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()
