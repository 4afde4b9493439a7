"""Files that are there whole or not at all, and stay."""

import os
from pathlib import Path


def folder_problem(path: str) -> str | None:
    """Why a folder can't be written to, as a sentence; None if it can be, or can be made."""
    if not path.strip():
        return f"{path!r} names no folder: name one"
    folder = Path(path).expanduser()
    for place in (folder, *folder.parents):
        if place.is_symlink() and not place.exists():
            return f"{place} is a link to {os.readlink(place)}, which isn't there: name another folder"
        if place.exists():
            return None if place.is_dir() else f"{place} is a file: name a folder"
    return None


def flush_to_disk(path: Path) -> None:
    """Wait until a file's contents would outlast a power cut.

    Raises:
        OSError: it can't be opened, or the disk failed.
    """
    with open(path, "r+b") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that appears complete or not at all; an earlier one stays until then.

    Raises:
        OSError: it can't be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:  # a disk that is full shouldn't keep half of it
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    if os.name == "posix":  # elsewhere folders can't be opened
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
