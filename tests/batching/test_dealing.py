"""Groups are dealt to the ranks that share an update: even loads, the same deal everywhere."""

import numpy as np
import pytest

from fastdpo.batching import deal


@pytest.mark.parametrize("shares", [1, 2, 3, 8])
def test_every_group_is_dealt_once_and_loads_are_even(shares):
    draw = np.random.default_rng(0)
    for count in (0, 1, 7, 32, 100):
        sizes = draw.integers(1, 1000, count).tolist()
        dealt = deal(sizes, shares)
        assert len(dealt) == shares
        assert sorted(index for share in dealt for index in share) == list(range(count))
        assert all(share == sorted(share) for share in dealt)
        loads = [sum(sizes[index] for index in share) for share in dealt]
        assert max(loads) - min(loads) <= max(sizes, default=0)


def test_one_share_has_all_in_order():
    assert deal([3, 9, 1], 1) == [[0, 1, 2]]


def test_groups_of_one_key_stay_together():
    keys = [b"a", b"b", b"a", b"c", b"b", b"a"]
    dealt = deal([5, 4, 5, 9, 4, 5], 2, keys)
    assert dealt == [[0, 2, 5], [1, 3, 4]]


def test_copies_of_the_largest_go_to_each_share():
    """So every rank probes the memory of the fullest micro-batch."""
    fullest = [900, 700, 700, 20]
    for share in deal(fullest * 4, 4):
        assert sorted((fullest * 4)[index] for index in share) == sorted(fullest)
