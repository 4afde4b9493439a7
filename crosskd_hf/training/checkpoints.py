"""Which checkpoints are whole: a marker written last, and what is chosen, removed and refused by it.

A process can be killed between any two bytes that it writes. transformers takes the newest folder named `checkpoint-N`
for the last checkpoint, also one that is half written or half deleted. Here only a folder whose marker is there, and
whose files are those that the marker lists, counts.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch import distributed as dist
from torch import nn
from transformers.training_args import OptimizerNames

from ..utils.files import SHARED_MEMORY, flush_to_disk, is_disk_full, sha256, write_atomically
from .arguments import DetectionTrainingArguments

logger = logging.getLogger(__name__)

MARKER = "complete.json"
REMOVING = "removing.json"  # what the marker of a checkpoint is renamed to before its files go
LOCK = "_lock"  # names with an underscore aren't pushed to the Hub
NAME = re.compile(r"checkpoint-(\d+)")
DISK_FULL = "the disk is full"


# Whole or not ---------------------------------------------------------------------------------------------------


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


def replace_file(folder: Path, name: str, text: str) -> None:
    """Give a whole checkpoint another version of a small text file. At any moment it is whole with one of the two.

    Args:
        folder: a checkpoint with a marker; others are left alone.
        name: of a file that the marker lists.

    Raises:
        OSError: it can't be written; the checkpoint is as it was.
    """
    if not (folder / MARKER).is_file():
        return
    files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
    content = text.encode()
    new = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    # First the marker knows both versions, then the file changes, then the marker forgets the old one.
    both = {**files, name: {**files[name], "or": new}}
    write_atomically(folder / MARKER, json.dumps({"files": both}, indent=1))
    write_atomically(folder / name, text)
    write_atomically(folder / MARKER, json.dumps({"files": {**files, name: new}}, indent=1))


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint that has a marker, naming the file; None if nothing is.

    Files that the marker doesn't list are no damage: others may have added them.
    """
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = folder / name
            if "or" in expected and sha256(path) == expected["or"]["sha256"]:  # see `replace_file`
                continue
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


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """The folders named `checkpoint-N` in a folder, N rising. None if the folder isn't there."""
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return []
    return sorted((path for path in output_dir.iterdir() if NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def step_of(folder: str | Path) -> int:
    """N of a folder `checkpoint-N`."""
    return int(Path(folder).name.removeprefix("checkpoint-"))


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint in a folder; None, maybe with a warning, means from the beginning.

    In a distributed run every process has to call it: the first one looks and tells the others, so that all go on
    from the same step, whatever their view of a network drive is.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return newest_complete(output_dir)
    found = [newest_complete(output_dir) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def newest_complete(output_dir: str | Path) -> str | None:
    """`last_complete_checkpoint` as this process sees it."""
    folders = checkpoint_folders(output_dir)
    for folder in reversed(folders):
        if not (folder / MARKER).exists():
            logger.warning("%s is left out: saving or removing it was interrupted (no %s in it)", folder, MARKER)
        elif problem := damage(folder):
            logger.warning("%s is left out: it is damaged, %s", folder, problem)
        else:
            return str(folder)
    if folders:
        logger.warning("no checkpoint in %s is whole: training starts from the beginning", output_dir)
    return None


class FolderInUseError(ValueError):
    """Another run is writing to the output folder."""


@contextlib.contextmanager
def claimed(output_dir: str | Path) -> Iterator[None]:
    """Keep other runs out of a folder; one process a run is to call it.

    If only a launcher is killed, the processes that it started go on and write. The lock is the operating system's, so
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


# Removal --------------------------------------------------------------------------------------------------------


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, whole or not. From the first moment on it doesn't count as one any more.

    Raises:
        OSError: it can't be deleted.
    """
    if not folder.is_dir():
        return
    if (folder / MARKER).exists():
        os.replace(folder / MARKER, folder / REMOVING)
    for path in folder.iterdir():
        if path.name != REMOVING:  # the last to go, so that `remove_surplus` knows what was meant to
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(folder)


def remove_surplus(output_dir: str | Path, limit: int | None, newest: Path, best: str | None = None) -> None:
    """Delete the oldest whole checkpoints over a limit, and what an interrupted removal left.

    Folders without a marker are neither counted nor touched: they may be somebody's own. Steps past the newest are
    from a run that was given up, so they count as the oldest.

    Args:
        limit: how many to keep (`save_total_limit`); None or 0 keeps all.
        newest: the one just saved; it stays.
        best: path of the best one; it stays too, whatever the limit.
    """
    folders = checkpoint_folders(output_dir)
    marked = [folder for folder in folders if (folder / MARKER).exists()]
    surplus = [folder for folder in folders if folder not in marked and (folder / REMOVING).exists()]
    if limit and limit > 0:
        protected = {newest.name, *([Path(best).name] if best else [])}
        marked.sort(key=lambda folder: (step_of(folder) <= step_of(newest), step_of(folder)))
        old = [folder for folder in marked if folder.name not in protected]
        surplus += old[: max(0, len(marked) - max(limit, len(protected)))]
    for folder in surplus:
        try:
            remove_checkpoint(folder)
        except OSError as error:  # no reason to end a run that has just been saved; the next removal tries again
            logger.warning("%s is not needed any more, but can't be removed: %s", folder, error)


# Disk space -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk_errors_explained(folder: Path, needed_bytes: int, remove: bool = True) -> Iterator[None]:
    """Around the writing of a checkpoint: remove what a failed write leaves, and say it if the disk was full.

    Args:
        folder: of the checkpoint.
        needed_bytes: about what it takes.
        remove: False on processes that share the folder with the one that removes it.

    Raises:
        OSError: the disk is full (`errno` ENOSPC). Other errors pass as they are.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_disk_full(error):
            raise
        free = shutil.disk_usage(_existing(folder)).free  # before the removal
        text = f"{folder} needs about {_gb(needed_bytes)} GB, {_gb(free)} GB were free when writing failed"
        if remove:
            shutil.rmtree(folder, ignore_errors=True)
            text += ". The partial folder was removed"
        raise _disk_full(text, folder.parent) from error


@contextlib.contextmanager
def full_disk_explained(output_dir: Path) -> Iterator[None]:
    """Around a whole run: whatever can't be written, say that the disk is full and what is safe.

    Raises:
        OSError: the disk is full (`errno` ENOSPC). Other errors pass as they are, and explained ones.
        RuntimeError: the memory that data workers share is full, not the disk.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if SHARED_MEMORY in str(error):
            raise RuntimeError(
                "the shared memory (/dev/shm) through which data workers hand over batches is full: give the container"
                " more (docker run --shm-size=8g), lower training.dataloader_num_workers or "
                f"training.dataloader_prefetch_factor, and start the same command again to go on ({error})"
            ) from error
        if not is_disk_full(error) or DISK_FULL in str(error):
            raise
        raise _disk_full(str(error), output_dir) from error


def _disk_full(what: str, output_dir: Path) -> OSError:
    good = newest_complete(output_dir)
    intact = f"The last good checkpoint, {good}, is intact" if good else "There is no earlier checkpoint"
    advice = "free some space (or lower save_total_limit) and start the same command again to go on"
    return OSError(errno.ENOSPC, f"{DISK_FULL}: {what}. {intact}; {advice}")


def checkpoint_bytes(model: nn.Module, args: DetectionTrainingArguments) -> int:
    """About the size of a checkpoint: all weights, their average, and the optimizer's state of the trained ones.

    SGD keeps one value a parameter, or none without momentum; any other optimizer counts as two, as Adam.
    """
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    values = (1 if args.momentum else 0) if args.optim == OptimizerNames.SGD else 2
    state = values * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return weights * (1 if args.ema_decay is None else 2) + state


def checkpoints_at_once(save_total_limit: int | None, keeps_best: bool = False) -> int:
    """Checkpoints that are on the disk at the same time: an old one goes when the new one is whole; at least 2.

    Args:
        save_total_limit: None or 0 for no limit.
        keeps_best: evaluations choose a best one, which stays beside the last.
    """
    return max(save_total_limit or 0, 2 if keeps_best else 1) + 1


def check_disk_space(output_dir: str | Path, needed_bytes: int, checkpoints: int) -> None:
    """Refuse a run whose checkpoints can't fit.

    Args:
        output_dir: needn't be there. Checkpoints in it count as free: they give way to the new ones.
        needed_bytes: for all checkpoints together, `checkpoint_bytes` x `checkpoints_at_once`.
        checkpoints: how many these are, for the message.

    Raises:
        ValueError: naming the folder, what is needed and what is free.
    """
    taken = sum(path.stat().st_size for f in checkpoint_folders(output_dir) for path in f.rglob("*") if path.is_file())
    free = shutil.disk_usage(_existing(Path(output_dir))).free + taken
    if free < needed_bytes:
        raise ValueError(
            f"training.output_dir {output_dir} needs about {_gb(needed_bytes)} GB for {checkpoints} checkpoints "
            f"(those that are kept and the new one while it is written), but only {_gb(free)} GB are free: free some "
            "space, lower training.save_total_limit, or name another training.output_dir."
        )


def _existing(folder: Path) -> Path:
    """The folder, or the closest one above it that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}"
