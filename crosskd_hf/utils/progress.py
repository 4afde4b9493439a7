"""What long work says while it runs: a bar on a terminal, a line now and then in a log file, nothing when quiet."""

import datetime
import os
import sys
import time

import datasets
import huggingface_hub
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from .escaping import printable_lines

LINE_SECONDS = 30  # between two lines of a progress in a log file
_quiet = False


def set_quiet(quiet: bool) -> None:
    """Choose for this process whether progress is shown. Results, warnings and errors always are.

    The bars of the libraries underneath are shown on terminals only: a log file would get each of their states.
    """
    global _quiet
    _quiet = quiet
    if quiet or not sys.stderr.isatty():
        datasets.disable_progress_bars()
        huggingface_hub.utils.disable_progress_bars()
        transformers_logging.disable_progress_bar()


def is_quiet() -> bool:
    """Whether this process shows no progress: by `set_quiet`, or because it is not the first of several."""
    return _quiet or os.environ.get("RANK", "0") != "0"


def say(text: str) -> None:
    """Print a message about the work itself, unless quiet."""
    if not is_quiet():
        print(printable_lines(text), flush=True)


class Progress:
    """The progress of something long, as a context.

    Args:
        name: of the work.
        total: units in all; None if unknown.
        unit: what is counted; "B" are bytes, shown as kB, MB, ...
        initial: units that are done already.
        lines: whether a log file gets lines; not where it gets others anyway.
    """

    def __init__(self, name: str, total: int | None, unit: str, initial: int = 0, lines: bool = True):
        self.name, self.total, self.unit = name, total, unit
        self.done, self.initial = initial, initial
        self.lines = lines and not is_quiet()
        self.start = self.said = time.monotonic()
        self.bar = None
        if not is_quiet() and sys.stderr.isatty():
            self.lines = False
            options = {"unit": unit, "unit_scale": unit == "B", "initial": initial, "dynamic_ncols": True}
            self.bar = tqdm(total=total, desc=name, **options)

    def update(self, count: int = 1) -> None:
        """Some more units are done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif self.lines and time.monotonic() - self.said >= LINE_SECONDS:
            self.said = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def remaining(self) -> float | None:
        """Seconds that are left at the speed so far; None if that can't be told."""
        if not self.total or self.done <= self.initial:
            return None
        return (time.monotonic() - self.start) * (self.total - self.done) / (self.done - self.initial)

    def close(self) -> None:
        """It is over."""
        if self.bar is not None:
            self.bar.close()

    def _line(self) -> str:
        if self.unit == "B":
            done, total = (None if value is None else f"{value / 1e6:.0f} MB" for value in (self.done, self.total))
        else:
            done, total = f"{self.done}", None if self.total is None else f"{self.total} {self.unit}"
        line = f"{self.name}: {done} of {total}" if total else f"{self.name}: {done}"
        remaining = self.remaining()
        return line if remaining is None else f"{line}, {duration(remaining)} left"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    return str(datetime.timedelta(seconds=round(seconds)))
