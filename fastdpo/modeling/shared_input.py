"""LoRA layers that read one input: the first that is called computes them all, adapters stacked.

The attention's forward stays as it is: it calls q, k and v one after another on the same tensor,
and the second and third call find their output waiting.
"""

import weakref
from collections.abc import Sequence
from typing import Any

from fastdpo_kernels import lora_linears
from torch import Tensor


class SharedInput:
    """LoRA layers that are called once each on the same tensor, in whatever order.

    Outputs wait for their layer's call on that tensor and no other, until `forget` is called or
    another tensor arrives; so a pass that breaks off leaves nothing for a later one.

    Args:
        layers: layers with `plain_lora`, as `FusedLoraLinear` has it.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self._input: weakref.ref[Tensor] | None = None
        self._waiting: dict[int, Tensor] = {}

    def output_of(self, layer: Any, x: Tensor) -> Tensor | None:
        """The layer's output (..., out) for x (..., in), or None where each must run alone.

        That is so where one of them is more than LoRA at the moment, or drops entries of x: each
        has a mask of its own then.
        """
        place = next(i for i, each in enumerate(self.layers) if each is layer)
        if self._input is not None and self._input() is x and place in self._waiting:
            return self._waiting.pop(place)
        self.forget()
        parts = [each.plain_lora(x) for each in self.layers]
        if any(part is None or part[1] > 0.0 for part in parts):
            return None
        self._waiting = dict(enumerate(lora_linears(x, [part[0] for part in parts if part])))
        self._input = weakref.ref(x)
        return self._waiting.pop(place)

    def forget(self) -> None:
        """Drop what waits, at the end of the forward that the layers belong to."""
        self._waiting.clear()
        self._input = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedInput":
        """A group of the copied layers, with nothing waiting."""
        from copy import deepcopy

        made = SharedInput([])
        memo[id(self)] = made
        made.layers = deepcopy(self.layers, memo)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedInput, (self.layers,)
