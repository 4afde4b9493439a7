"""The folders of checkpoints: written under another name, marked, renamed; found, checked and removed.

A process can be killed between any two bytes that it writes. So a checkpoint is written into `checkpoint-N.partial`,
which no run resumes from, and renamed once all of it is on the disk; removal goes the other way round. A marker lists
its files with their SHA-256, so that a damaged one is noticed.
"""

import logging
import os
import re
import shutil
from pathlib import Path

from torch import distributed as dist

from ..utils.checksums import MARKER, damage, mark_complete
from ..utils.distributed import num_processes
from ..utils.files import flush_folder

logger = logging.getLogger(__name__)

NAME = re.compile(r"checkpoint-(\d+)")
LEFTOVER = re.compile(NAME.pattern + r"\.(partial|removed)")  # of a checkpoint that was being written or deleted


# Complete or not ------------------------------------------------------------------------------------------------


def partial_folder(folder: Path) -> Path:
    """Where a checkpoint is written."""
    return folder.with_name(f"{folder.name}.partial")


def put_in_place(partial: Path, folder: Path) -> None:
    """Turn what was written into a checkpoint, in place of a damaged one of the same step, if there is one.

    Raises:
        OSError: it can't be read or written.
    """
    mark_complete(partial)
    remove_checkpoint(folder)
    os.replace(partial, folder)
    flush_folder(folder.parent)


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
    """The newest complete checkpoint in a folder; None, maybe with a warning, means from the beginning.

    In a distributed run every process has to call it: the first one looks and tells the others, so that all resume
    from the same step, whatever their view of a network drive is.
    """
    if num_processes() == 1:
        return newest_complete(output_dir)
    newest = [newest_complete(output_dir) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(newest)
    return newest[0]


def newest_complete(output_dir: str | Path) -> str | None:
    """`last_complete_checkpoint` as this process sees it."""
    folders = checkpoint_folders(output_dir)
    for folder in reversed(folders):
        if not (folder / MARKER).exists():
            logger.warning("%s is left out: it isn't one that this program wrote (no %s in it)", folder, MARKER)
        elif problem := damage(folder):
            logger.warning("%s is left out: it is damaged, %s", folder, problem)
        else:
            return str(folder)
    if folders:
        logger.warning("no checkpoint in %s is complete: training starts from the beginning", output_dir)
    return None


# Removal --------------------------------------------------------------------------------------------------------


def leftovers(output_dir: str | Path) -> list[Path]:
    """Folders of checkpoints that were being written or deleted when their process was killed."""
    return [path for path in Path(output_dir).glob("checkpoint-*") if LEFTOVER.fullmatch(path.name) and path.is_dir()]


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, complete or not. From the first moment on it doesn't count as one any more.

    Raises:
        OSError: it can't be deleted.
    """
    removed = folder.with_name(f"{folder.name}.removed")
    if removed.is_dir():  # by a process that was killed meanwhile
        shutil.rmtree(removed)
    if folder.is_dir():
        os.replace(folder, removed)
        shutil.rmtree(removed)


def remove_surplus(output_dir: str | Path, limit: int | None, newest: Path, best: Path | None = None) -> None:
    """Delete the oldest complete checkpoints over a limit, and what interrupted runs left of others.

    Folders without a marker are neither counted nor touched: they may be somebody's own. Steps past the newest are
    from a run that was given up, so they count as the oldest.

    Args:
        limit: how many to keep (`save_total_limit`); None or 0 keeps all.
        newest: the one just saved; it stays.
        best: the best one; it stays too, whatever the limit.
    """
    marked = [folder for folder in checkpoint_folders(output_dir) if (folder / MARKER).exists()]
    surplus = leftovers(output_dir)
    if limit and limit > 0:
        protected = {newest.name, *([best.name] if best else [])}
        marked.sort(key=lambda folder: (step_of(folder) <= step_of(newest), step_of(folder)))
        old = [folder for folder in marked if folder.name not in protected]
        surplus += old[: max(0, len(marked) - max(limit, len(protected)))]
    for folder in surplus:
        try:
            remove_checkpoint(folder) if folder in marked else shutil.rmtree(folder)
        except OSError as error:  # no reason to end a run that has just been saved; the next removal tries again
            logger.warning("%s is not needed any more, but can't be removed: %s", folder, error)
