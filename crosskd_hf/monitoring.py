"""What a training step leaves behind for the log: kept on the device, read only when the log is written."""

import sys

import torch
from torch import Tensor

STEP_CLOCKS = ("data_time", "step_time")
GRADIENT = "gradient"


class NonFiniteLossError(RuntimeError):
    """A loss term or the gradient became infinite or NaN."""


class StepMonitor:
    """Sums of loss terms since the last log, and the first step at which each was not finite.

    Args:
        device: where the losses are.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.zero = torch.zeros((), device=device)
        self.names: list[str] = []
        self.count = 0
        self.sums = torch.zeros(0, device=device)
        self.first_bad = torch.zeros(0, dtype=torch.long, device=device)
        self.seconds = dict.fromkeys(STEP_CLOCKS, 0.0)

    def record(self, terms: dict[str, Tensor], step: int) -> Tensor:
        """Add a step's terms (scalars). Returns a factor for the loss: 1, or NaN if any term isn't finite.

        Times the loss, the factor makes every gradient NaN - after averaging, on all ranks - so that the step is
        masked out everywhere. (A finite gradient can come out of an infinite loss.)
        """
        values = torch.stack([*(term.detach().float() for term in terms.values()), self.zero])
        if [*terms, GRADIENT] != self.names:
            self._start([*terms, GRADIENT])
        bad = ~values.isfinite()
        self.sums = self.sums + values
        self.first_bad = torch.where(bad & (self.first_bad < 0), step, self.first_bad)
        self.count += 1
        return torch.where(bad.any(), float("nan"), 1.0)

    def record_gradient(self, bad: Tensor, step: int) -> None:
        """Note that the gradient was not finite at a step, if the scalar `bad` is true."""
        index = self.names.index(GRADIENT)
        first = self.first_bad[index]
        self.first_bad[index] = torch.where(bad & (first < 0), step, first)

    def _start(self, names: list[str]) -> None:
        self.names = names
        self.sums = torch.zeros(len(names), device=self.device)
        self.first_bad = torch.full((len(names),), -1, dtype=torch.long, device=self.device)
        self.count = 0

    def averages(self, gather) -> dict[str, float]:
        """Mean of each term since the last call, over all ranks, and the seconds a step. One read of the device.

        Args:
            gather: (K,) tensor -> (ranks, K) tensor, on every rank at once.

        Raises:
            NonFiniteLossError: naming the first terms that were not finite and the step.
        """
        if not self.count:
            return {}
        rows = gather(torch.cat([self.sums / self.count, self.first_bad.float()])[None]).cpu()
        means, first_bad = rows.chunk(2, dim=1)
        steps = {
            name: min(s for s in column if s >= 0)
            for name, column in zip(self.names, first_bad.T.tolist(), strict=True)
            if max(column) >= 0
        }
        if steps:
            first = int(min(steps.values()))
            names = ", ".join(name for name, step in steps.items() if step == first)
            raise NonFiniteLossError(f"{names} was not finite at step {first}")
        logs = dict(zip(self.names, means.mean(dim=0).tolist(), strict=True))
        logs.pop(GRADIENT)
        logs |= {clock: seconds / self.count for clock, seconds in self.seconds.items()}
        logs["memory_gb"] = memory_gb(self.device)
        self.sums, self.count = torch.zeros_like(self.sums), 0
        self.seconds = dict.fromkeys(STEP_CLOCKS, 0.0)
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
