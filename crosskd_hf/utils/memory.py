"""Out of memory: what was computed when it happened, and which keys need less."""

import contextlib
import errno
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import TrainingArguments

# How torch's allocator for the CPU says it, and a data worker that the system has ended.
TEXTS = ("can't allocate memory", "out of memory", "is killed by signal: Killed")


class OutOfMemoryError(torch.OutOfMemoryError):
    """Out of memory, with the batch, the image size and the keys that lower them."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of a device, of Python or of the system without memory."""
    memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or getattr(error, "errno", None) == errno.ENOMEM
    told = isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)
    return memory or told or (error.__cause__ is not None and is_out_of_memory(error.__cause__))


@contextlib.contextmanager
def out_of_memory_explained(explanation: Callable[[], str]) -> Iterator[None]:
    """Around work that takes much memory.

    Args:
        explanation: gives what is computed and what lowers its memory; called if the memory is out. Of contexts in one
            another the innermost tells.

    Raises:
        OutOfMemoryError: instead of torch's, Python's or the system's. Other errors pass as they are.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        # The last line: before it, torch puts a data worker's traceback.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise OutOfMemoryError(f"the memory is out: {explanation()} ({reason})") from error


def batch_advice(args: "TrainingArguments", key: str, shape: tuple[int, ...] | None) -> str:
    """What was computed when the memory was out, and which keys of a recipe need less.

    Args:
        args: of the run.
        key: the argument with the images per batch.
        shape: (N, 3, H, W) of the last batch; None: there was none yet.
    """
    size = getattr(args, key)
    trains = key == "per_device_train_batch_size"
    images = "no batch was computed yet"
    if shape is not None:
        number, _, height, width = shape
        images = f"the last batch had {number} images, padded to {height} x {width} pixels"
    lower = [f"training.{key}"] if size > 1 else []
    if lower and trains:
        lower[0] += f" (and raise training.gradient_accumulation_steps, {args.gradient_accumulation_steps})"
    lower += ["data.short_side and data.long_side"]
    lower += [f"training.dataloader_num_workers ({args.dataloader_num_workers})"] * (args.dataloader_num_workers > 0)
    more = ", or set training.activation_checkpointing=true" if trains and not args.activation_checkpointing else ""
    return f"{key} is {size}, {images}. Lower {', '.join(lower)}{more}"
