"""stdout and stderr that nobody takes."""

import errno
import io
import os
import sys
from collections.abc import Iterator

import pytest

from crosskd_hf.commands import main as cli
from crosskd_hf.commands.stdout import lenient_output


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """stdout is a pipe, whose end to read from is given."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        yield reading


def full() -> io.TextIOWrapper:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    return open("/dev/full", "w")


def test_a_reader_that_has_had_enough_is_no_error(pipe: int, capsys: pytest.CaptureFixture) -> None:
    os.close(pipe)
    steps = 0
    with lenient_output():
        for _ in range(3):
            sys.stdout.writelines(["a line\n"] * 10_000)  # more than the buffer takes
            print("a line", flush=True)
            steps += 1
        print("left in the buffer")
    sys.stdout.flush()  # as Python does at its end
    assert steps == 3 and capsys.readouterr().err == ""


@pytest.mark.parametrize("results", [False, True])
def test_a_full_disk_ends_only_what_prints_results(
    results: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    steps, status = 0, None
    with full() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        try:
            with lenient_output(results):
                for _ in range(3):
                    print("a line", flush=True)
                    steps += 1
        except SystemExit as ended:
            status = ended.code
        sys.stdout.flush()
    assert steps == 3 and status == (1 if results else None)
    assert os.strerror(errno.ENOSPC) in capsys.readouterr().err


def test_what_is_buffered_at_the_end_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    with full() as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit, match="1"), lenient_output():
            print("a result")


def test_closed_streams_take_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with lenient_output():
        print("a line")
        sys.stdout.flush()
        assert not sys.stderr.isatty()
    assert sys.stdout is None


def test_what_the_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with lenient_output():
        print("Bücher")
    assert stream.buffer.getvalue() == b"B\\xfccher\n"


def test_a_command_ends_without_a_traceback(pipe: int) -> None:
    os.close(pipe)
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
