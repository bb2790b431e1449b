"""Dense copies of 4-bit weights that wait from a layer's recomputation to its backward."""

from __future__ import annotations

import weakref
from contextvars import ContextVar, Token

from torch import Tensor

_recomputing: ContextVar[KeptDenseWeights | None] = ContextVar("_recomputing", default=None)
_keepers: dict[int, weakref.ref[KeptDenseWeights]] = {}  # of a weight, by its id


class KeptDenseWeights:
    """A context in which 4-bit weights are dequantized for the backward that follows, too.

    To be entered where a layer is run again for its backward, and nowhere else. Each copy is given
    up when the gradient of its layer's input has used it, and all of them with this object.
    """

    def __init__(self) -> None:
        self._by_weight: dict[int, Tensor] = {}
        self._before: list[Token[KeptDenseWeights | None]] = []

    def __enter__(self) -> None:
        self._before.append(_recomputing.set(self))

    def __exit__(self, *_: object) -> None:
        _recomputing.reset(self._before.pop())

    def keep(self, weight: Tensor, dense: Tensor) -> None:
        """Keep the dense copy of a weight."""
        self._by_weight[id(weight)] = dense
        _keepers[id(weight)] = weakref.ref(self)

    def take(self, weight: Tensor) -> Tensor | None:
        """Give up the copy of a weight."""
        return self._by_weight.pop(id(weight), None)


def keep(weight: Tensor, dense: Tensor) -> None:
    """Keep the dense copy of a weight where a layer is recomputed; else do nothing."""
    if (recomputing := _recomputing.get()) is not None:
        recomputing.keep(weight, dense)


def take(weight: Tensor) -> Tensor | None:
    """The dense copy that the recomputation of a weight's layer has left, or None."""
    reference = _keepers.pop(id(weight), None)
    keeper = None if reference is None else reference()
    return None if keeper is None else keeper.take(weight)
