"""Progress on a terminal, in a log file, and quiet."""

import io
import sys

import pytest

from crosskd_hf.utils import progress
from crosskd_hf.utils.progress import Progress, duration, say


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def loud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_quiet", False)
    monkeypatch.delenv("RANK", raising=False)


def use(count: int, total: int | None, unit: str = "images", lines: bool = True) -> None:
    with Progress("check", total, unit, lines=lines) as bar:
        for _ in range(count):
            bar.update()


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    use(3, 3)
    assert "check: 100%" in terminal.getvalue() and "3/3" in terminal.getvalue()


def test_a_file_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    times = iter([0.0, 10.0, 31.0, 31.0, 31.0, 40.0, 62.0, 62.0, 62.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    use(4, 8)  # at 10, 31, 40 and 62 seconds; each line reads the clock twice more
    assert capsys.readouterr().err.splitlines() == [
        "check: 2 of 8 images, 0:01:33 left",
        "check: 4 of 8 images, 0:01:02 left",
    ]


def test_bytes_and_unknown_totals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    with Progress("download", None, "B") as bar:
        bar.update(5_000_000)
    assert capsys.readouterr().err.splitlines() == ["download: 5 MB"]
    assert duration(3723.4) == "1:02:03"


@pytest.mark.parametrize("how", ["flag", "other process", "lines elsewhere"])
def test_nothing(how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    if how == "flag":
        monkeypatch.setattr(progress, "_quiet", True)
    elif how == "other process":
        monkeypatch.setenv("RANK", "1")
    use(3, 3, lines=how != "lines elsewhere")
    if how != "lines elsewhere":
        say("hello")
    assert capsys.readouterr() == ("", "")
