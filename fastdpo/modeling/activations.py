"""What each decoder layer leaves for the backward: everything, its input, or its input on the host.

A layer is kept whole (fastest), recomputed from its input on the GPU, or recomputed from its input
in pinned host memory. The gradients are the same bit for bit. It hangs on the per-layer hook of
transformers' `GradientCheckpointingLayer`, so no forward is replaced; as there, a layer outside
train mode is kept whole.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fastdpo.modeling.head import get_backbone

KEEP, RECOMPUTE, OFFLOAD = "keep", "recompute", "offload"
"""What a layer leaves for its backward: everything, its input, or its input in host memory."""

ACTIVATIONS = (KEEP, RECOMPUTE, OFFLOAD)
PAGE_BYTES = 2**24
"""Pinned memory is taken in pages of this size: torch rounds each piece up to a power of two."""


def supports_checkpointing(model: nn.Module) -> bool:
    """Whether the decoder has layers to which a policy can be applied."""
    return any(isinstance(m, GradientCheckpointingLayer) for m in get_backbone(model).modules())


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of the decoder, in order, to which a policy can be applied.

    Raises:
        ValueError: the model's layers do not have transformers' hook.
    """
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in get_backbone(model).modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    if not found:
        raise ValueError(
            f"{type(model).__name__}'s layers cannot be recomputed one by one: they are no "
            "GradientCheckpointingLayer of transformers. Leave every layer kept, or choose another "
            "model."
        )
    return found


def apply_activation_plan(model: nn.Module, policy: Sequence[str]) -> None:
    """Let every decoder layer keep, recompute or offload, until another policy is applied.

    It takes the place of any checkpointing that the model has; whatever enables checkpointing
    afterwards (`activation_checkpointing_enable`, which Trainer calls where its arguments say so)
    takes the place of the policy.

    Args:
        model: a causal LM or a PeftModel on it.
        policy: one of `ACTIVATIONS` per decoder layer, first layer first.

    Raises:
        ValueError: a wrong number of layers, or a word that is none of `ACTIVATIONS`.
    """
    layers: list[Any] = decoder_layers(model)
    if len(policy) != len(layers):
        raise ValueError(
            f"the policy has {len(policy)} entries and the model {len(layers)} decoder layers: "
            "need one of each."
        )
    if unknown := sorted(set(policy) - set(ACTIVATIONS)):
        raise ValueError(f"the policy has {unknown}: need {', '.join(ACTIVATIONS)}.")
    modules: list[Any] = list(get_backbone(model).modules())
    for module in modules:
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    host = ActivationOffloader()
    for index, (layer, choice) in enumerate(zip(layers, policy, strict=True)):
        layer.gradient_checkpointing = choice != KEEP
        layer._gradient_checkpointing_func = (
            functools.partial(host.recompute, index) if choice == OFFLOAD else recompute
        )


def recompute(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, of which only the inputs are saved; random numbers are drawn again."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False)


class ActivationOffloader:
    """The layer inputs of a model that wait for their backward in host memory."""

    def __init__(self) -> None:
        self._newest: weakref.ref[OffloadedActivation] | None = None

    def recompute(self, layer: int, function: Callable[..., Any], *inputs: Any) -> Any:
        """As the function `recompute`, with the first input, the hidden states, on the host."""
        if not torch.is_grad_enabled():
            return function(*inputs)
        shape = inputs[0].shape

        def pack(tensor: Tensor) -> "Tensor | OffloadedActivation":
            return self._offload(layer, tensor) if tensor.shape == shape else tensor

        def unpack(saved: "Tensor | OffloadedActivation") -> Tensor:
            return saved.load() if isinstance(saved, OffloadedActivation) else saved

        with saved_tensors_hooks(pack, unpack):
            return checkpoint(function, *inputs, use_reentrant=False)

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

    The copies run on a stream of their own. On the way out the GPU's tensor is held until the next
    layer's input leaves; the way back begins when the backward of the layer above does. So of all
    offloaded layers two inputs lie on the GPU.

    Args:
        layer: its index.
        tensor: contiguous; on the CPU it is copied at once.
        before: the input that left just before, which the backward wants next.
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
        """Give the GPU's memory back, to work that comes after the copy."""
        self._wait()
        self._on_gpu = None

    def fetch(self) -> None:
        """Begin the copy back to the GPU."""
        if self._on_gpu is None:
            self._on_gpu = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._copied = self._copy(to_host=False)

    def load(self) -> Tensor:
        """The input on the GPU; the one that the backward wants next is sent for."""
        self.fetch()
        self._wait()
        tensor, self._on_gpu = self._on_gpu, None
        assert tensor is not None, "fetched above"
        before = None if self._before is None else self._before()
        if before is not None and tensor.is_cuda:
            before.fetch()
        return tensor

    def __del__(self) -> None:
        # A backward that broke off: nothing may use the GPU's memory before the copy has ended.
        self._wait()

    def _wait(self) -> None:
        if self._on_gpu is not None and self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def _copy(self, to_host: bool) -> Any:
        """Copy page by page, on CUDA beside the computation; what to wait for."""
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
