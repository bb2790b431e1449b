"""Which groups share a packed sequence, and how long those are: bin packing, numbers only."""

from collections.abc import Sequence

LEAST_STEP_TOKENS, STEPS_PER_OCTAVE = 32, 32
"""Lengths are whole steps, so that few shapes occur in a run: see `rounded_length`."""


def rounded_length(tokens: int) -> int:
    """Round up to a length of packed sequences: 32 lengths from one power of two to the next.

    So a packed sequence is at most 1/32 filler (more below 1,024 tokens, where lengths are
    multiples of 32), and a run sees few shapes whatever its T.
    """
    step = max(LEAST_STEP_TOKENS, (1 << max(0, tokens.bit_length() - 1)) // STEPS_PER_OCTAVE)
    return -(-tokens // step) * step


def fill_evenly(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Fill the fewest bins by best-fit decreasing, at the least capacity at which they are as few.

    Args:
        sizes: tokens of each group.
        limit: T; a group of more tokens has a bin of its own.

    Returns:
        For each bin the indices of its groups.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    alone = [[i] for i in order if sizes[i] > limit]
    order = order[len(alone) :]
    if not order:
        return alone
    total, largest = sum(sizes[i] for i in order), sizes[order[0]]
    count = -(-total // limit)
    while True:
        capacity = min(limit, rounded_length(max(largest, -(-total // count))))
        while True:
            bins = _best_fit(sizes, order, capacity)
            if len(bins) <= count:
                return alone + bins
            if capacity == limit:
                break
            capacity = min(limit, rounded_length(capacity + 1))
        count += 1


def _best_fit(sizes: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for index in order:
        fitting = [b for b in range(len(bins)) if room[b] >= sizes[index]]
        if not fitting:
            fitting = [len(bins)]
            bins.append([])
            room.append(capacity)
        best = min(fitting, key=lambda b: room[b])
        bins[best].append(index)
        room[best] -= sizes[index]
    return bins
