"""SIGTERM: a scheduler's or a cloud's word that a run has seconds left."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator

import torch
from torch import distributed as dist

from ..utils.distributed import num_processes

logger = logging.getLogger(__name__)


class Terminated(SystemExit):
    """A run was told to end and has saved everything: nobody's fault, so that the program's status is 0.

    Args:
        message: what was saved, and where.
    """

    def __init__(self, message: str):
        super().__init__(0)
        self.message = message

    def __str__(self) -> str:
        return self.message


class TerminationSignal:
    """Notes SIGTERM instead of ending the process, so that a run can finish its step and save.

    Which of several processes gets the signal, and during which step, is chance, but all have to save at the same one.
    They agree at the end of every step, on what was noted by the end of the step before: the answer of that round has
    had a step's time to arrive, so that nobody waits for it. It goes over the CPUs (gloo): accelerate's
    `check_trigger` reads it from the GPU, so that the host would wait for every step.
    """

    def __init__(self) -> None:
        self.noted = False
        self._depth = 0
        self._group: dist.ProcessGroup | None = None
        self._round: tuple[torch.Tensor, dist.Work] | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGTERM within. May be nested. Outside of the main thread, where Python has no signals, nothing is.

        The outermost one tells what was saved, once: in between it may not be saved yet.
        """
        if self._depth or threading.current_thread() is not threading.main_thread():
            yield
            return
        self.noted = False  # what ended an earlier training is no reason to end this one
        before = signal.signal(signal.SIGTERM, self._note)
        self._depth += 1
        self._group = dist.new_group(backend="gloo") if num_processes() > 1 else None  # type: ignore[assignment]
        try:
            yield
        except Terminated as end:
            if num_processes() == 1 or dist.get_rank() == 0:
                logger.warning("%s", end)
            raise
        finally:
            self._depth -= 1
            self._answer(self._round)
            self._round = None
            group, self._group = self._group, None
            if group is not None and dist.is_initialized():
                # Its threads must end: one that lets go of its last tensor while Python ends aborts the process.
                dist.destroy_process_group(group)
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

    def _note(self, number: int, frame: object) -> None:
        self.noted = True

    def agreed_at_step(self) -> bool:
        """Whether to end, the same on every process. All have to call it, once a step."""
        if self._group is None:
            return self.noted
        answer = self._answer(self._round)
        self._round = self._ask()
        return answer

    def agreed_now(self) -> bool:
        """The same, on what is noted at this moment; waits for all processes."""
        return self.noted if self._group is None else self._answer(self._ask())

    def _ask(self) -> tuple[torch.Tensor, dist.Work]:
        flag = torch.tensor([int(self.noted)])
        return flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _answer(self, asked: tuple[torch.Tensor, dist.Work] | None) -> bool:
        if asked is None:
            return False
        try:
            asked[1].wait()
        except RuntimeError:  # another process is gone; whoever needs it next says so
            return False
        return bool(asked[0])


def obey_parent_only(parent: int, worker: int) -> None:
    """For a data worker's start (`worker_init_fn`): SIGTERM ends it only if the process that trains sends it.

    Schedulers send the signal to every process of a job. A worker that ended at once would take its parent with it,
    before anything is saved. To ignore the signal is no way out: that is how torch ends its workers. Without
    `sigwaitinfo` (macOS, Windows) a worker ends at anybody's signal.

    Args:
        parent: process number of the one that trains. Not `os.getppid()`: with the start method `forkserver` that is
            the server.
        worker: its number, not used.
    """
    if not hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
