"""The order of a training epoch: keyed on (seed, epoch), and batches of one image orientation."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain, count, cycle, islice
from typing import NamedTuple

import torch
from torch.utils.data import Sampler


def stable_seed(*parts: int) -> int:
    """A 63-bit seed from integers: the same on every machine, and unrelated for neighbouring values."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class SampleKey(NamedTuple):
    """Names one draw of one image: `DetectionDataset` keys its augmentation on it.

    Attributes:
        batch: the number of its batch in the epoch, over all processes.
        turn: how often all unlabelled images were gone through before.
    """

    epoch: int
    index: int  # type: ignore[assignment] # hides tuple.index, which nobody needs of a key
    batch: int = 0
    turn: int = 0


class EpochSampler(Sampler[SampleKey]):
    """Every index once, in an order that (seed, epoch) fixes; all ranks see the same order.

    Args:
        length: number of items.
        seed: of the shuffle.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[SampleKey]:
        epoch = self.epoch  # an epoch that has begun is not changed by `set_epoch`
        generator = torch.Generator().manual_seed(stable_seed(self.seed, epoch))
        order = torch.randperm(self.length, generator=generator)
        return (SampleKey(epoch, index) for index in order.tolist())


class OrientationBatchSampler(Sampler[list[SampleKey]]):
    """Batches of `SampleKey`s in which all images are upright or all are not, which saves padding.

    A batch is given as soon as its group has `batch_size` images. What is left of the two groups at the end of the
    epoch is joined, upright images first, and cut into batches, so that only the last batch of an epoch is short: that
    is what accelerate's `BatchSamplerShard` needs to deal batches to ranks. `set_epoch` must be called before each
    epoch, on this object: accelerate's wrappers do not all pass it on.

    Args:
        orientations: (N,) bool, True where the image is narrower than high.
        batch_size: images per batch and rank.
        seed: of the shuffle.
        group: False mixes orientations.
        drop_last: leave the short batch out.

    Raises:
        ValueError: no images, a batch size below 1, or `drop_last` with fewer images than one batch.
    """

    def __init__(
        self,
        orientations: torch.Tensor | Sequence[bool],
        batch_size: int,
        *,
        seed: int,
        group: bool = True,
        drop_last: bool = False,
    ) -> None:
        length = len(orientations)
        if length == 0:
            raise ValueError("there are no images to sample from")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if drop_last and length < batch_size:
            raise ValueError(f"{length} images make no batch of {batch_size}: lower batch_size or set drop_last=False")
        upright = torch.as_tensor(orientations, dtype=torch.bool)
        self.upright = upright if group else torch.zeros_like(upright)  # all of one group: nothing is left to join
        # accelerate reads the next three
        self.sampler = EpochSampler(length, seed)
        self.batch_size = batch_size
        self.drop_last = drop_last

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size if self.drop_last else -(-len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for number, batch in enumerate(self._batches()):
            yield [key._replace(batch=number) for key in batch]

    def _batches(self) -> Iterator[list[SampleKey]]:
        upright = self.upright.tolist()
        groups: dict[bool, list[SampleKey]] = {True: [], False: []}
        for key in self.sampler:
            group = groups[upright[key.index]]
            group.append(key)
            if len(group) == self.batch_size:
                yield group.copy()
                group.clear()
        left = groups[True] + groups[False]
        for start in range(0, len(left), self.batch_size):
            batch = left[start : start + self.batch_size]
            if len(batch) == self.batch_size or not self.drop_last:
                yield batch


class MixedBatchSampler(Sampler[list[SampleKey]]):
    """Labelled batches in their order, and between them unlabelled ones, which come from behind the labelled images.

    Both come in rounds of a batch per process, so that all processes have the same kind of batch in a step. The last
    labelled round is filled up with the first labelled images. An epoch is one of the labelled images; unlabelled ones
    go on where the epoch before has ended. All of it is a function of (seed, epoch).

    Args:
        labeled: batches of the labelled images.
        unlabeled: batches of the unlabelled ones, with `drop_last`.
        ratio: unlabelled batches per labelled batch.
        processes: that batches are dealt to.
    """

    def __init__(
        self, labeled: OrientationBatchSampler, unlabeled: OrientationBatchSampler, ratio: float, processes: int = 1
    ) -> None:
        self.labeled = labeled
        self.unlabeled = unlabeled
        self.ratio = ratio
        self.processes = processes
        # accelerate reads the next three
        self.sampler = labeled.sampler
        self.batch_size = labeled.batch_size
        self.drop_last = labeled.drop_last

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration gives."""
        self.labeled.set_epoch(epoch)

    @property
    def rounds(self) -> int:
        """Labelled rounds of an epoch."""
        return -(-len(self.labeled) // self.processes)

    def __len__(self) -> int:
        return self.processes * (self.rounds + int(self.rounds * self.ratio))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch = self.sampler.epoch
        keys = list(chain.from_iterable(self.labeled))
        rounds, size = self.rounds, self.batch_size
        labeled = iter([*keys, *islice(cycle(keys), rounds * self.processes * size - len(keys))])
        unlabeled = self._unlabeled(epoch, epoch * self.processes * int(rounds * self.ratio))
        number = 0
        for i in range(rounds):
            batches = [list(islice(labeled, size)) for _ in range(self.processes)]
            new_rounds = int((i + 1) * self.ratio) - int(i * self.ratio)
            for batch in (*batches, *islice(unlabeled, self.processes * new_rounds)):
                yield [key._replace(batch=number) for key in batch]
                number += 1

    def _unlabeled(self, epoch: int, start: int) -> Iterator[list[SampleKey]]:
        """Without end, from batch `start` of all on."""
        first, skipped = divmod(start, len(self.unlabeled))
        behind = len(self.sampler)
        for turn in count(first):
            self.unlabeled.set_epoch(turn)
            for batch in islice(self.unlabeled, skipped, None):
                # Augmentation knows the training's epochs.
                yield [SampleKey(epoch, behind + key.index, turn=turn) for key in batch]
            skipped = 0
