"""What the package asks of other processes: sums, means, what all must share."""

import contextlib
import os
import socket
import time
import uuid
from pathlib import Path

from torch import Tensor, nn
from torch import distributed as dist

APPEARS_WITHIN = 10.0  # seconds; a network drive may show another machine's new file late


def num_processes() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """Average of a tensor over all processes, without gradient; the tensor itself in a single process."""
    value = value.detach()
    if num_processes() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= num_processes()
    return value


def share_buffers(module: nn.Module) -> None:
    """Give a module the first process's buffers: statistics of BatchNorms differ, since each saw other images."""
    if num_processes() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def processes_where(condition: bool) -> str:
    """The processes for which a condition holds, such as "node-b (processes 2, 3)"; empty if there are none.

    All processes have to call it, and all get the same answer.
    """
    answer = socket.gethostname(), condition
    answers = [answer] * num_processes()
    if num_processes() > 1:
        dist.all_gather_object(answers, answer)
    hosts: dict[str, list[str]] = {}
    for rank, (host, holds) in enumerate(answers):
        if holds:
            hosts.setdefault(host, []).append(str(rank))
    return ", ".join(f"{host} (process{'es' * (len(r) > 1)} {', '.join(r)})" for host, r in hosts.items())


def check_same(what: str, value: object) -> None:
    """Refuse what must be the same in all processes, but isn't. All have to call it.

    Args:
        what: the message names it so.
        value: compared by `==`.

    Raises:
        ValueError: on all processes, naming those whose value isn't the first one's.
    """
    if num_processes() > 1 and (others := processes_where(_from_first(value) != value)):
        raise ValueError(
            f"{what} must be the same for all processes, but aren't on {others} what they are for process 0: bring "
            "the same files to all machines."
        )


def check_shared(folder: str | Path) -> None:
    """Refuse an output folder that isn't one and the same for all processes. All have to call it.

    Otherwise some processes would find checkpoints and others none, or wait for each other without end.

    Raises:
        OSError: on all processes, if the first one can't write there.
        ValueError: on all processes, naming those that don't see what the first one writes there.
    """
    if num_processes() == 1:
        return
    folder = Path(folder).absolute()
    first, name, problem = dist.get_rank() == 0, f"_shared_{uuid.uuid4().hex}", None
    if first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        except OSError as error:
            problem = error
    name, problem, host = _from_first((name, problem, socket.gethostname()))
    if problem is not None:
        raise problem
    missing = processes_where(not _appears(folder / name))
    if first:
        (folder / name).unlink(missing_ok=True)
    if missing:
        raise ValueError(
            f"training.output_dir {folder} isn't the same folder on all machines: {missing} doesn't see what {host} "
            "(process 0) writes there. Name a folder on a disk that all machines share, mounted at the same path."
        )


def _from_first(value: object) -> object:
    """What the first process calls it with."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _appears(path: Path) -> bool:
    """Whether a file is there, at the latest after `APPEARS_WITHIN`."""
    until = time.monotonic() + APPEARS_WITHIN
    while not os.path.exists(path):  # unlike Path.exists, False where it may not be looked up
        if time.monotonic() > until:
            return False
        for folder in (path.parent.parent, path.parent):  # NFS keeps "no such file" until a folder is opened again
            with contextlib.suppress(OSError):
                os.listdir(folder)
        time.sleep(0.1)
    return True
