"""Fetching published checkpoints: once, checked, and complete or not at all."""

import hashlib
import http.client
import re
import urllib.request
from pathlib import Path

from huggingface_hub.utils import WeakFileLock

from ..utils.files import cache_explained, replacing, sha256
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

    Processes that want the same file wait for the first.

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
            with WeakFileLock(target.with_name(f".{name}.lock")):
                if not target.is_file():
                    _fetch_to(url, target)
    check_hash(target)
    return target


def _fetch_to(url: str, target: Path) -> None:
    advice = "Without network, download it elsewhere and give its path instead."
    try:
        _download(url, target)
    except CheckpointError:
        raise
    except (http.client.InvalidURL, ValueError):  # they quote the URL, with its password: not even as the cause
        reason = "the address, or what its server says, isn't valid"
        raise CheckpointError(f"{public_url(url)} can't be fetched ({reason}). {advice}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = without_credentials(str(error))
        raise CheckpointError(f"{public_url(url)} can't be fetched ({reason}). {advice}") from error


def _download(url: str, target: Path) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "crosskd_hf"})
    with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT) as response, replacing(target) as temporary:
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        with open(temporary, "wb") as file, Progress(f"download {target.name}", total, "B") as progress:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                progress.update(len(chunk))
        if total is not None and progress.done != total:
            raise OSError(f"the connection broke after {progress.done} of {total} bytes")
        check_hash(temporary)
