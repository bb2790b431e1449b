"""The segments of one micro-batch, and the masks and layouts that its layers share."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdpo.batching import Segment

Result = TypeVar("Result")


@dataclass
class PackedSegments:
    """The segments of one micro-batch, and the masks and indices that its layers share.

    Without segments the micro-batch is one of padded sequences, each of which attends to its own
    past.
    """

    segments: tuple[Segment, ...]
    layers_run: int = 0
    _cache: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def split_tokens(self) -> list[int]:
        """Lengths of the blocks that attend as one: prefix with first suffix, further suffixes."""
        lengths = []
        for segment in self.segments:
            first, *others = segment.suffix_tokens or (0,)
            lengths += [segment.prefix_tokens + first, *others]
        return lengths

    def cached(self, key: Hashable, make: Callable[[], Result]) -> Result:
        """The result of `make`, called once for each key."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """A causal mask with the ends aligned, inside the window if there is one.

        Returns:
            (queries, keys) bool, True where the query sees the key.
        """

        def make() -> Tensor:
            distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(
                keys, device=device
            )
            allowed = distance >= 0
            return allowed if window is None else allowed & (distance < window)

        return self.cached(("mask", queries, keys, window), make)


@dataclass(frozen=True)
class AttentionParams:
    """How a layer forms scores from queries and keys, and weights from scores.

    Attributes:
        scaling: factor on the scores; None is 1 / sqrt(D).
        window: how many of the last positions a query sees, its own included; None: all.
        softcap: scores s become softcap * tanh(s / softcap); None: they stay.
        sinks: (Hq,), for each head the score of one more key, whose value is 0.
        dropout: share of weights that is dropped.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0

    def scale(self, head_dim: int) -> float:
        """The factor on the scores."""
        return head_dim**-0.5 if self.scaling is None else self.scaling
