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
from importlib.metadata import version
from importlib.util import find_spec
from types import FunctionType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fastdpo.modeling.attention import PackedSegments
from fastdpo.modeling.families import family_of
from fastdpo.modeling.rebinding import with_globals
from fastdpo.modeling.sequences import CHUNK, Batch, Sequences, unpacking

CONVOLUTION = "causal_conv1d_fn"
"""Name by which every layer with a state calls its convolution."""


@dataclass(frozen=True)
class Scan:
    """How a function that carries a state takes and gives it.

    Attributes:
        initial: its argument for the states at the start, one for each sequence.
        final: its argument that asks for those at the end, beside the outputs.
        package: whose kernel transformers puts in its place where the package is installed.
        varlen: whether that kernel takes sequences of any length in one, told apart by
            `cu_seqlens`.
        pairs: whether it returns a pair even where it is not asked for states.
    """

    initial: str
    final: str
    package: str
    varlen: bool
    pairs: bool


DELTA_RULE = Scan("initial_state", "output_final_state", "fla", varlen=True, pairs=True)
SCANS = {
    "torch_chunk_gated_delta_rule": DELTA_RULE,
    "chunk_kimi_delta_attention": DELTA_RULE,
    "mamba2_chunk_scan": Scan(
        "initial_states", "return_final_states", "mamba_ssm", varlen=False, pairs=False
    ),
}
"""The functions that carry a state, by the names that transformers' layers call."""

HANDING_ON = (5, 17)
"""The release from which transformers' models hand their arguments on to such layers."""

HALF_ONLY = "fla"
"""The package whose kernels take no fp32."""

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
        if packed is None or not packed.segments:
            own: Any = super()
            return own.forward(hidden_states, *arguments, **options)
        packed.layers_run += 1
        kind: Any = type(self)
        run = packed.cached(("forks", kind), lambda: forking_forward(kind, packed))
        return run(self, hidden_states)


_forking: WeakSet[nn.Module] = WeakSet()


def fork_states(backbone: nn.Module) -> None:
    """Let the layers of a backbone that carry a state fork it; does nothing the second time."""
    if backbone in _forking:
        return
    for layer in state_layers(backbone):
        if not isinstance(layer, ForkingLayer):
            layer.__class__ = forking_class(type(layer))
    _forking.add(backbone)


def state_layers(backbone: nn.Module) -> list[nn.Module]:
    """The layers of a backbone that carry a state which can be forked, by the table of families."""
    config: Any = backbone.config
    suffix = family_of(config.get_text_config()).state_layers
    return [m for m in backbone.modules() if suffix and type(m).__name__.endswith(suffix)]


def forks_states(layer: type[nn.Module]) -> bool:
    """Tell whether the functions of a class of layers through which tokens meet are those known.

    In early releases of transformers they were attributes or part of the layers' own code, and
    some layers are not handed the arguments of the model.
    """
    if tuple(map(int, version("transformers").split(".")[:2])) < HANDING_ON:
        return False
    own = _own_forward(layer)
    known = callable(own.__globals__.get(CONVOLUTION)) and CONVOLUTION in own.__code__.co_names
    return known and bool(own.__code__.co_flags & inspect.CO_VARKEYWORDS)


def states_kind(backbone: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
    """Name the packages, or torch, by which a model carries the states of packed sequences.

    Args:
        backbone: whose layers fork their states.
        device: where they run.
        dtype: what they compute in.

    Returns:
        The names in order, joined by "+"; empty for a model that carries none.
    """
    kinds = {type(layer) for layer in state_layers(backbone)}
    names = {name for kind in kinds for name in _own_forward(kind).__code__.co_names}
    packages = {scan.package for name, scan in SCANS.items() if name in names}
    carry = {each if runs_kernel(each, device, dtype) else "torch" for each in packages}
    return "+".join(sorted(carry))


def forking_forward(
    kind: type[nn.Module], packed: PackedSegments, kernel: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """The forward of a class of layers, in which tokens of one sequence alone meet.

    Args:
        kind: a class of transformers or of `fork_states`.
        packed: the segments of the micro-batch that it is for.
        kernel: runs in the place of scans that have a kernel which takes `cu_seqlens`.
    """
    own = _own_forward(kind)
    replaced: dict[str, Callable[..., Any]] = {
        CONVOLUTION: partial(_convolve, packed),
        **{
            name: partial(_scan, packed, scan, kernel if scan.varlen else None)
            for name, scan in SCANS.items()
        },
    }
    names = {
        name: partial(replace, own.__globals__[name])
        for name, replace in replaced.items()
        if name in own.__code__.co_names
    }
    return with_globals(own, names | dict.fromkeys(SHORTCUTS, _cannot))


def _cannot(*_: Any, **__: Any) -> None:
    return None


def runs_kernel(package: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether a function runs a package's kernel for such tensors, not transformers' torch.

    transformers binds a kernel when it is imported, for tensors that it does not take too.
    """
    takes_it = device.type == "cuda" and (package != HALF_ONLY or dtype != torch.float32)
    return takes_it and _is_installed(package)


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def _convolve(
    packed: PackedSegments,
    function: Callable[..., Tensor],
    inputs: Tensor,  # (1, channels, T)
    weight: Tensor,  # (channels, k)
    *arguments: Any,
    **options: Any,
) -> Tensor:
    past = weight.shape[-1] - 1
    taken, places = packed.cached(
        ("past", past), lambda: _sequences(packed, inputs.device).with_past(past)
    )
    rows = nn.functional.pad(inputs[0].T, (0, 0, 0, 1))  # the last one is before the start
    # Indexing sums its gradient in a fixed order: the end of a prefix is taken for every suffix.
    longer = rows[taken].T[None]
    if not runs_kernel("causal_conv1d", inputs.device, inputs.dtype):
        function = inspect.unwrap(function)
    return function(longer, weight, *arguments, **options).index_select(2, places)


def _scan(
    packed: PackedSegments,
    scan: Scan,
    kernel: Callable[..., Any] | None,
    function: Callable[..., Any],
    *arguments: Any,
    **options: Any,
) -> Any:
    like: Tensor = arguments[0]  # (1, T, heads, size)
    sequences = _sequences(packed, like.device)
    if kernel is None and runs_kernel(scan.package, like.device, like.dtype):
        kernel = function
    layout = sequences.varlen if kernel and scan.varlen else sequences.padded
    starts, suffixes = packed.cached(layout.__name__, layout)
    order = packed.cached(("order", layout.__name__), lambda: unpacking([*starts, *suffixes]))
    run_scan = kernel or inspect.unwrap(function)
    if not kernel and "chunk_size" in options:  # which changes the rounding and the cost alone
        options["chunk_size"] = min(options["chunk_size"], CHUNK)

    def gathered(value: Any, batch: Batch) -> Any:
        runs_on = isinstance(value, Tensor) and value.ndim > 2 and value.shape[1] == like.shape[1]
        return batch.gather(value) if runs_on else value

    def run(batch: Batch, states: Tensor | None) -> tuple[Tensor, Tensor]:
        given = {name: gathered(value, batch) for name, value in options.items()}
        given |= batch.options | {scan.initial: states, scan.final: True}
        outputs, ends = run_scan(*(gathered(value, batch) for value in arguments), **given)
        return outputs.flatten(0, 1), ends

    first, ends = zip(*(run(batch, None) for batch in starts), strict=True)
    states = torch.cat(ends)
    second = [run(batch, states[batch.parents])[0] for batch in suffixes]
    outputs = torch.cat([*first, *second]).index_select(0, order)[None]
    return (outputs, None) if scan.pairs else outputs


def _sequences(packed: PackedSegments, device: torch.device) -> Sequences:
    return packed.cached("sequences", lambda: Sequences.of(packed.segments, device))


def _own_forward(kind: type[nn.Module]) -> FunctionType:
    """The forward of a class of transformers, or of the one that a class of ours is put on."""
    own: Any = kind.__bases__[1] if issubclass(kind, ForkingLayer) else kind
    return inspect.unwrap(own.forward)


@cache
def forking_class(layer: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a class of layers whose instances fork their state."""
    return type(layer.__name__, (ForkingLayer, layer), {"__module__": layer.__module__})
