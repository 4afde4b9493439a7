"""What a training step leaves behind for the log: kept on the device, read only when the log is written."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

STEP_CLOCKS = ("data_time", "step_time")
MOST_SPANS = 10_000


class StepClock:
    """Seconds that steps take: `data_time` waiting for the data, `step_time` from there to the optimizer's update.

    On a GPU they are the GPU's own, from one event in its stream to the next: data time is time in which it is idle
    since the host waits for data. Nobody waits for an event before the log is written. Elsewhere they are the host's.

    Args:
        device: that trains.

    Attributes:
        spans: (clock, start, end) of what was timed since the last `take`: CUDA events, or seconds.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._running: tuple | None = None
        self.spans: list[tuple] = []

    def switch(self, name: str | None) -> None:
        """Stop the clock that runs, if any, and start another, or none."""
        if self._on_gpu:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        if self._running is not None:
            self.spans.append((*self._running, now))
            del self.spans[:-MOST_SPANS]  # nobody may ask: a run without logs
        self._running = None if name is None else (name, now)

    def take(self) -> dict[str, float]:
        """Seconds of each clock since the last call. Waits for the GPU."""
        seconds = dict.fromkeys(STEP_CLOCKS, 0.0)
        if self._on_gpu and self.spans:
            self.spans[-1][-1].synchronize()
        for name, start, end in self.spans:
            seconds[name] += start.elapsed_time(end) / 1000 if self._on_gpu else end - start
        self.spans.clear()
        return seconds


class NonFiniteLossError(RuntimeError):
    """A loss term, or a tensor of the model, became infinite or NaN."""


class TermSums:
    """Sums of the loss terms of one kind of batch, and the first step at which each was not finite.

    Args:
        names: of the terms.
        device: where they are.

    Attributes:
        count: number of batches.
    """

    def __init__(self, names: list[str], device: torch.device):
        self.names = names
        self.sums = torch.zeros(len(names), device=device)
        self.first_bad = torch.full((len(names),), -1, dtype=torch.long, device=device)
        self.count = 0

    def add(self, values: Tensor, step: int) -> None:
        """Add the terms (names,) of a batch of a step."""
        self.sums = self.sums + values
        self.first_bad = torch.where(~values.isfinite() & (self.first_bad < 0), step, self.first_bad)
        self.count += 1


class StepMonitor:
    """Loss terms since the last log.

    Batches of several kinds, such as unlabelled ones, have terms of other names. All ranks record the same kinds.

    Args:
        device: where the losses are.

    Attributes:
        kinds: names of the terms -> their sums.
        overflows: how many of the last steps GradScaler has skipped in a row, as a tensor on the device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.clock = StepClock(device)
        self.overflows = torch.zeros((), dtype=torch.long, device=device)
        self._start()

    def _start(self) -> None:
        self.kinds: dict[tuple[str, ...], TermSums] = {}
        self.steps = 0  # optimizer steps since the last log
        self._last_step = -1

    def record(self, terms: dict[str, Tensor], step: int) -> None:
        """Add the terms (scalars) of a batch of a step. Doesn't wait for the device."""
        if (kind := (*terms,)) not in self.kinds:
            self.kinds[kind] = TermSums([*terms], self.device)
        self.kinds[kind].add(torch.stack([term.detach().float() for term in terms.values()]), step)
        self.steps += step != self._last_step
        self._last_step = step

    def record_overflow(self, bad: Tensor) -> None:
        """Note whether GradScaler skips the step, since a gradient overflowed (a scalar)."""
        self.overflows = torch.where(bad, self.overflows + 1, 0)

    def check(self, tensors: Mapping[str, Tensor], gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Look at the loss terms since the last log, and at the model. One read of the device.

        Args:
            tensors: name -> parameter or buffer.
            gather: (1, K) tensor -> (ranks, K) tensor, on every rank at once.

        Returns:
            the mean of each term over batches and ranks.

        Raises:
            NonFiniteLossError: on every rank, naming the first terms that were not finite and the step, or the tensor.
        """
        floating = {name: tensor.detach() for name, tensor in tensors.items() if tensor.is_floating_point()}
        # The largest magnitude: NaN and infinity get through, and no sum overflows.
        largest = torch.nn.utils.get_total_norm([*floating.values()], math.inf).to(self.device, torch.float32)
        kinds = self.kinds.values()
        names = [name for kind in kinds for name in kind.names]
        columns = [kind.sums / kind.count for kind in kinds] + [kind.first_bad.float() for kind in kinds]
        rows = gather(torch.cat([*columns, largest[None]])[None]).cpu()
        means, first_bad, largest = rows.split([len(names), len(names), 1], 1)
        steps = torch.where(first_bad < 0, math.inf, first_bad).amin(0).tolist()
        if steps and (first := min(steps)) < math.inf:
            bad_terms = ", ".join(name for name, step in zip(names, steps, strict=True) if step == first)
            raise NonFiniteLossError(f"{bad_terms} was not finite at step {first:.0f}")
        if not largest.isfinite().all():
            bad = [name for name, tensor in floating.items() if not tensor.isfinite().all()]
            raise NonFiniteLossError(f"{bad[0] if bad else 'the model of another process'} is not finite")
        return dict(zip(names, means.mean(dim=0).tolist(), strict=True))

    def averages(self, tensors: Mapping[str, Tensor], gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """What `check` returns, the seconds per step, and the memory; none without a step since the last call.

        Raises:
            NonFiniteLossError: see `check`.
        """
        logs = self.check(tensors, gather)
        if not self.steps:
            return {}
        logs |= {clock: seconds / self.steps for clock, seconds in self.clock.take().items()}
        logs["memory_gb"] = memory_gb(self.device)
        self._start()
        return logs


def memory_gb(device: torch.device) -> float:
    """Peak memory in GB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":  # Python can't tell there
        return float("nan")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
