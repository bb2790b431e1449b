"""Which process of several computes which groups, so that all are done at about the same time."""

from collections.abc import Hashable, Sequence
from heapq import heapify, heapreplace


def deal(
    sizes: Sequence[int], shares: int, together: Sequence[Hashable] | None = None
) -> list[list[int]]:
    """Deal groups out, the largest first, each to the share that has the fewest tokens so far.

    The result depends on the arguments alone, so every process finds the same one.

    Args:
        sizes: tokens of each group.
        shares: how many shares there are.
        together: a key for each group; those of one key stay in one share.

    Returns:
        For each share the indices of its groups, ascending; none where there are too few groups.
    """
    if shares == 1:
        return [list(range(len(sizes)))]
    units: dict[Hashable, list[int]] = {}
    for index in range(len(sizes)):
        units.setdefault(index if together is None else together[index], []).append(index)
    heaviest_first = sorted(
        ((-sum(sizes[i] for i in unit), unit) for unit in units.values()),
    )
    dealt: list[list[int]] = [[] for _ in range(shares)]
    loads = [(0, share) for share in range(shares)]
    heapify(loads)
    for negative, unit in heaviest_first:
        load, share = loads[0]
        dealt[share] += unit
        heapreplace(loads, (load - negative, share))
    return [sorted(share) for share in dealt]
