"""Layers that carry a state along the sequence, over packed groups: each suffix starts from a fork.

Linear attention, state spaces and short convolutions know of the past through a state: a matrix
for each head, and the last k - 1 inputs of a convolution. A group's prefix is run once; its final
state starts every suffix, and gradients flow back through it. A layer runs the code of its class
once over the whole packed sequence; only the functions in it through which tokens meet mean
something else:

    convolution    one call, the inputs of its past put in front of each sequence
    scan           one call for all prefixes, one for all suffixes from the states of the first

No module of transformers is patched; instances get a subclass of their class.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fastdpo.modeling.attention import PackedSegments
from fastdpo.modeling.families import family_of
from fastdpo.modeling.fused import with_globals
from fastdpo.modeling.sequences import Batch, Sequences

CONVOLUTION = "causal_conv1d_fn"
"""Name by which every layer with a state calls its convolution."""


@dataclass(frozen=True)
class Scan:
    """How a function that carries a state takes and gives it.

    Attributes:
        initial: its argument for the states at the start, one for each sequence.
        final: its argument that asks for those at the end, beside the outputs.
        pairs: whether it returns outputs and states even where it gives no states.
        varlen: whether its kernel takes sequences of any length in one, told apart by `cu_seqlens`.
    """

    initial: str
    final: str
    pairs: bool = False
    varlen: bool = False


DELTA_RULE = Scan("initial_state", "output_final_state", pairs=True, varlen=True)
SCANS = {
    "torch_chunk_gated_delta_rule": DELTA_RULE,
    "chunk_kimi_delta_attention": DELTA_RULE,
    "mamba2_chunk_scan": Scan("initial_states", "return_final_states"),
}
"""The functions that carry a state, by the names that transformers' layers call."""

SHORTCUTS = ("mamba2_split_conv1d_scan_combined",)
"""Functions that do all of it at once where a kernel is installed; None is their "cannot"."""


class ForkingLayer:
    """A layer that keeps the sequences of packed groups apart, and runs anything else as before."""

    def forward(
        self,
        hidden_states: Tensor,  # (1, T, H)
        *arguments: Any,
        packed: PackedSegments | None = None,
        **options: Any,
    ) -> Any:
        """The layer's outputs, (1, T, H)."""
        kind = type(self).__bases__[1]
        if packed is None or not packed.segments:
            return kind.forward(self, hidden_states, *arguments, **options)
        packed.layers_run += 1
        return packed.cached(("forks", kind), lambda: _forking_forward(kind, packed))(
            self, hidden_states
        )


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


def forks_states(layer: type[nn.Module]) -> bool:
    """Tell whether the functions of a class of layers through which tokens meet are those known.

    In early releases of transformers they were attributes or part of the layers' own code.
    """
    if issubclass(layer, ForkingLayer):
        return True
    own: Any = inspect.unwrap(layer.forward)
    return callable(own.__globals__.get(CONVOLUTION)) and CONVOLUTION in own.__code__.co_names


def _forking_forward(kind: type[nn.Module], packed: PackedSegments) -> Callable[..., Any]:
    """The forward of a class of layers, for which tokens of one sequence alone meet."""
    own: Any = inspect.unwrap(kind.forward)
    replaced: dict[str, Callable[..., Any]] = {
        CONVOLUTION: partial(_convolve, packed),
        **{name: partial(_scan, packed, scan) for name, scan in SCANS.items()},
    }
    names = {
        name: partial(replace, own.__globals__[name])
        for name, replace in replaced.items()
        if name in own.__code__.co_names
    }
    return with_globals(own, names | dict.fromkeys(SHORTCUTS, _cannot))


def _cannot(*_: Any, **__: Any) -> None:
    return None


def _on_device(function: Callable[..., Any], tensor: Tensor) -> Callable[..., Any]:
    """The form of a function for a tensor: a package's kernel is bound for CPU tensors too."""
    return function if tensor.is_cuda else inspect.unwrap(function)


def takes_varlen(scan: Scan, tensor: Tensor) -> bool:
    """Tell whether a scan takes `cu_seqlens` for this tensor: flash-linear-attention's kernels."""
    return scan.varlen and tensor.is_cuda and find_spec("fla") is not None


def _sequences(packed: PackedSegments, device: torch.device) -> Sequences:
    return packed.cached("sequences", lambda: Sequences.of(packed.segments, device))


def _convolve(
    packed: PackedSegments,
    convolve: Callable[..., Tensor],
    inputs: Tensor,  # (1, channels, T)
    weight: Tensor,  # (channels, k)
    *arguments: Any,
    **options: Any,
) -> Tensor:
    sequences, past = _sequences(packed, inputs.device), weight.shape[-1] - 1
    if not past:
        return convolve(inputs, weight, *arguments, **options)
    taken, places = packed.cached(("past", past), lambda: sequences.with_past(past))
    rows = nn.functional.pad(inputs[0].T, (0, 0, 0, 1))  # the last one, zeros, is before the start
    # Indexing, whose gradient is summed in a fixed order: a prefix's last inputs are taken often.
    outputs = _on_device(convolve, inputs)(rows[taken].T[None], weight, *arguments, **options)
    return outputs.index_select(2, places)


def _scan(
    packed: PackedSegments, scan: Scan, function: Callable[..., Any], *arguments: Any, **options: Any
) -> tuple[Tensor, None] | Tensor:
    like: Tensor = arguments[0]  # (1, T, heads, size)
    sequences = _sequences(packed, like.device)
    if takes_varlen(scan, like):
        starts, suffixes = packed.cached("varlen", sequences.varlen)
    else:
        starts, suffixes = packed.cached("padded", sequences.padded)

    def run(batch: Batch, states: Tensor | None) -> tuple[Tensor, Tensor]:
        def of(value: Any) -> Any:
            in_time = isinstance(value, Tensor) and value.ndim >= 3 and value.shape[1] == tokens
            return batch.gathered(value) if in_time else value

        own = {scan.initial: states, scan.final: True} | batch.options
        given = {name: of(value) for name, value in options.items()} | own
        outputs, final = _on_device(function, like)(*map(of, arguments), **given)
        return outputs.flatten(0, 1), final

    tokens = like.shape[1]
    outputs, finals = zip(*(run(batch, None) for batch in starts), strict=True)
    states = torch.cat(finals)
    further = [run(batch, states[batch.parents])[0] for batch in suffixes]
    every = torch.cat([*outputs, *further])
    order = packed.cached(("order", id(starts)), lambda: Sequences.order([*starts, *suffixes]))
    found = every.index_select(0, order)[None]
    return (found, None) if scan.pairs else found


@cache
def _forking_class(layer: type[nn.Module]) -> type[nn.Module]:
    return type(layer.__name__, (ForkingLayer, layer), {"__module__": layer.__module__})
