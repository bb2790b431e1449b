"""The order of training: which pairs make up which update, as a function of (seed, epoch)."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np


class UpdateSampler:
    """Yields the pair indices of one update after another, each pair once an epoch.

    Stateless but for the epoch, so a resumed run continues in the same order, and no draw touches
    a generator that training uses. Every epoch has the same number of updates.

    Args:
        lists: (n,) the list that each pair belongs to, see `lists_of`. The pairs of one
            meet in one update; of a list of more than `batch_size` pairs as many as that do.
        batch_size: most pairs of an update. Where no list has several pairs, only the last update
            of an epoch has fewer; elsewhere every update may, since lists are not cut to fill it.
        seed: of the run.
        shuffle: False keeps the data's own order in every epoch; then only those pairs of a list
            are kept together that follow each other.
        drop_last: leave out the update that has the fewest pairs, unless it is full.
    """

    def __init__(
        self,
        lists: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.epoch = 0
        order = np.arange(len(lists))
        if shuffle:
            order = np.argsort(lists, kind="stable")
        names = np.asarray(lists)[order]
        starts = np.flatnonzero(np.diff(names, prepend=-1)).tolist() if len(names) else []
        ordered = order.tolist()
        self.lists = [ordered[start:end] for start, end in pairwise([*starts, len(ordered)])]
        fill = _best_fit if shuffle else _next_fit
        self.plan = fill([len(piece) for piece in self._pieces(self.lists)], batch_size)
        if drop_last and self.plan:
            least = min(range(len(self.plan)), key=lambda i: (sum(self.plan[i]), -i))
            if sum(self.plan[least]) < batch_size:
                del self.plan[least]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields; setting it twice does no harm."""
        self.epoch = epoch

    @property
    def keeps_together(self) -> bool:
        """True where a list has several pairs."""
        return any(len(members) > 1 for members in self.lists)

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[int]]:
        lists = self.lists
        order = np.arange(len(self.plan))
        if self.shuffle:
            generator = np.random.Generator(np.random.PCG64([self.seed, self.epoch]))
            lists = [lists[i] for i in generator.permutation(len(lists))]
            if self.keeps_together:
                lists = [self._shuffled(members, generator) for members in lists]
                order = generator.permutation(len(self.plan))
        by_size: dict[int, list[list[int]]] = {}
        for piece in reversed(self._pieces(lists)):
            by_size.setdefault(len(piece), []).append(piece)
        updates = [[pair for size in sizes for pair in by_size[size].pop()] for sizes in self.plan]
        for index in order:
            yield updates[index]

    def _shuffled(self, members: list[int], generator: np.random.Generator) -> list[int]:
        """The list, in another order if it has to be cut.

        One that is whole has its completions in the order of the reference pass, to the same bits.
        """
        whole = len(members) <= self.batch_size
        return members if whole else generator.permutation(members).tolist()

    def _pieces(self, lists: Sequence[list[int]]) -> list[list[int]]:
        """The lists, those of too many pairs cut."""
        most = self.batch_size
        return [
            members[start : start + most]
            for members in lists
            for start in range(0, len(members), most)
        ]


def _ones(count: int, most: int) -> list[list[int]]:
    """Fill updates with sizes that are all 1, the usual case, as either way of filling does."""
    return [[1] * min(most, count - start) for start in range(0, count, most)]


def _next_fit(sizes: Sequence[int], most: int) -> list[list[int]]:
    """The sizes in their order, as many to an update as fit."""
    if max(sizes, default=1) == 1:
        return _ones(len(sizes), most)
    updates: list[list[int]] = []
    for size in sizes:
        if updates and sum(updates[-1]) + size <= most:
            updates[-1].append(size)
        else:
            updates.append([size])
    return updates


def _best_fit(sizes: Sequence[int], most: int) -> list[list[int]]:
    """The sizes, the largest first, each in the fullest update that it fits into."""
    if max(sizes, default=1) == 1:
        return _ones(len(sizes), most)
    updates: list[list[int]] = []
    with_room: list[list[list[int]]] = [[] for _ in range(most + 1)]
    for size in sorted(sizes, reverse=True):
        room = next((room for room in range(size, most + 1) if with_room[room]), None)
        if room is None:
            room, update = most, []
            updates.append(update)
        else:
            update = with_room[room].pop()
        update.append(size)
        with_room[room - size].append(update)
    return updates
