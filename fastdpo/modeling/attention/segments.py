"""The segments of one micro-batch, and what its layers derive from them once."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdpo.batching import Segment

Made = TypeVar("Made")


@dataclass
class PackedSegments:
    """The segments of one micro-batch, and the masks and indices that its layers share.

    Without segments the micro-batch is one of padded rows, each of which attends to its own past.
    """

    segments: tuple[Segment, ...]
    layers_run: int = 0
    _made: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def split_tokens(self) -> list[int]:
        """Lengths that cut the row into what attends as one block: prefix + suffix 1, others."""
        lengths = []
        for segment in self.segments:
            first, *others = segment.suffix_tokens or (0,)
            lengths += [segment.prefix_tokens + first, *others]
        return lengths

    def cached(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, made when first asked for under this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """(queries, keys) bool, causal with the ends aligned, inside the window if there is one."""

        def make() -> Tensor:
            distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(
                keys, device=device
            )
            allowed = distance >= 0
            return allowed if window is None else allowed & (distance < window)

        return self.cached(("mask", queries, keys, window), make)


@dataclass(frozen=True)
class AttentionParams:
    """How scores are formed from queries and keys, and what they compete with."""

    scaling: float | None = None  # of the scores; None is 1 / sqrt(D)
    window: int | None = None  # how many of the last positions a query sees, its own included
    softcap: float | None = None  # scores are softcap * tanh(scores / softcap)
    sinks: Tensor | None = None  # (Hq,): the score of one more key of each head, whose value is 0
    dropout: float = 0.0

    def scale(self, head_dim: int) -> float:
        """The factor on the scores."""
        return head_dim**-0.5 if self.scaling is None else self.scaling
