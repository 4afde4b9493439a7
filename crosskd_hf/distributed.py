"""What the package asks of other processes, and of the other batches of a step: sums and means over all of them."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch import distributed as dist


def num_processes() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """Average of a tensor over all processes, without gradient; the tensor itself in a single process."""
    value = value.detach()
    return value if num_processes() == 1 else sum_over_ranks(value) / num_processes()


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes, in fp32 or more, without gradient."""
    value = value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
    if num_processes() > 1:
        dist.all_reduce(value)
    return value


class Normalizers:
    """What a detector's losses are divided by: sums over the images of a batch, such as the number of positives.

    Every process, and every batch that is accumulated, divides by the mean over all of them, so that the gradient is
    that of one large batch. Over processes as the reference does it. Over accumulated batches the reference has
    nothing; transformers does the same with the tokens of language models (`num_items_in_batch`). The sums are then
    needed before the first batch's loss, so they are measured before: see `DenseDetector.measure_normalizers`.

    Attributes:
        sync: also average those that are a process' own in the reference.
    """

    def __init__(self) -> None:
        self.sync = False
        self._measured: dict[tuple[str, bool], list[Tensor]] | None = None
        self._of_step: dict[str, Tensor] = {}

    def average(self, name: str, value: Tensor, per_process: bool = False) -> Tensor:
        """The mean of a batch's sum over processes and accumulated batches, without gradient.

        Args:
            name: which of a detector's normalisers it is.
            value: scalar, before it is bounded from below.
            per_process: the reference doesn't average it over processes.
        """
        if name in self._of_step:
            return self._of_step[name]
        own = per_process and not self.sync
        if self._measured is not None:
            self._measured.setdefault((name, own), []).append(value.detach())
            return value.detach()
        return value.detach() if own else mean_over_ranks(value)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Around measurements of all batches of a step: the mean of what they give serves until `release`."""
        self.release()
        self._measured = {}
        try:
            yield
        finally:
            measured, self._measured = self._measured, None
        for (name, own), values in measured.items():
            mean = torch.stack(values).mean()
            self._of_step[name] = mean if own else mean_over_ranks(mean)

    def release(self) -> None:
        """Each batch has its own again."""
        self._of_step = {}
