"""Disk space: what a run's checkpoints take, and a disk that is full."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch import nn
from transformers.training_args import OptimizerNames

from ..utils.files import SHARED_MEMORY, is_disk_full
from .arguments import DetectionTrainingArguments
from .checkpoints import checkpoint_folders, leftovers, newest_complete

DISK_FULL = "the disk is full"


@contextlib.contextmanager
def full_disk_explained(output_dir: Path, partial: Path | None = None, needed: int = 0) -> Iterator[None]:
    """Around a run, or the writing of a checkpoint: say that the disk is full, and what is safe.

    Args:
        output_dir: of the run.
        partial: the folder that is written, removed at any error of these kinds.
        needed: about how many bytes it takes.

    Raises:
        OSError: the disk is full (`errno` ENOSPC). Other errors pass as they are, and explained ones.
        RuntimeError: the memory that data workers share is full, not the disk.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        free = shutil.disk_usage(_existing(output_dir)).free  # before the removal
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if SHARED_MEMORY in str(error):
            raise RuntimeError(
                "the shared memory (/dev/shm) through which data workers hand over batches is full: give the container"
                " more (docker run --shm-size=8g), lower training.dataloader_num_workers or "
                f"training.dataloader_prefetch_factor, and start the same command again to resume ({error})"
            ) from error
        if not is_disk_full(error) or DISK_FULL in str(error):
            raise
        good = newest_complete(output_dir)
        intact = f"The last good checkpoint, {good}, is intact" if good else "There is no earlier checkpoint"
        what = str(error)
        if partial is not None:
            sizes = f"needs about {_gb(needed)} GB, but only {_gb(free)} GB were free"
            what = f"{partial.with_suffix('')} {sizes} ({error})"
        advice = "free some space (or lower save_total_limit) and start the same command again to resume"
        raise OSError(errno.ENOSPC, f"{DISK_FULL}: {what}. {intact}; {advice}") from error


def checkpoint_bytes(model: nn.Module, args: DetectionTrainingArguments) -> int:
    """About the size of a checkpoint: all weights, their average, and the optimizer's state of the trained ones.

    SGD keeps one value per parameter, or none without momentum; any other optimizer counts as two, as Adam.
    """
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    values = (1 if args.momentum else 0) if args.optim == OptimizerNames.SGD else 2
    state = values * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return weights * (1 if args.ema_decay is None else 2) + state


def check_disk_space(model: nn.Module, args: DetectionTrainingArguments) -> None:
    """Refuse a run whose checkpoints can't fit.

    An old checkpoint goes when the new one is complete: one more than is kept is on the disk meanwhile. The best one
    is kept beside the last if evaluations choose it. Checkpoints in the folder count as free, since they give way.

    Raises:
        ValueError: naming the folder, what is needed and what is free.
    """
    kept = max(args.save_total_limit or 0, 1 if args.eval_strategy == "no" else 2)
    checkpoints = 1 if args.save_strategy == "no" else kept + 1
    needed = checkpoint_bytes(model, args) * checkpoints
    folders = [*checkpoint_folders(args.output_dir), *leftovers(args.output_dir)]
    taken = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(_existing(Path(args.output_dir))).free + taken
    if free < needed:
        raise ValueError(
            f"training.output_dir {args.output_dir} needs about {_gb(needed)} GB for {checkpoints} checkpoints (those "
            f"that are kept and the new one while it is written), but only {_gb(free)} GB are free: free some space, "
            "lower training.save_total_limit, or name another training.output_dir."
        )


def _existing(folder: Path) -> Path:
    """The folder, or the closest one above it that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}"
