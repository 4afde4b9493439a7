"""Files that are there complete or not at all, and stay; and folders that can't be written."""

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: a limit of the shell (ulimit -f)
# How safetensors (Rust) and torch.save (C++) report a write that failed: neither raises an OSError.
FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter", "unexpected pos ")
SHARED_MEMORY = "unable to write to file </torch_"  # how torch says that /dev/shm is full


class CacheError(OSError):
    """A cache's folder that can't be used, and the settings that move it."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is that of a full disk, as Python, safetensors or torch says it."""
    while error is not None and SHARED_MEMORY not in str(error):
        full = isinstance(error, OSError) and error.errno in FULL
        if full or (not isinstance(error, OSError) and any(text in str(error) for text in FULL_TEXTS)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def cache_explained(folder: Path, settings: str) -> Iterator[None]:
    """Around what reads and fills a cache: name the folder, and the settings that move it, if it can't be used.

    Args:
        folder: of the cache.
        settings: that choose another folder.

    Raises:
        CacheError: the disk is full, there is no home directory, or the folder can't be made, read or written. Other
            errors pass as they are.
    """
    advice = f"set {settings} to a folder that you may write to, on a disk with free space"
    if folder.parts[:1] == ("~",):  # what `expanduser` leaves where it finds no home: it would be made here
        raise CacheError(f"there is no home directory for the cache {folder}: set HOME, or {advice}")
    folder = Path(os.path.abspath(folder))
    try:
        yield
    except CacheError:
        raise
    except Exception as error:
        reason = "the disk is full" if is_disk_full(error) else _refusal(error, folder)
        if reason is None:
            raise
        raise CacheError(f"the cache {folder} can't be used ({reason}): {advice}") from error


def _refusal(error: BaseException | None, folder: Path) -> str | None:
    """Why a folder, one above it or something in it can't be made, read or written, if that is what an error says."""
    while error is not None:
        if isinstance(error, OSError) and isinstance(error.filename, str):
            path = Path(os.path.abspath(error.filename))
            if path.is_relative_to(folder) or folder.is_relative_to(path):
                return f"{error.filename}: {error.strerror}"
        error = error.__cause__ or error.__context__
    return None


def folder_problem(path: str) -> str | None:
    """Why a folder can't be written to, as a sentence; None if it can be, or can be made."""
    if not path.strip():
        return f"{path!r} names no folder: name one"
    folder = Path(path).expanduser()
    place = next(place for place in (folder, *folder.parents) if place.exists() or place.is_symlink())
    if not place.exists():
        return f"{place} is a link to {os.readlink(place)}, which isn't there: name another folder"
    if not place.is_dir():
        return f"{place} is a file: name a folder"
    if place != folder:
        try:
            tempfile.TemporaryDirectory(dir=place).cleanup()  # tried out: permissions don't tell it, such as of /proc
        except OSError as error:
            return f"{folder} can't be made in {place} ({error.strerror}): name another folder"
    return None


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's content.

    Raises:
        OSError: it can't be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Wait until a file's contents would outlast a power cut.

    Raises:
        OSError: it can't be opened, or the disk failed.
    """
    with open(path, "r+b") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path, flush: bool = True) -> Iterator[Path]:
    """A place to write a file or a folder to, which becomes `path` when the block ends without an error.

    Until then `path` is what it was. If this process is killed, a hidden folder `.writing-...` may stay beside it.

    Args:
        path: an earlier file, or link to one, is replaced; an earlier folder is an error. The folder above it is made.
        flush: wait until the content would outlast a power cut.

    Raises:
        OSError: it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder, so that the name is the same: some writers go by it.
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent, ignore_cleanup_errors=True) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        if flush:
            for file in filter(Path.is_file, [temporary, *temporary.rglob("*")]):
                flush_to_disk(file)
        os.replace(temporary, path)
    if flush:
        flush_folder(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that appears complete or not at all; an earlier one stays until then.

    Raises:
        OSError: it can't be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def flush_folder(folder: Path) -> None:
    """Wait until the names in a folder would outlast a power cut.

    Raises:
        OSError: it can't be opened, or the disk failed.
    """
    if os.name == "posix":  # elsewhere folders can't be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
