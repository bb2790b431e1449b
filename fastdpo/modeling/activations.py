"""Activation plans: each decoder layer keeps everything for its backward, or recomputes.

A layer is kept whole (fastest), recomputed from its input on the GPU, with or without its
attention, or recomputed from its input in pinned host memory. The gradients are the same bit for
bit. This uses the per-layer hook of transformers' `GradientCheckpointingLayer`, so no forward is
replaced; as there, a layer outside train mode is kept whole.

Offloaded inputs travel on a stream of their own beside the computation. With three offloaded
layers, F and B being forward and backward of a layer, o a copy of its input out to the host and i
the copy back in:

    compute stream     F1   F2   F3   ...   B3    B2    B1
    copy stream        o1   o2   o3         i2    i1
    inputs on the GPU  1    2    3    3     3, 2  2, 1  1

An input is released when the next one is offloaded, so the last one stays; the copy back begins
when the backward of the layer above does. So at most two of them lie on the GPU. `wait_stream`
makes a copy wait for the computation that wrote its source; `wait_event` makes the computation wait
for a copy before it reads the result or reuses the memory.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, noop_context_fn
from transformers.modeling_layers import GradientCheckpointingLayer

from fastdpo.modeling.attention.kept import keep_attention
from fastdpo.modeling.head import get_backbone

KEEP, KEEP_ATTENTION = "keep", "keep_attention"
RECOMPUTE, OFFLOAD = "recompute", "offload"
"""A layer leaves for its backward: everything; its input and what its attention kernel returned;
its input; or its input in host memory."""

ACTIVATIONS = (KEEP, KEEP_ATTENTION, RECOMPUTE, OFFLOAD)
Context = AbstractContextManager[Any]
PAGE_BYTES = 2**24
"""Size of the pieces in which pinned memory is taken: torch rounds each up to a power of two."""


def supports_checkpointing(model: nn.Module) -> bool:
    """Tell whether the decoder has layers to which an activation plan can be applied."""
    return any(isinstance(m, GradientCheckpointingLayer) for m in get_backbone(model).modules())


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of the decoder, in order, to which an activation plan can be applied.

    Raises:
        ValueError: the model's layers do not have transformers' hook.
    """
    layers: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in get_backbone(model).modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            layers.append(module)
            inside.update(module.modules())
    if not layers:
        raise ValueError(
            f"{type(model).__name__}'s layers cannot be recomputed one by one: they are no "
            "GradientCheckpointingLayer of transformers. Leave every layer kept, or choose another "
            "model."
        )
    return layers


def apply_activation_plan(
    model: nn.Module, activation_plan: Sequence[str], *, dequantize_once: bool = False
) -> None:
    """Let every decoder layer leave what the plan says, until another plan is applied.

    It takes the place of any checkpointing that the model has; whatever enables checkpointing
    afterwards (`activation_checkpointing_enable`, which Trainer calls where its arguments say so)
    takes the place of the plan.

    Args:
        model: a causal LM or a PeftModel on it.
        activation_plan: one of `ACTIVATIONS` for each decoder layer, first layer first.
        dequantize_once: whether the dense copies of a layer's 4-bit weights serve its
            recomputation and its backward; else each is made for both.

    Raises:
        ValueError: a wrong number of layers, or a word that is none of `ACTIVATIONS`.
    """
    layers: list[Any] = decoder_layers(model)
    if len(activation_plan) != len(layers):
        raise ValueError(
            f"the activation plan has {len(activation_plan)} entries and the model {len(layers)} "
            "decoder layers: need one for each."
        )
    if unknown := sorted(set(activation_plan) - set(ACTIVATIONS)):
        raise ValueError(f"the activation plan has {unknown}: need {', '.join(ACTIVATIONS)}.")
    modules: list[Any] = list(get_backbone(model).modules())
    for module in modules:
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    offloader = ActivationOffloader()
    for index, (layer, choice) in enumerate(zip(layers, activation_plan, strict=True)):
        layer.gradient_checkpointing = choice != KEEP
        attention = keep_attention if choice == KEEP_ATTENTION else noop_context_fn
        run = functools.partial(offloader.recompute, index) if choice == OFFLOAD else recompute
        layer._gradient_checkpointing_func = functools.partial(
            run, context_fn=functools.partial(_contexts, attention, dequantize_once)
        )


def _contexts(
    attention: Callable[[], tuple[Context, Context]], dequantize_once: bool
) -> tuple[Context, Context]:
    """The contexts of a layer's first run and of its recomputation."""
    first, second = attention()
    if not dequantize_once:
        return first, second
    from fastdpo_kernels import KeptDenseWeights  # not for the planner, which names activations too

    return first, _Both(second, KeptDenseWeights())


class _Both:
    """Two contexts as one, which can be entered more than once."""

    def __init__(self, outer: Context, inner: Context) -> None:
        self._outer, self._inner = outer, inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        self._outer.__exit__(*error)


def recompute(
    function: Callable[..., Any], *inputs: Any, context_fn: Callable[[], Any] = noop_context_fn
) -> Any:
    """Call `function(*inputs)` and save the inputs only; its backward calls it again.

    The second call draws the random numbers of the first.

    Args:
        function: what is called.
        inputs: its arguments.
        context_fn: makes the context of the first call and that of the second.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=context_fn)


class ActivationOffloader:
    """The layer inputs of a model that wait for their backward in host memory."""

    def __init__(self) -> None:
        self._newest: weakref.ref[OffloadedActivation] | None = None

    def recompute(
        self,
        layer: int,
        function: Callable[..., Any],
        *inputs: Any,
        context_fn: Callable[[], Any] = noop_context_fn,
    ) -> Any:
        """Do as the function `recompute` does, the first input (hidden states) on the host."""
        if not torch.is_grad_enabled():
            return function(*inputs)
        shape = inputs[0].shape

        def pack(tensor: Tensor) -> "Tensor | OffloadedActivation":
            return self._offload(layer, tensor) if tensor.shape == shape else tensor

        def unpack(saved: "Tensor | OffloadedActivation") -> Tensor:
            return saved.load() if isinstance(saved, OffloadedActivation) else saved

        with saved_tensors_hooks(pack, unpack):
            return checkpoint(function, *inputs, use_reentrant=False, context_fn=context_fn)

    def _offload(self, layer: int, tensor: Tensor) -> "OffloadedActivation":
        newest = None if self._newest is None else self._newest()
        if newest is not None:
            newest.release_gpu()
        before = self._newest if newest is not None and newest.layer < layer else None
        saved = OffloadedActivation(layer, tensor.contiguous(), before)
        self._newest = weakref.ref(saved)
        return saved


class OffloadedActivation:
    """One layer's input in host memory; on its way there and back it is on the GPU too.

    Args:
        layer: index of the layer.
        tensor: the input, contiguous; on the CPU it is copied at once.
        before: the input that was offloaded just before, which the backward wants next.
    """

    def __init__(
        self, layer: int, tensor: Tensor, before: "weakref.ref[OffloadedActivation] | None"
    ) -> None:
        self.layer = layer
        self._before = before
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._on_gpu: Tensor | None = tensor
        self._copied: Any = None  # the CUDA event after the copy under way
        sizes = [PAGE_BYTES] * (tensor.nbytes // PAGE_BYTES) + [tensor.nbytes % PAGE_BYTES]
        self._pages = [
            torch.empty(size, dtype=torch.uint8, pin_memory=tensor.is_cuda)
            for size in sizes
            if size
        ]
        self._copied = self._copy(to_host=True)
        if not tensor.is_cuda:
            self._on_gpu = None

    def release_gpu(self) -> None:
        """Free the GPU's memory for whatever is computed after the copy."""
        self._wait()
        self._on_gpu = None

    def fetch(self) -> None:
        """Begin the copy back to the GPU, unless it has begun."""
        if self._on_gpu is None:
            self._on_gpu = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._copied = self._copy(to_host=False)

    def load(self) -> Tensor:
        """The input on the GPU; the copy of the one that the backward wants next begins."""
        self.fetch()
        self._wait()
        tensor, self._on_gpu = self._on_gpu, None
        assert tensor is not None, "fetched above"
        before = None if self._before is None else self._before()
        if before is not None and tensor.is_cuda:
            before.fetch()
        return tensor

    def __del__(self) -> None:
        # After an aborted backward too, nothing may reuse the GPU's memory before the copy ends.
        self._wait()

    def _wait(self) -> None:
        if self._on_gpu is not None and self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def _copy(self, to_host: bool) -> Any:
        """Copy page by page, on CUDA beside the computation; returns the event to wait for."""
        assert self._on_gpu is not None, "one end of the copy"
        parts = self._on_gpu.view(-1).view(torch.uint8).split(PAGE_BYTES)
        stream = _copy_stream(self._device) if self._device.type == "cuda" else None
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for part, page in zip(parts, self._pages, strict=True):
                target, source = (page, part) if to_host else (part, page)
                target.copy_(source, non_blocking=True)
        return None if stream is None else stream.record_event()


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
