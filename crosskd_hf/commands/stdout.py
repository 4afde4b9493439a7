"""What a program prints when nobody takes it any more: a closed pipe or a full disk is no reason to end a run."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO


class LenientStream:
    """A text stream whose first failed write is noted, and which drops everything from then on.

    Attributes:
        error: why it couldn't be written; None as long as it can.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write, or drop, all of a text."""
        with self._noting_errors():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write, or drop, each text."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Hand over what is buffered, or drop it."""
        with self._noting_errors():
            self._stream.flush()

    @contextlib.contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            # What is still in the buffer is written to nowhere, now and when Python ends.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lenient_output(results: bool = True) -> Iterator[None]:
    """Around a command: stdout and stderr may be closed, a pipe that nobody reads, or a full disk.

    Args:
        results: stdout is what the command is for.

    Raises:
        SystemExit: with status 1 if it is, and stdout couldn't be written. A pipe whose reader has had enough (`head`)
            is no error.
    """
    before = sys.stdout, sys.stderr
    # A closed one is None. It is opened again: else, the next file that is opened would get its number, and be written
    # to by what prints below Python.
    out, err = (LenientStream(stream or open(os.devnull, "w", encoding="utf-8")) for stream in before)
    if hasattr(out, "reconfigure"):  # what the locale's encoding lacks is escaped, as Python does it on stderr
        out.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    try:
        yield
    finally:
        out.flush()
        failed = out.error is not None and out.error.errno != errno.EPIPE
        if failed:
            err.write(f"stdout couldn't be written ({out.error.strerror}): what was printed is not complete\n")
        err.flush()
        sys.stdout, sys.stderr = before
    if failed and results:
        raise SystemExit(1)
