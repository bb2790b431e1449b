"""Exact bytes of tensors that are alive, operation by operation, without a card.

Under torch's fake tensors a 7B model's real update is walked through in seconds with no memory at
all: Python and autograd keep and free what they would keep and free on the card, and only the
workspaces inside single operations are not seen. That is what a plan is held against.
"""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any
from unittest import mock

import torch
from fastdpo_kernels import _backend
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fastdpo.batching import Segment
from fastdpo.modeling.activations import apply_activation_plan
from fastdpo.modeling.adapters import add_adapter, lora_config
from fastdpo.modeling.attention import PackedSegments, packed_attention
from fastdpo.modeling.fused import use_kernels
from fastdpo.modeling.head import get_backbone, unwrap_model
from fastdpo.modeling.tiles import tile_mlps, tile_norms


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations bring into life, above what was alive before.

    Attributes:
        now_bytes: alive at this moment.
        peak_bytes: the most that ever was.
        at_peak: the operation whose result made the peak.
        marks: `now_bytes` when `mark` was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now_bytes = self.peak_bytes = 0
        self.at_peak = ""
        self.alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that were there before: their storages are not counted."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.alive[storage._cdata] = weakref.ref(storage)

    def count(self, tensors: Iterable[Tensor], name: str) -> None:
        """Take in the storages of new tensors; the peak may move."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self.alive:
                continue

            def gone(_: Any, key: int = key, size: int = size) -> None:
                self.alive.pop(key, None)
                self.now_bytes -= size

            self.alive[key] = weakref.ref(storage, gone)
            self.now_bytes += size
        if self.now_bytes > self.peak_bytes:
            self.peak_bytes, self.at_peak = self.now_bytes, name

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self.count([leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)], str(function))
        return out


class _Head(torch.autograd.Function):
    """In the place of `linear_logprobs`, whose checks look at values: it takes the same bytes."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, buffer_bytes: int) -> Tensor:
        buffer = torch.empty(buffer_bytes, dtype=torch.uint8)
        ctx.save_for_backward(torch.empty_like(hidden_states))
        del buffer
        return hidden_states.new_zeros(len(hidden_states), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        (gradients,) = ctx.saved_tensors
        scaled = gradients.to(torch.float32) * grad_outputs[0][:, None]
        return scaled.to(gradients.dtype), None


def walk_update(
    config: PreTrainedConfig,
    segments: Sequence[Segment],
    *,
    dtype: torch.dtype,
    policy: Sequence[str],
    mlp_tile_tokens: int | None = None,
    norm_tile_tokens: int | None = None,
    kernels: str = "eager",
    lora_r: int = 16,
    buffer_bytes: int = 128 * 2**20,
) -> LiveBytes:
    """Forward and backward of one micro-batch of a LoRA model on fake tensors.

    Args:
        config: of a causal LM.
        segments: the row's groups, every completion token scored.
        dtype: of the dense frozen weights.
        policy: of its decoder layers; nothing is offloaded, host memory being the same here.
        mlp_tile_tokens: tokens of a tile of the MLPs, or None.
        norm_tile_tokens: likewise of the norms.
        kernels: fused or eager; fused ops run their torch twins, which save the same.
        lora_r: rank of the adapters on all linear layers.
        buffer_bytes: that the head takes for a while.

    Returns:
        The counts, without weights, adapters and their gradients.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model = add_adapter(model, lora_config(lora_r, 2 * lora_r, 0.0, None)).train()
    apply_activation_plan(model, policy)
    use_kernels(model, kernels, backend="torch")
    tile_mlps(model, mlp_tile_tokens)
    tile_norms(model, norm_tile_tokens)
    tokens = sum(segment.tokens for segment in segments)
    scored = sum(sum(segment.suffix_tokens) for segment in segments)
    live = LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialize(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:  # as from the second micro-batch of an update on
            parameter.grad = torch.empty_like(parameter)
        live.ignore([*model.parameters(), *model.buffers(), *(p.grad for p in trained)])
        # The torch twins work the rows tile by tile, a fake operation each: in larger tiles here.
        tiles = mock.patch.object(_backend, "TILE_ELEMENTS", 2**20)
        with live, tiles, packed_attention(unwrap_model(model).config):
            ids, positions = (torch.zeros(1, tokens, dtype=torch.int64) for _ in range(2))
            at, _targets, _index = (torch.zeros(scored, dtype=torch.int64) for _ in range(3))
            hidden_states = get_backbone(model)(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                packed=PackedSegments(tuple(segments)),
            ).last_hidden_state
            logps = _Head.apply(hidden_states[0].index_select(0, at), buffer_bytes)
            del hidden_states
            logps.double().sum().backward()
    return live


def _materialize(model: nn.Module) -> None:
    """Give every tensor of a model on the meta device storage: fake, under fake tensors."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
