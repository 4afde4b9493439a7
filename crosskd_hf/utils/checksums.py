"""The marker of a complete checkpoint: it lists the folder's files with their SHA-256."""

import json
from pathlib import Path

from .files import flush_to_disk, sha256, write_atomically

MARKER = "complete.json"


def mark_complete(folder: str | Path) -> None:
    """Write the marker of a checkpoint, which lists every file in it with its size and SHA-256.

    The files are flushed to the disk first and the marker appears at once, so that a power cut can't leave a marker
    over missing data. SHA-256 because it is the one checksum that every machine has a tool for (`sha256sum`), and the
    hardware makes it about as fast as reading; a size alone would miss blocks of zeros after a crash.

    Args:
        folder: a checkpoint that no process writes to any more.

    Raises:
        ValueError: there is nothing in it.
        OSError: it can't be read or written.
    """
    folder = Path(folder)
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() != MARKER:
            flush_to_disk(path)
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    if not files:
        raise ValueError(f"{folder} holds no files: it can't be a complete checkpoint")
    write_atomically(folder / MARKER, json.dumps({"files": files}, indent=1))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint that has a marker, naming the file; None if nothing is.

    Files that the marker doesn't list are no damage: others may have added them.
    """
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = folder / name
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if sha256(path) != expected["sha256"]:
                return f"the contents of {name} have changed (SHA-256)"
    except OSError as error:
        return f"{Path(error.filename or MARKER).name} can't be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MARKER} isn't one that this program wrote"
    return None
