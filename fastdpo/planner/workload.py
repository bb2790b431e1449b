"""The pairs of a run in numbers: how full micro-batches of any length are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from fastdpo.planner.activations import MicroBatchShape

ROUNDING_TOKENS = 128
"""Micro-batch lengths are multiples of it."""


@dataclass(frozen=True)
class Workload:
    """The pairs of a data set in numbers, from which full micro-batches of any length follow.

    Attributes:
        longest_group_tokens: tokens of the longest pair, its shared prefix counted once.
        update_tokens: tokens of an update; a micro-batch of more gains nothing.
        scored_share: scored tokens over all tokens.
        repeated_share: prefix tokens over all tokens, of groups with a second completion.
        mean_group_tokens: tokens of the pair that a token belongs to, on average over the tokens;
            None: those of the longest.
    """

    longest_group_tokens: int
    update_tokens: int
    scored_share: float = 1.0
    repeated_share: float = 0.0
    mean_group_tokens: float | None = None

    @property
    def usual_group_tokens(self) -> float:
        """Tokens of the pair that a token belongs to, which its attention takes time for."""
        return self.mean_group_tokens or self.longest_group_tokens

    def shape(self, tokens: int) -> MicroBatchShape:
        """A full micro-batch of this many tokens."""
        scored = min(tokens, int(tokens * self.scored_share) + 1)
        pairs = -(-tokens // int(self.usual_group_tokens))
        repeated = int(tokens * self.repeated_share)
        return MicroBatchShape(tokens, scored, repeated, prefixes=pairs, suffixes=2 * pairs)

    @classmethod
    def of(
        cls,
        group_tokens: Sequence[int],
        pairs_per_update: int,
        *,
        computed_tokens: int | None = None,
        scored_tokens: int,
        repeated_tokens: int = 0,
    ) -> Self:
        """The workload of a data set, by the tokens of its pairs.

        An update is taken to have `pairs_per_update` pairs of average length.

        Args:
            group_tokens: tokens of every pair, its shared prefix counted once.
            pairs_per_update: B.
            computed_tokens: tokens that are computed for all pairs; None: the sum of theirs.
            scored_tokens: how many of those are scored.
            repeated_tokens: how many of those are prefixes, by each completion but the first.
        """
        total = sum(group_tokens) if computed_tokens is None else computed_tokens
        return cls(
            max(group_tokens),
            int(total / len(group_tokens) * pairs_per_update),
            scored_share=scored_tokens / total,
            repeated_share=repeated_tokens / total,
            mean_group_tokens=sum(n * n for n in group_tokens) / sum(group_tokens),
        )

    def lengths(self) -> list[int]:
        """Values of T to choose from: from the longest group's length to a whole update's."""
        least, most = rounded(self.longest_group_tokens), rounded(self.update_tokens)
        lengths = [least]
        while lengths[-1] < most:
            lengths.append(min(rounded(int(lengths[-1] * 1.125)), most))
        return lengths


def rounded(tokens: int) -> int:
    """A micro-batch's length: tokens, up to the next multiple of `ROUNDING_TOKENS`."""
    return -(-tokens // ROUNDING_TOKENS) * ROUNDING_TOKENS
