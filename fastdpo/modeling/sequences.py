"""The sequences of packed groups for functions that carry a state: what starts, and what goes on.

A prefix starts from nothing, a suffix from the state at the end of its prefix. Sequences are
gathered from the packed sequence into batches, one after another or padded. Padding is zeros: in
front of what starts, where they leave the state that is zero as it is, and behind what goes on,
whose end nobody reads.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fastdpo.batching import Segment

CHUNK = 64
"""Padded sequences are whole chunks long, as the gated delta rule pads them itself; so what is
computed together does not depend on the neighbors."""


class Span(NamedTuple):
    """A sequence in the packed one."""

    start: int
    tokens: int
    parent: int  # which of the sequences that start it goes on from; -1 where it starts itself


@dataclass(frozen=True)
class Batch:
    """Sequences that one call runs.

    Attributes:
        tokens: (N,) places of their tokens in the packed sequence, sequence by sequence.
        slots: (N,) where they go in the batch, its rows one after another; None: as they come.
        shape: rows and tokens of the batch.
        parents: (sequences,) from which of the states each goes on; None: they start.
        options: what tells the sequences apart where they are not rows.
    """

    tokens: Tensor
    slots: Tensor | None
    shape: tuple[int, int]
    parents: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    def gathered(self, packed: Tensor) -> Tensor:
        """The batch, (rows, tokens, ...), of a packed (1, T, ...)."""
        taken = packed[0].index_select(0, self.tokens)
        if self.slots is not None:
            padded = taken.new_zeros(self.shape[0] * self.shape[1], *taken.shape[1:])
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
        own: list[tuple[int, int]] = []  # (place in the packed sequence, place among the taken)
        for span in (*self.starts, *self.suffixes):
            if span.parent < 0:
                before: list[int] = []
            else:
                prefix = self.starts[span.parent]
                end = prefix.start + prefix.tokens
                before = list(range(max(prefix.start, end - past), end))
            taken += [-1] * (past - len(before)) + before
            own.append((span.start, len(taken)))
            taken += range(span.start, span.start + span.tokens)
        lengths = {span.start: span.tokens for span in (*self.starts, *self.suffixes)}
        places = [at + i for start, at in sorted(own) for i in range(lengths[start])]
        return self._indices(taken), self._indices(places)

    def varlen(self) -> tuple[list[Batch], list[Batch]]:
        """One batch of what starts and one of what goes on, sequences one after another."""
        parents = self._indices([span.parent for span in self.suffixes])
        return [self._one_after_another(self.starts, None)], [
            self._one_after_another(self.suffixes, parents)
        ] if self.suffixes else []

    def padded(self) -> tuple[list[Batch], list[Batch]]:
        """Batches of what starts and of what goes on, sequences of like length together."""
        starts = _alike(self.starts)
        ends = {number: at for at, number in enumerate(n for lot in starts for n in lot)}
        return [self._rows([self.starts[n] for n in lot], None) for lot in starts], [
            self._rows(spans, self._indices([ends[span.parent] for span in spans]))
            for lot in _alike(self.suffixes)
            for spans in [[self.suffixes[n] for n in lot]]
        ]

    @staticmethod
    def order(batches: list[Batch]) -> Tensor:
        """(T,) where each token of the packed sequence is among the batches' flat outputs."""
        firsts = accumulate((rows * tokens for rows, tokens in (b.shape for b in batches)), initial=0)
        slots = [
            first + (torch.arange(len(b.tokens), device=b.tokens.device) if b.slots is None else b.slots)
            for first, b in zip(firsts, batches, strict=False)
        ]
        tokens = torch.cat([batch.tokens for batch in batches])
        return torch.empty_like(tokens).index_copy(0, tokens, torch.cat(slots))

    def _one_after_another(self, spans: Iterable[Span], parents: Tensor | None) -> Batch:
        places = [place for span in spans for place in range(span.start, span.start + span.tokens)]
        ends = [0, *accumulate(span.tokens for span in spans)]
        lengths = torch.tensor(ends, dtype=torch.int32, device=self.device)
        return Batch(
            self._indices(places), None, (1, len(places)), parents, {"cu_seqlens": lengths}
        )

    def _rows(self, spans: list[Span], parents: Tensor | None) -> Batch:
        length = _whole_chunks(max(span.tokens for span in spans))
        places: list[int] = []
        slots: list[int] = []
        for row, span in enumerate(spans):
            first = row * length + (length - span.tokens if parents is None else 0)
            places += range(span.start, span.start + span.tokens)
            slots += range(first, first + span.tokens)
        return Batch(self._indices(places), self._indices(slots), (len(spans), length), parents)

    def _indices(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _whole_chunks(tokens: int) -> int:
    return -(-tokens // CHUNK) * CHUNK


def _alike(spans: tuple[Span, ...]) -> list[list[int]]:
    """Numbers of the sequences, those of like length together."""
    lots: dict[int, list[int]] = {}
    for number, span in enumerate(spans):
        lots.setdefault(_BUCKET(span.tokens), []).append(number)
    return list(lots.values())


import os
_BUCKET = {"exact": _whole_chunks, "one": lambda n: 0, "pow2": lambda n: (_whole_chunks(n)//CHUNK-1).bit_length()}[os.environ.get("BUCKET","exact")]
