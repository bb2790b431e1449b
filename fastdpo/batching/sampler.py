"""The order of training: which pairs make up which update, as a function of (seed, epoch)."""

from collections.abc import Iterator

import numpy as np


class UpdateSampler:
    """Yields the pair indices of one update after another, each pair once an epoch.

    Stateless but for the epoch, so a resumed run continues in the same order, and no draw touches
    a generator that training uses.

    Args:
        pairs: how many pairs there are.
        batch_size: pairs per update; the last update of an epoch may have fewer.
        seed: of the run.
        shuffle: False keeps the data's own order in every epoch.
        drop_last: leave out an update that is not full.
    """

    def __init__(
        self,
        pairs: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.pairs = pairs
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields; setting it twice does no harm."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self.pairs, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(self.pairs)
        if self.shuffle:
            generator = np.random.Generator(np.random.PCG64([self.seed, self.epoch]))
            order = generator.permutation(self.pairs)
        for update in range(len(self)):
            yield order[update * self.batch_size : (update + 1) * self.batch_size].tolist()
