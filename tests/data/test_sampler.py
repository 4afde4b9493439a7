from itertools import chain

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from torch.utils.data import DataLoader

from crosskd_hf.data.sampler import OrientationBatchSampler, SampleKey, stable_seed

#             0  1  2  3  4  5  6  7  8  9
UPRIGHT = [1, 0, 0, 1, 1, 0, 0, 0, 0, 1]


def indices(batches):
    return [[key.index for key in batch] for batch in batches]


@pytest.mark.parametrize(
    ("size", "group", "batches"),
    [
        # 0 | 1 2 | 3 | 4 -> upright full; 5 -> the others full; 6 7 8 full; 9 is left.
        (3, True, [[0, 3, 4], [1, 2, 5], [6, 7, 8], [9]]),
        # left: 7 8 (wide) - upright 0 3 4 9 filled at 9, wide 1 2 5 6 filled at 6.
        (4, True, [[1, 2, 5, 6], [0, 3, 4, 9], [7, 8]]),
        (5, True, [[1, 2, 5, 6, 7], [0, 3, 4, 9, 8]]),  # upright ones first
        (4, False, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),
    ],
)
def test_groups_are_given_when_full_and_what_is_left_is_joined(monkeypatch, size, group, batches):
    monkeypatch.setattr(torch, "randperm", lambda length, generator: torch.arange(length))
    assert indices(OrientationBatchSampler(UPRIGHT, size, seed=0, group=group)) == batches


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_length_is_exact_and_only_the_last_batch_is_short(batch_size, drop_last):
    sampler = OrientationBatchSampler(UPRIGHT, batch_size, seed=3, drop_last=drop_last)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        batches = indices(sampler)
        assert len(batches) == len(sampler) == (10 // batch_size if drop_last else -(-10 // batch_size))
        assert all(len(batch) == batch_size for batch in batches[:-1])
        if not drop_last:
            assert sorted(chain.from_iterable(batches)) == list(range(10))


def test_order_is_keyed_on_seed_and_epoch():
    def order(seed, epoch):
        sampler = OrientationBatchSampler([0] * 50, 5, seed=seed)
        sampler.set_epoch(epoch)
        torch.rand(3)  # the global generator has no part in it
        return indices(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2) and order(0, 1) != order(1, 1) and order(0, 1) != order(1, 0)


def test_keys_carry_the_epoch():
    sampler = OrientationBatchSampler(UPRIGHT, 3, seed=0)
    sampler.set_epoch(4)
    assert {key.epoch for batch in sampler for key in batch} == {4}
    batches = iter(sampler)
    next(batches)
    sampler.set_epoch(5)  # an epoch that has begun goes on
    assert {key.epoch for batch in batches for key in batch} == {4}


def test_stable_seed_does_not_change():
    assert stable_seed(0, 1, 2) == 1772749440416956875  # b2sum -l 64 of "(0, 1, 2)", shifted right by 1
    assert stable_seed(0, 1, 2) != stable_seed(0, 2, 1) and stable_seed(1, 2) != stable_seed(12)
    assert 0 <= stable_seed(-1) < 2**63


def test_refusals():
    with pytest.raises(ValueError, match="no images"):
        OrientationBatchSampler([], 2, seed=0)
    with pytest.raises(ValueError, match="10 images make no batch of 11"):
        OrientationBatchSampler(UPRIGHT, 11, seed=0, drop_last=True)
    assert len(OrientationBatchSampler(UPRIGHT, 10, seed=0, drop_last=True)) == 1
    with pytest.raises(ValueError, match="batch_size"):
        OrientationBatchSampler(UPRIGHT, 0, seed=0)


class Keys(torch.utils.data.Dataset):
    def __len__(self):
        return len(UPRIGHT)

    def __getitem__(self, key):
        assert isinstance(key, SampleKey)
        return tuple(key)


def prepared(processes):
    sampler = OrientationBatchSampler(UPRIGHT, 2, seed=0)
    loader = DataLoader(Keys(), batch_sampler=sampler, collate_fn=list)
    return prepare_data_loader(loader, num_processes=processes, process_index=0, put_on_device=False)


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_two_ranks_see_each_image_and_batches_are_even(batch_size):
    # Not read through an accelerator: its shards are what deals the batches.
    ranks = []
    for rank in range(2):
        shard = BatchSamplerShard(OrientationBatchSampler(UPRIGHT, batch_size, seed=0), 2, rank)
        ranks.append(indices(shard))
        assert len(ranks[-1]) == len(shard)
    assert len(ranks[0]) == len(ranks[1])
    assert ranks[0] != ranks[1] or batch_size == 10  # one batch in all: the second rank repeats it
    assert {len(batch) for rank in ranks for batch in rank} == {batch_size}
    assert set(chain.from_iterable(ranks[0] + ranks[1])) == set(range(10))


@pytest.mark.parametrize("processes", [1, 2])
def test_skipped_batches_are_the_first_ones(processes):
    complete, skipped = prepared(processes), prepared(processes)
    for data in (complete, skipped):
        data.set_epoch(2)
    batches = list(complete)
    assert list(skip_first_batches(skipped, 2)) == batches[2:]
    # accelerate passes the epoch on through `sampler`, and counts epochs itself.
    assert [{key[0] for batch in data for key in batch} for data in (batches, complete)] == [{2}, {3}]
