"""Fetching published checkpoints: once, whole, checked, and from where a broken connection left off."""

import contextlib
import hashlib
import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from ..utils.files import cache_explained, sha256, write_atomically
from ..utils.progress import Progress
from ..utils.redact import public_url, without_credentials
from .mmdet import CheckpointError

HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[^.]+$")
DATE = re.compile(r"20\d{6}")  # 20200131 is made of hexadecimal digits too
DOWNLOAD_TIMEOUT = 60  # seconds without a byte
CHUNK = 1 << 20  # bytes of a download between two looks at its progress


def hash_in(name: str) -> str | None:
    """The hash at the end of a file's name; None if there is none, or a date."""
    match = HASH_IN_NAME.search(name)
    return match[1] if match and not DATE.fullmatch(match[1]) else None


def check_hash(path: str | Path) -> None:
    """Compare a file with the hash in its name (`...-dd12f847.pth`: the first digits of its SHA-256).

    Raises:
        CheckpointError: if they differ. A name without a hash is taken as it is.
    """
    path = Path(path)
    promised = hash_in(path.name)
    if promised is None:
        return
    digest = sha256(path)
    if not digest.startswith(promised):
        raise CheckpointError(
            f"{path} has SHA-256 {digest[: len(promised)]}..., but its name promises {promised}: the "
            "download is damaged or the file was changed. Delete it and fetch it again."
        )


def fetch(url: str, folder: str | Path) -> Path:
    """Download a checkpoint once into `folder`, checking the hash in its name; returns its path.

    A connection that breaks leaves what has come, and the next call goes on there if the server still has the same
    file (by its ETag or date). Processes that want the same file wait for the first.

    Raises:
        CheckpointError: if the address can't be reached or the content doesn't match the hash.
        CacheError: if the folder can't be written, or its disk is full.
    """
    name = public_url(url).rsplit("/", 1)[-1]
    if hash_in(name) is None:  # nothing else tells two files of one name from each other
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}_{name}"
    target = Path(folder) / name
    if not target.is_file():
        with cache_explained(target.parent, "HF_HOME"):
            target.parent.mkdir(parents=True, exist_ok=True)
            _fetch_once(url, target)
    check_hash(target)
    return target


def _fetch_once(url: str, target: Path) -> None:
    try:
        with _one_at_a_time(target):
            if not target.is_file():
                _fetch_to(url, target)
    except CheckpointError:
        raise
    except (http.client.InvalidURL, ValueError):  # they quote the URL, with its password: not even as the cause
        raise _unfetchable(url, "the address, or what its server says, isn't valid") from None
    except (OSError, http.client.HTTPException) as error:
        raise _unfetchable(url, without_credentials(str(error))) from error


def _unfetchable(url: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{public_url(url)} can't be fetched ({reason}). Without network, download it elsewhere and give its path "
        "instead."
    )


def _fetch_to(url: str, target: Path) -> None:
    partial, note = (target.with_name(f"partial-{target.name}{end}") for end in ("", ".etag"))
    try:
        _download(url, partial, note)
        check_hash(partial)
        partial.replace(target)
    except CheckpointError:  # of the wrong content nothing is of use
        partial.unlink()
        raise
    finally:
        if not (partial.is_file() and partial.stat().st_size and note.is_file()):
            partial.unlink(missing_ok=True)
            note.unlink(missing_ok=True)


@contextlib.contextmanager
def _one_at_a_time(target: Path) -> Iterator[None]:
    """Keep other processes from downloading the same file. Without `fcntl` (Windows) nothing is locked."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    # It stays: who removes a lock may remove that of the next who came.
    with open(target.with_name(f".{target.name}.lock"), "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _download(url: str, partial: Path, note: Path) -> None:
    """Fetch what `partial` lacks of a file, or all of it. `note` holds which version of the file it is of."""
    done = partial.stat().st_size if partial.is_file() and note.is_file() else 0
    headers = {"User-Agent": "crosskd_hf"}
    if done:
        # The server sends all of the file, with another status, if it has another version by now.
        headers |= {"Range": f"bytes={done}-", "If-Range": note.read_text(encoding="utf-8")}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=DOWNLOAD_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        partial.unlink()
        _download(url, partial, note)
        return
    with response:
        if response.status == http.client.PARTIAL_CONTENT:
            given = response.headers.get("Content-Range") or ""
            if not given.startswith(f"bytes {done}-"):
                raise OSError(f"the server sends {given!r} instead of byte {done} and what follows")
        else:
            done = 0
        version = response.headers.get("ETag") or ""
        version = response.headers.get("Last-Modified") if not version or version.startswith("W/") else version
        note.unlink(missing_ok=True)
        if version:
            write_atomically(note, version)
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        name = partial.name.split("-", 1)[-1]
        bar = Progress(f"download {name}", total, "B", initial=done)
        with open(partial, "ab" if done else "wb") as file, bar as progress:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                progress.update(len(chunk))
    size = partial.stat().st_size
    if total is not None and size != total:
        again = ", the next try goes on from there" if version else ""
        raise OSError(f"the connection broke after {size} of {total} bytes{again}")
