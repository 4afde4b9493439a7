"""What a training step leaves behind for the log: kept on the device, read only when the log is written."""

import logging
import sys
import time
from collections import deque

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

STEP_CLOCKS = ("data_time", "step_time")
GRADIENT = "gradient"
TERMS = ("loss_", "kd_", "mimic_")  # what the names of loss terms begin with


class StepClock:
    """Seconds that steps take: `data_time` waiting for the data, `step_time` from there to the optimizer's update.

    On a GPU they are the GPU's own, from one event in its stream to the next: data time is time in which it is idle
    since the host waits for data. Nobody waits for an event before the log is written. Elsewhere they are the host's.

    Args:
        device: that trains.

    Attributes:
        seconds: of each clock, of what is known to be over.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._running: tuple[str, torch.cuda.Event | float] | None = None
        self._unread: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self.seconds = dict.fromkeys(STEP_CLOCKS, 0.0)

    def switch(self, name: str | None) -> None:
        """Stop the clock that runs, if any, and start another, or none."""
        if self._on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        if self._running is not None:
            before, start = self._running
            if self._on_gpu:
                self._unread.append((before, start, now))
            else:
                self.seconds[before] += now - start
        self._running = None if name is None else (name, now)
        while self._unread and self._unread[0][2].query():
            self._read()

    def take(self) -> dict[str, float]:
        """Seconds of each clock since the last call. Waits for the GPU."""
        while self._unread:
            self._unread[0][2].synchronize()
            self._read()
        seconds, self.seconds = self.seconds, dict.fromkeys(STEP_CLOCKS, 0.0)
        return seconds

    def _read(self) -> None:
        name, start, end = self._unread.popleft()
        self.seconds[name] += start.elapsed_time(end) / 1000


class NonFiniteLossError(RuntimeError):
    """A loss term or the gradient became infinite or NaN."""


class StepMonitor:
    """Sums of loss terms since the last log, and the first step at which each was not finite.

    Args:
        device: where the losses are.
        may_skip: steps of a run that may be not finite, 0 or more.

    Attributes:
        skipped: steps that were not finite, up to the last log.
        untold: name -> first step that was not finite, from before a resumed run's checkpoint and after its last log.
    """

    def __init__(self, device: torch.device, may_skip: int = 0):
        self.device = device
        self.may_skip = may_skip
        self.skipped = 0
        self.untold: dict[str, int] = {}
        self._bad_step = torch.zeros((), dtype=torch.bool, device=device)  # the one under way
        self._bad_steps, self._good_batches = torch.zeros(2, device=device).unbind()  # since the last log
        self.zero = torch.zeros((), device=device)
        self.names: list[str] = []
        self.count = self.steps = 0  # batches and optimizer steps since the last log
        self.sums = torch.zeros(0, device=device)
        self.first_bad = torch.zeros(0, dtype=torch.long, device=device)
        self._overflows = torch.zeros((), dtype=torch.long, device=device)
        self._last_step = -1
        self.clock = StepClock(device)

    def record(self, terms: dict[str, Tensor], step: int) -> Tensor:
        """Add a step's terms (scalars). Returns a factor for the loss: 1, or NaN if any term isn't finite.

        Times the loss, the factor makes every gradient NaN - after averaging, on all ranks - so that the step is
        masked out everywhere. (A finite gradient can come out of an infinite loss.)
        """
        values = torch.stack([*(term.detach().float() for term in terms.values()), self.zero])
        if [*terms, GRADIENT] != self.names:
            self._start([*terms, GRADIENT])
        bad = ~values.isfinite()
        if self.may_skip:
            self._bad_step = self._bad_step | bad.any()
            self._good_batches = self._good_batches + ~bad.any()
            self.sums = self.sums + torch.where(bad.any(), 0.0, values)
        else:
            self.sums = self.sums + values
        self.first_bad = torch.where(bad & (self.first_bad < 0), step, self.first_bad)
        self.count += 1
        self.steps += step != self._last_step
        self._last_step = step
        return torch.where(bad.any(), float("nan"), 1.0)

    def record_gradient(self, bad: Tensor, step: int) -> None:
        """Note that the gradient was not finite at a step, if the scalar `bad` is true."""
        index = self.names.index(GRADIENT)
        first = self.first_bad[index]
        self.first_bad[index] = torch.where(bad & (first < 0), step, first)
        if self.may_skip:
            self._bad_step = self._bad_step | bad

    def record_overflow(self, bad: Tensor) -> None:
        """Note whether GradScaler skips the step, since a gradient overflowed (a scalar)."""
        self._overflows = torch.where(bad, self._overflows + 1, 0)

    def overflows_in_a_row(self) -> int:
        """How many of the last steps GradScaler has skipped. Reads the device."""
        return int(self._overflows)

    def end_step(self) -> None:
        """Count the step if it wasn't finite in any of its batches, or in its gradient."""
        if self.may_skip:
            self._bad_steps = self._bad_steps + self._bad_step
            self._bad_step = torch.zeros_like(self._bad_step)

    def skipped_so_far(self) -> int:
        """Steps that were not finite, on this rank. Reads the device."""
        return self.skipped + (int(self._bad_steps) if self.may_skip else 0)

    def not_finite(self) -> dict[str, int]:
        """Name -> first step that was not finite since the last log, on this rank. Reads the device."""
        found = {name: step for name, step in zip(self.names, self.first_bad.tolist(), strict=True) if step >= 0}
        return found | self.untold

    def _start(self, names: list[str]) -> None:
        self.names = names
        self.sums = torch.zeros(len(names), device=self.device)
        self.first_bad = torch.full((len(names),), -1, dtype=torch.long, device=self.device)
        self.count = self.steps = 0
        self._bad_steps, self._good_batches = torch.zeros(2, device=self.device).unbind()

    def averages(self, gather) -> dict[str, float]:
        """Mean of each term since the last call, over all ranks, and the seconds a step. One read of the device.

        Args:
            gather: (K,) tensor -> (ranks, K) tensor, on every rank at once.

        Returns:
            with steps that were skipped: means of the others (none if there are none), and `skipped_steps` of the run.

        Raises:
            NonFiniteLossError: naming the first terms that were not finite and the step; not if it may be skipped.
        """
        if not self.count:
            return {}
        batches = self._good_batches.clamp(min=1) if self.may_skip else self.count
        columns = [self.sums / batches, self.first_bad.float()]
        columns += [torch.stack([self._bad_steps, self._good_batches])] if self.may_skip else []
        rows = gather(torch.cat(columns)[None]).cpu()
        means, first_bad, counts = rows.split(
            [len(self.names), len(self.names), rows.shape[1] - 2 * len(self.names)], 1
        )
        steps = {
            name: min(s for s in column if s >= 0)
            for name, column in zip(self.names, first_bad.T.tolist(), strict=True)
            if max(column) >= 0
        }
        skipped = int(counts[:, 0].max()) if self.may_skip else 0
        steps |= self.untold
        self.untold = {}
        self.first_bad = torch.full_like(self.first_bad, -1)  # told now: a run that goes on has to do with new ones
        if steps:
            self._refuse_or_skip(steps, skipped)
        logs = dict(zip(self.names, means.mean(dim=0).tolist(), strict=True))
        logs.pop(GRADIENT)
        if skipped:
            good = counts[:, 1]  # ranks may have seen others
            logs = dict(zip(logs, ((means[:, :-1].T @ good) / good.sum()).tolist(), strict=True)) if good.any() else {}
        if self.skipped:
            logs["skipped_steps"] = self.skipped
        logs |= {clock: seconds / self.steps for clock, seconds in self.clock.take().items()}
        logs["memory_gb"] = memory_gb(self.device)
        self._start(self.names)
        return logs

    def _refuse_or_skip(self, steps: dict[str, float], skipped: int) -> None:
        """Count steps that were not finite, or stop at them. `steps`: name -> the first one since the last log."""
        first = int(min(steps.values()))
        names = ", ".join(name for name, step in steps.items() if step == first)
        self.skipped += skipped
        self._bad_steps = torch.zeros_like(self._bad_steps)  # they are counted now, whatever comes
        if not self.may_skip:
            raise NonFiniteLossError(f"{names} was not finite at step {first}")
        if self.skipped > self.may_skip:
            raise NonFiniteLossError(
                f"{names} was not finite at step {first}: {self.skipped} steps in all, of which "
                f"skip_nonfinite_steps allows {self.may_skip}"
            )
        logger.warning(
            "%s was not finite at step %d; %d steps were skipped since the last log, %d of at most %d in all",
            *(names, first, skipped, self.skipped, self.may_skip),
        )


def memory_gb(device: torch.device) -> float:
    """Peak memory in GB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":  # Python can't tell there
        return float("nan")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
