"""Errors as one message instead of a traceback, where the user can do something about them."""

import contextlib
from collections.abc import Iterator

from accelerate import PartialState

from ..recipe import RecipeError
from ..utils.escaping import printable_lines
from ..utils.memory import OutOfMemoryError

# What ends in one message while a run is built; checkpoints' and data's errors are ValueErrors.
USER_ERRORS = (RecipeError, OSError, OutOfMemoryError, ValueError)


def run_errors() -> tuple[type[Exception], ...]:
    """What ends in one message while a run trains. Other errors there keep their tracebacks."""
    from ..data.errors import DataError
    from ..models.postprocess import NonFiniteOutputError
    from ..training.run_lock import FolderInUseError
    from ..training.step_monitor import NonFiniteLossError
    from ..weights.mmdet import CheckpointError

    own = (CheckpointError, DataError, FolderInUseError, NonFiniteLossError, OutOfMemoryError, RecipeError)
    return (*own, NonFiniteOutputError, OSError, UnicodeEncodeError)


@contextlib.contextmanager
def explained(kinds: tuple[type[Exception], ...]) -> Iterator[None]:
    """End the program with one message instead of a traceback at errors of these kinds."""
    try:
        yield
    except kinds as error:
        raise SystemExit(explain(error)) from error


def explain(error: Exception) -> str:
    """An error as one message, with the rank that saw it where there are several."""
    state = PartialState()
    rank = f"[process {state.process_index}] " if state.num_processes > 1 else ""
    name = type(error).__name__
    # torch puts a data worker's traceback before the message.
    text = str(error).rpartition(f"{name}: ")[2] if str(error).startswith("Caught") else str(error)
    if isinstance(error, UnicodeEncodeError):
        text += f" (the locale has the encoding {error.encoding}: set PYTHONUTF8=1 or LC_ALL=C.UTF-8)"
    return printable_lines(f"{rank}{name}: {text}")
