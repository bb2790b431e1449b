"""Layers that carry a state along the sequence, over packed groups: each suffix starts from a fork.

Linear attention, state spaces and short convolutions know of the past through a state: a matrix
for each head, and the last inputs of a convolution. A group's prefix is run once; its final state
starts every suffix, and gradients flow back through it. A layer runs segment by segment by the
model's own code, on any device and with whatever kernels that finds: it takes and leaves its state
through transformers' cache, whose place a `StateFork` takes. No module of transformers is patched;
instances get a subclass of their class.

    prefix     state 0  ->  outputs,  state p
    suffix 1   state p  ->  outputs
    suffix 2   state p  ->  outputs
"""

import inspect
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fastdpo.modeling.attention import PackedSegments
from fastdpo.modeling.families import family_of

CACHE_ARGUMENTS = ("cache_params", "past_key_values")
"""Names under which transformers' layers take their cache."""

CACHE_METHODS = ("get_conv_state", "update_conv_state")
"""Methods of the cache that a layer calls which goes on from a state with any number of tokens."""


class StateFork:
    """The state of one layer in one sequence, in the place of transformers' cache.

    Nothing is written in place, so a fork and what it was forked from can both be differentiated.
    A layer with several convolutions or matrices numbers them (`state_idx`).
    """

    def __init__(self) -> None:
        self.convolved: dict[int, Tensor] = {}
        self.recurrent: dict[int, Tensor] = {}

    def fork(self) -> "StateFork":
        """A state that begins as this one is."""
        made = StateFork()
        made.convolved, made.recurrent = dict(self.convolved), dict(self.recurrent)
        return made

    # What the layers call

    def get_conv_state(self, _layer: int, state_idx: int = 0) -> Tensor | None:
        """The last inputs of the convolution, (1, channels, at most k - 1); None at the start."""
        return self.convolved.get(state_idx)

    def get_recurrent_state(self, _layer: int, state_idx: int = 0) -> Tensor | None:
        """The state after the tokens so far, as the layer left it; None at the start."""
        return self.recurrent.get(state_idx)

    def is_recording_past(self, _layer: int) -> bool:
        """True: a single token goes the way of several, which writes into no state."""
        return True

    def has_previous_state(self, _layer: int | None = None, state_idx: int | None = None) -> bool:
        """Tell whether tokens have been seen."""
        return bool(self.convolved or self.recurrent)

    def update_conv_state(
        self, inputs: Tensor, _layer: int, *, conv_kernel_size: int, state_idx: int = 0
    ) -> Tensor:
        """The convolution's inputs, (1, channels, L), with those of the past put in front."""
        past = self.convolved.get(state_idx)
        seen = inputs if past is None else torch.cat([past, inputs], dim=-1)
        self.convolved[state_idx] = seen[..., max(0, seen.shape[-1] - conv_kernel_size + 1) :]
        return seen

    def update_recurrent_state(self, state: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        """Keep the state after the last token."""
        self.recurrent[state_idx] = state
        return state


class ForkingLayer:
    """A layer that runs packed groups segment by segment, and anything else as its class does."""

    def forward(
        self,
        hidden_states: Tensor,  # (1, T, H)
        *arguments: Any,
        packed: PackedSegments | None = None,
        **options: Any,
    ) -> Any:
        """The layer's outputs, (1, T, H)."""
        run = super().forward  # pyrefly: ignore[missing-attribute]
        if packed is None or not packed.segments:
            return run(hidden_states, *arguments, **options)
        packed.layers_run += 1
        name = _cache_argument(type(self).__bases__[1])
        outputs: list[Tensor] = []

        def over(start: int, tokens: int, state: StateFork) -> int:
            if tokens:
                part = hidden_states[:, start : start + tokens]
                if tokens == 1 and state.recurrent:
                    # A step of one token writes into its state: another follows, which it ignores.
                    part = part.expand(-1, 2, -1)
                outputs.append(run(part, **{name: state})[:, :tokens])
            return start + tokens

        for segment in packed.segments:
            before = StateFork()
            place = over(segment.start, segment.prefix_tokens, before)
            for tokens in segment.suffix_tokens:
                place = over(place, tokens, before.fork())
        return torch.cat(outputs, dim=1)


_forking: WeakSet[nn.Module] = WeakSet()


def fork_states(backbone: nn.Module) -> None:
    """Let the layers of a backbone that carry a state fork it; does nothing the second time."""
    if backbone in _forking:
        return
    for layer in state_layers(backbone):
        if not isinstance(layer, ForkingLayer):
            layer.__class__ = _forking_class(type(layer))
    _forking.add(backbone)


def state_layers(backbone: nn.Module) -> list[nn.Module]:
    """The layers of a backbone that carry a state which can be forked, by the table of families."""
    config: Any = backbone.config
    suffix = family_of(config.get_text_config()).state_layers
    return [m for m in backbone.modules() if suffix and type(m).__name__.endswith(suffix)]


def takes_states(layer: type[nn.Module]) -> bool:
    """Tell whether a class of layers goes on from the state of a cache with several tokens.

    In earlier releases of transformers a cache served single tokens only.
    """
    if issubclass(layer, ForkingLayer):
        return True
    names = inspect.unwrap(layer.forward).__code__.co_names
    return set(CACHE_METHODS) <= set(names)


@cache
def _cache_argument(layer: type[nn.Module]) -> str:
    parameters = inspect.signature(inspect.unwrap(layer.forward)).parameters
    return next(name for name in CACHE_ARGUMENTS if name in parameters)


@cache
def _forking_class(layer: type[nn.Module]) -> type[nn.Module]:
    return type(layer.__name__, (ForkingLayer, layer), {"__module__": layer.__module__})
