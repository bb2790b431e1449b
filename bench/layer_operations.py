"""What one decoder layer launches on a GPU, counted without one: operations, their bytes, by phase.

The layer of a QLoRA model runs on the meta device, where tensors have shapes and no values:
forward, recomputed and backward, as an update does it. Tensors are said to be on CUDA, so the
project's own launch code runs; what Triton would launch is noted in its place. Nothing here is
a measurement.

Bytes are those that an operation must read and write, each tensor once, without reuse in a cache.
Two things stand in: an attention kernel that reads q, k and v and writes its output (that is the
same before and after, and no mask or gathering of keys is counted), and the dequantization of NF4
weights, three kernels and the bytes of both forms.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig
from triton.runtime.jit import JITFunction

from bench.launches import NO_TRAFFIC
from fastdpo.modeling.adapters import add_adapter, lora_config
from fastdpo.modeling.fused import use_kernels
from fastdpo.modeling.head import get_backbone, unwrap_model

PHASES = ("forward", "recompute", "backward")
ATTENTION = "bench_counted"
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
WRITE_ONLY = ("new_zeros", "zeros", "zeros_like", "zero_", "fill_", "copy_", "ones_like", "full")
"""Their first tensor is written, or only its shape is read."""

NF4_KERNELS = 3
"""Of one dequantization with double quantization: the scales, their offset, the weight."""

NF4_BYTES = 0.5 + 1 / 64
"""Read for each entry of the weight."""


@dataclass(frozen=True)
class Operation:
    """One operation: its phase, its kind (products, attention, NF4, other), launches and bytes."""

    phase: str
    name: str
    kind: str
    launches: int
    bytes: int


class _Noting(TorchDispatchMode):
    """Notes the operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = PHASES[0]
        self.operations: list[Operation] = []

    def note(self, name: str, kind: str, moved: int, launches: int = 1) -> None:
        """Add an operation of the present phase."""
        self.operations.append(Operation(self.phase, name, kind, launches, moved))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if name not in (*NO_TRAFFIC, "promote_types", "result_type", "split_with_sizes"):
            outs = out if isinstance(out, list | tuple) else [out]
            given = [t for a in args for t in (a if isinstance(a, list | tuple) else [a])]
            read = given[1:] if name in WRITE_ONLY else given
            kind = "products" if name in PRODUCTS else "other"
            self.note(name, kind, _bytes(read) + _bytes(outs))
        return out


def _bytes(tensors: Any) -> int:
    """Bytes of tensors; of an expanded one those that there are."""
    return sum(
        min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
        for t in tensors
        if isinstance(t, Tensor)
    )


class _Attend(torch.autograd.Function):
    """Stands in for a flash kernel; saves what one saves."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, noting: _Noting) -> Tensor:
        ctx.noting = noting
        out = torch.empty_like(query.transpose(1, 2))
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        noting.note("attention", "attention", _bytes((query, key, value, out, sums)))
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        saved = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in saved[:3]]
        ctx.noting.note("attention", "attention", _bytes((*saved, *grads, grad_outputs[0])))
        return *grads, None


@contextmanager
def _pretended(noting: _Noting) -> Iterator[None]:
    """Meta tensors are on CUDA, with bf16; Triton's launches and dequantizations are noted."""

    def launched(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        noting.note(self.fn.__name__, "other", _bytes((*args, *kwargs.values())))

    def dequantized(weight: Tensor, dtype: torch.dtype) -> Tensor:
        entries = weight.numel()
        noting.note(
            "dequantize NF4", "NF4", int(entries * (NF4_BYTES + dtype.itemsize)), NF4_KERNELS
        )
        return weight

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any
    ) -> Any:
        return _Attend.apply(query, key, value, noting), None

    is_meta = property(lambda tensor: tensor.device.type == "meta")
    AttentionInterface.register(ATTENTION, attend)
    with ExitStack() as stack:
        for patch in (
            mock.patch.object(Tensor, "is_cuda", is_meta, create=True),
            mock.patch.object(torch, "is_autocast_enabled", return_value=False),
            mock.patch.object(torch, "autocast", return_value=nullcontext()),
            mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
            mock.patch.object(JITFunction, "run", launched),
            *(
                mock.patch.object(sys.modules[f"fastdpo_kernels.{module}"], name, dequantized)
                for module, name in (
                    ("lora_linear", "dense_weight"),  # gated_lora_linear calls this one too
                    ("lora_linear", "kept_dense_weight"),
                    ("lora_linears", "kept_dense_weight"),
                )
            ),
        ):
            stack.enter_context(patch)
        yield


def count_operations(
    config: PreTrainedConfig, tokens: int, kernels: str, *, lora_r: int = 16
) -> tuple[list[Operation], int]:
    """The operations of one layer of a config's model, and the bytes that it saves when kept.

    Args:
        config: of a causal LM; its first decoder layer runs, in bf16, an adapter on all its
            linear layers, its weights in NF4.
        tokens: T, of one packed sequence.
        kernels: fused or eager.
        lora_r: rank of the adapters.

    Returns:
        The operations in order, the adapter's gradients going into tensors that are there; and the
        bytes of the storages that a kept layer saves, weights and rotary tables left out.
    """
    noting = _Noting()
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = add_adapter(base, lora_config(lora_r, 2 * lora_r, 0.0, None)).train()
        hidden = torch.empty(1, tokens, config.hidden_size, dtype=torch.bfloat16)
        positions = torch.empty(1, tokens, dtype=torch.int64)
        rotary: Any = get_backbone(model).rotary_emb
        tables = rotary(hidden, positions)
    unwrap_model(model).config._attn_implementation = ATTENTION
    layer: Any = next(iter(unwrap_model(model).get_decoder().layers))  # pyrefly: ignore
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    hidden.requires_grad_()
    calls: list[None] = []

    def run(x: Tensor) -> Tensor:
        calls.append(None)
        before, noting.phase = noting.phase, PHASES[min(len(calls), 2) - 1]
        try:
            options = {"position_ids": positions, "position_embeddings": tables}
            return layer(x, attention_mask=None, past_key_values=None, use_cache=False, **options)
        finally:
            noting.phase = before

    resident = {t.untyped_storage()._cdata for t in (*model.parameters(), *tables)}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in resident:
            saved[storage._cdata] = tensor
        return tensor

    with _pretended(noting):
        use_kernels(model, kernels)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(hidden * 1)
        kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
        calls.clear()
        noting.operations.clear()
        with noting:
            out = checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)
            noting.phase = PHASES[2]
            torch.autograd.backward(out, torch.empty_like(out))
    return noting.operations, kept


def summary(operations: list[Operation]) -> dict[str, dict[str, int]]:
    """Launches and bytes by kind, and the launches of each phase."""
    launches, moved = Counter[str](), Counter[str]()
    for each in operations:
        launches[each.kind] += each.launches
        launches[each.phase] += each.launches
        moved[each.kind] += each.bytes
    return {"launches": dict(launches), "bytes": dict(moved)}
