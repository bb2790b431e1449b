"""Which pairs make up which update: each once an epoch, the pairs of a list in one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdpo.batching.sampler import UpdateSampler


def updates(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("drop_last", [False, True])
def test_pairs_that_share_nothing_come_in_the_order_of_one_permutation(drop_last):
    sampler = UpdateSampler(range(35), 8, seed=3, drop_last=drop_last)
    for epoch in range(3):
        order = np.random.Generator(np.random.PCG64([3, epoch])).permutation(35).tolist()
        expected = [order[at : at + 8] for at in range(0, 35, 8)]
        assert updates(sampler, epoch) == expected[: 4 if drop_last else 5]
    assert not sampler.keeps_together
    in_order = UpdateSampler(range(35), 8, seed=3, shuffle=False, drop_last=drop_last)
    assert [pair for update in updates(in_order) for pair in update] == list(
        range(32 if drop_last else 35)
    )


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(1, 24), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_lists_stay_whole_and_epochs_are_as_long(lists, most, shuffle, drop_last):
    sampler = UpdateSampler(lists, most, seed=1, shuffle=shuffle, drop_last=drop_last)
    epochs = [updates(sampler, epoch) for epoch in range(3)]
    assert updates(sampler, 1) == epochs[1]
    for found in epochs:
        assert len(found) == len(sampler)
        assert all(0 < len(update) <= most for update in found)
        seen = [pair for update in found for pair in update]
        assert len(set(seen)) == len(seen)
        if drop_last:
            assert len(lists) - len(seen) < most
            continue
        assert sorted(seen) == list(range(len(lists)))
        if not shuffle:
            assert seen == sorted(seen)
            continue
        for name in set(lists):
            size = lists.count(name)
            meet = [sum(lists[pair] == name for pair in update) for update in found]
            assert sum(map(bool, meet)) == -(-size // most), "in as few updates as hold it"


def test_an_epoch_is_another_epochs_updates_in_another_order_and_company():
    lists = np.repeat(np.arange(40), 6)
    sampler = UpdateSampler(lists, 13, seed=5)
    first, second = updates(sampler, 0), updates(sampler, 1)
    assert first != second
    for found in (first, second):
        assert sorted(map(len, found)) == [12] * 20
        assert all(sorted(np.bincount(lists[update]))[-2:] == [6, 6] for update in found)
    assert len({frozenset(lists[update]) for update in first + second}) > 20
