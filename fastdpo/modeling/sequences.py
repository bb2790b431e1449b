"""The sequences of packed groups for functions that carry a state: what starts, and what goes on.

A prefix starts from nothing, a suffix from the state at the end of its prefix. Sequences are
gathered from the packed sequence into batches, one after another or padded. Padding is zeros: in
front of what starts, where they leave the state that is zero as it is, and behind what goes on,
whose end nobody reads.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple, Self

import torch
from torch import Tensor

from fastdpo.batching import Segment
from fastdpo.system.device import to_device

CHUNK = 64
"""Padded sequences are whole chunks of so many tokens, as the gated delta rule pads its own."""


class Span(NamedTuple):
    """A sequence in the packed one."""

    start: int
    tokens: int
    parent: int  # which of the sequences that start it goes on from; -1 where it starts itself

    @property
    def places(self) -> range:
        """Where its tokens are."""
        return range(self.start, self.start + self.tokens)


@dataclass(frozen=True)
class Batch:
    """Sequences that one call runs: rows of a batch, or one after another in a single row.

    Attributes:
        tokens: (N,) places of their tokens in the packed sequence, sequence by sequence.
        slots: (N,) where they go in the batch, its rows one after another.
        shape: rows and tokens of the batch.
        parents: (sequences,) from which of the states at the ends of what starts each goes on.
        options: arguments that tell the sequences of a single row apart.
    """

    tokens: Tensor
    slots: Tensor
    shape: tuple[int, int]
    parents: Tensor
    options: dict[str, Tensor] = field(default_factory=dict)

    def gather(self, packed: Tensor) -> Tensor:
        """The batch, (rows, tokens, ...), of a packed (1, T, ...)."""
        rows, tokens = self.shape
        taken = packed[0].index_select(0, self.tokens)
        if len(taken) < rows * tokens:
            padded = taken.new_zeros(rows * tokens, *taken.shape[1:])
            taken = padded.index_copy(0, self.slots, taken)
        return taken.unflatten(0, self.shape)


@dataclass(frozen=True)
class Sequences:
    """All sequences of a micro-batch that have tokens."""

    starts: tuple[Span, ...]
    suffixes: tuple[Span, ...]
    device: torch.device

    @classmethod
    def of(cls, segments: Iterable[Segment], device: torch.device) -> Self:
        """The sequences of these segments."""
        starts: list[Span] = []
        suffixes: list[Span] = []
        for segment in segments:
            place, parent = segment.start + segment.prefix_tokens, -1
            if segment.prefix_tokens:
                parent = len(starts)
                starts.append(Span(segment.start, segment.prefix_tokens, -1))
            for tokens in segment.suffix_tokens:
                if tokens:
                    (starts if parent < 0 else suffixes).append(Span(place, tokens, parent))
                place += tokens
        return cls(tuple(starts), tuple(suffixes), device)

    def with_past(self, past: int) -> tuple[Tensor, Tensor]:
        """Each sequence behind the tokens before it, `past` of them.

        Returns:
            (T + past * sequences,) places in the packed sequence, -1 before the start; and (T,)
            where its tokens are among them.
        """
        taken: list[int] = []
        own: dict[int, int] = {}  # where each token of the packed sequence is taken
        for span in (*self.starts, *self.suffixes):
            before: list[int] = []
            if span.parent >= 0:
                before = [*self.starts[span.parent].places][-past:] if past else []
            taken += [-1] * (past - len(before)) + before
            own |= zip(span.places, range(len(taken), len(taken) + span.tokens), strict=True)
            taken += span.places
        return self._indices(taken), self._indices([own[place] for place in sorted(own)])

    def varlen(self) -> tuple[list[Batch], list[Batch]]:
        """One batch of what starts and one of what goes on, sequences one after another."""
        return self._one_after_another(self.starts), self._one_after_another(self.suffixes)

    def padded(self) -> tuple[list[Batch], list[Batch]]:
        """Batches of what starts and of what goes on, sequences of as many chunks together."""
        starts, suffixes = _alike(self.starts), _alike(self.suffixes)
        ends = [number for lot in starts for number in lot]
        place = {number: at for at, number in enumerate(ends)}
        return [self._rows([self.starts[n] for n in lot], []) for lot in starts], [
            self._rows(spans, [place[span.parent] for span in spans])
            for spans in ([self.suffixes[n] for n in lot] for lot in suffixes)
        ]

    def _one_after_another(self, spans: tuple[Span, ...]) -> list[Batch]:
        if not spans:
            return []
        places = [place for span in spans for place in span.places]
        ends = [0, *accumulate(span.tokens for span in spans)]
        lengths = to_device(torch.tensor(ends, dtype=torch.int32), self.device)
        parents = self._indices([span.parent for span in spans])
        taken, slots = self._indices(places), self._indices([*range(len(places))])
        return [Batch(taken, slots, (1, len(places)), parents, {"cu_seqlens": lengths})]

    def _rows(self, spans: list[Span], parents: list[int]) -> Batch:
        length = _chunks(spans[0]) * CHUNK
        places = [place for span in spans for place in span.places]
        # Padding is behind what goes on, and in front of what starts.
        firsts = [0 if parents else length - span.tokens for span in spans]
        slots = [
            row * length + first + at
            for row, (span, first) in enumerate(zip(spans, firsts, strict=True))
            for at in range(span.tokens)
        ]
        taken, parents_of = self._indices(places), self._indices(parents)
        return Batch(taken, self._indices(slots), (len(spans), length), parents_of)

    def _indices(self, values: list[int]) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.int64), self.device)


def unpacking(batches: list[Batch]) -> Tensor:
    """(T,) where each token of the packed sequence is among the batches' outputs, one by one."""
    firsts = accumulate((rows * tokens for rows, tokens in (b.shape for b in batches)), initial=0)
    slots = [batch.slots + first for batch, first in zip(batches, firsts, strict=False)]
    tokens = torch.cat([batch.tokens for batch in batches])
    return torch.empty_like(tokens).index_copy(0, tokens, torch.cat(slots))


def _chunks(span: Span) -> int:
    return -(-span.tokens // CHUNK)


def _alike(spans: tuple[Span, ...]) -> list[list[int]]:
    """Numbers of the sequences, those of as many chunks together."""
    lots: dict[int, list[int]] = {}
    for number, span in enumerate(spans):
        lots.setdefault(_chunks(span), []).append(number)
    return list(lots.values())
