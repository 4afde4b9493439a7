"""One run per output folder."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK = "_lock"  # names with an underscore aren't pushed to the Hub


class FolderInUseError(ValueError):
    """Another run is writing to the output folder."""


@contextlib.contextmanager
def folder_lock(output_dir: str | Path) -> Iterator[None]:
    """Keep other runs out of a folder; one process a run is to call it.

    If only a launcher is killed, the processes that it started still write. The lock is the operating system's, so
    it goes with its process, however that ends. It isn't inherited by data workers, which outlive a killed parent by
    seconds. Without `fcntl` (Windows) nothing is locked.

    Raises:
        FolderInUseError: a living process has it, with its number.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = Path(output_dir) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # which of them depends on the system
            file.seek(0)
            raise FolderInUseError(
                f"another run is writing to training.output_dir {output_dir} ({file.read().strip()}): wait for it or "
                "end it, or name another training.output_dir"
            ) from error
        except OSError as error:  # a file system without locks
            logger.warning("%s can't be locked against a second run: %s", output_dir, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
