"""Layers with a state: the bytes that they save and their FLOPs, counted without any of either.

Their insides differ from family to family and from kernel to kernel. So a layer is copied to the
meta device and run forward there, forked as in a run, and what autograd saves is counted; in the
place of flash-linear-attention's kernels, what they save. In whole chunks that is linear in tokens
and sequences to a percent (masks and the square of a sequence's chunks are small): three runs do.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastdpo.batching import Segment
from fastdpo.modeling.families import family_of
from fastdpo.modeling.sequences import CHUNK

DTYPES = {2: torch.bfloat16, 4: torch.float32}
"""The dtypes that layers compute in, by the bytes of an entry."""


_GROUPS = (
    Segment(0, 4 * CHUNK, ()),
    Segment(0, 8 * CHUNK, ()),
    Segment(0, 4 * CHUNK, (4 * CHUNK,)),
)


@dataclass(frozen=True)
class SavedStates:
    """Bytes that one layer saves between its linear layers, for each token and sequence.

    Attributes:
        token: for each token: the convolution's inputs and outputs, what the scan saves.
        start: further for each sequence that starts, a prefix: zeros before it, and its last state.
        suffix: further for each that goes on: the inputs before it, and the state that it takes.
    """

    token: int
    start: int
    suffix: int


@dataclass(frozen=True)
class StateLayers:
    """The layers of a model that carry a state.

    Attributes:
        count: how many of its layers.
        saved: what one of them saves, by the bytes of an entry.
        outputs: entries for each token that its last linear layer reads.
        flops: of its convolution and scan for each token, in the forward.
        by: what scans on CUDA in bf16: torch, or the package whose kernels do; empty where
            nothing does.
    """

    count: int
    saved: Mapping[int, SavedStates]
    outputs: int
    flops: int
    by: str

    def saved_bytes(self, entry_bytes: int, tokens: int, starts: int, suffixes: int) -> int:
        """Bytes that one layer saves for a micro-batch; sequences are half a chunk from whole."""
        each = self.saved[entry_bytes]
        padded = tokens + (starts + suffixes) * CHUNK // 2
        return each.token * padded + each.start * starts + each.suffix * suffixes


def count_states(backbone: nn.Module, config: Any) -> StateLayers | None:
    """Count the layers with a state of a model; None where there are none that fork it.

    Args:
        backbone: of a model, on the meta device or loaded, with adapters or without.
        config: the text config.
    """
    if not family_of(config).state_layers:
        return None
    # Only here: a plan of any other model imports no model code.
    from fastdpo.modeling.state_forks import forks_states, state_layers, states_kind

    layers = state_layers(backbone)
    if not layers or not all(forks_states(type(layer)) for layer in layers):
        return None
    layer = _on_meta(layers[0])
    linears = [part for part in layer.modules() if isinstance(part, nn.Linear)]
    runs = {
        entry_bytes: [_run(layer.to(dtype), config.hidden_size, each) for each in _GROUPS]
        for entry_bytes, dtype in DTYPES.items()
    }
    saved = {
        entry_bytes: SavedStates((two - one) // (4 * CHUNK), 2 * one - two, forked - two)
        for entry_bytes, ((one, _), (two, _), (forked, _)) in runs.items()
    }
    (_, fewer), (_, more), _ = runs[2]
    flops = (more - fewer) // (4 * CHUNK)
    return StateLayers(
        count=len(layers),
        saved=MappingProxyType(saved),
        outputs=linears[-1].in_features,
        flops=flops - 2 * sum(part.weight.numel() for part in linears),
        by=states_kind(backbone, torch.device("cuda"), torch.bfloat16),
    )


def _on_meta(layer: nn.Module) -> nn.Module:
    """A copy without bytes, its linear layers dense and without adapters."""
    tensors = [*layer.parameters(), *layer.buffers()]
    memo = {id(each): torch.empty_like(each, device="meta") for each in tensors}
    copied: Any = copy.deepcopy(layer, memo)
    dense: dict[str, nn.Module] = {}
    for name, part in copied.named_modules():
        within = any(name.startswith(f"{other}.") for other in dense)
        if hasattr(part, "in_features") and not within:
            dense[name] = nn.Linear(part.in_features, part.out_features, bias=False, device="meta")
    for name, linear in dense.items():
        copied.set_submodule(name, linear)
    return copied.requires_grad_(requires_grad=False)


def _run(layer: nn.Module, hidden: int, segment: Segment) -> tuple[int, int]:
    """Bytes that autograd saves for one group, those of weights left out, and FLOPs."""
    from fastdpo.modeling import state_forks
    from fastdpo.modeling.attention import PackedSegments

    weights = {part.untyped_storage()._cdata for part in [*layer.parameters(), *layer.buffers()]}
    held: dict[int, Tensor] = {}
    dtype = next(layer.parameters()).dtype

    def keep(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()._cdata) not in weights:
            held.setdefault(storage, tensor)
        return tensor

    states = torch.empty(1, segment.tokens, hidden, dtype=dtype, device="meta", requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    kernel = _kernel if state_forks.runs_kernel("fla", torch.device("cuda"), dtype) else None
    run = state_forks.forking_forward(type(layer), PackedSegments((segment,)), kernel)
    with FlopCounterMode(display=False) as counter, hooks, torch.enable_grad():
        run(layer, states * 1)
    return sum(each.untyped_storage().nbytes() for each in held.values()), counter.get_total_flops()


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, cu_seqlens: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    return _Kept.apply(q, k, v, g, beta, cu_seqlens, options.get("initial_state"))


class _Kept(torch.autograd.Function):
    """A stand-in for flash-linear-attention's gated delta rule: it saves and returns as much.

    Queries and keys of length 1 with their norms, values, the sums of the decay in a chunk, beta,
    the inverse of each chunk's matrix, and the states at the start. Nothing is computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        cu_seqlens: Tensor,
        initial_state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        heads, sequences = v.shape[2], len(cu_seqlens) - 1
        inverse = v.new_empty(*v.shape[:3], CHUNK)
        norms = q.new_empty(q.shape[:3], dtype=torch.float32)
        kept = (torch.empty_like(q), torch.empty_like(k), norms, torch.empty_like(norms), inverse)
        decay = torch.empty_like(g, dtype=torch.float32)
        ctx.save_for_backward(*kept, v, decay, beta, cu_seqlens, initial_state)
        shape = (sequences, heads, k.shape[-1], v.shape[-1])
        return torch.empty_like(v), v.new_empty(shape, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise AssertionError("it is run forward alone")
