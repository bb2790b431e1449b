"""Attention over packed groups: each completion attends to its prompt and to itself.

Registered with transformers under the name `fastdpo`. It has no mask function there, so no (T, T)
mask is ever built, and it refuses to run without the segments of a micro-batch: a padded or
generating call under this name would be silently wrong. Models therefore keep their own
implementation, and `packed_attention` switches to this one around packed passes only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from fastdpo.batching import Segment

NAME = "fastdpo"
KIND = "sdpa-per-segment"
"""What computes the attention; part of the reference store's key."""


@dataclass
class PackedSegments:
    """The segments of one micro-batch, with the masks that its layers share."""

    segments: tuple[Segment, ...]
    layers_run: int = 0
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    @property
    def split_tokens(self) -> list[int]:
        """Lengths that cut the row into what attends as one block: trunk + first branch, others."""
        lengths = []
        for segment in self.segments:
            first, *others = segment.branch_tokens or (0,)
            lengths += [segment.trunk_tokens + first, *others]
        return lengths

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """(queries, keys) bool, causal with the ends aligned, inside the window if there is one."""
        shape = (queries, keys, window)
        if shape not in self.masks:
            distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(
                keys, device=device
            )
            allowed = distance >= 0
            self.masks[shape] = allowed if window is None else allowed & (distance < window)
        return self.masks[shape]


@contextmanager
def packed_attention(config: PreTrainedConfig) -> Iterator[None]:
    """Let the model of this config attend over packed groups; its own implementation afterwards."""
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def segment_attention(
    module: nn.Module,
    query: Tensor,  # (1, Hq, T, D)
    key: Tensor,  # (1, Hkv, T, D)
    value: Tensor,  # (1, Hkv, T, D)
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed: PackedSegments | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention, segment by segment, so that a row sees only its own shape.

    Returns:
        (1, T, Hq, D), and None for the weights.

    Raises:
        ValueError: called without packed segments, or for a kind of attention it does not have.
    """
    if packed is None:
        raise ValueError(
            "the `fastdpo` attention needs the segments of a packed micro-batch and was called "
            "without: for generation or padded batches leave the model's own attention in place "
            "(fastdpo.modeling.attention.packed_attention switches for packed passes only)."
        )
    if s_aux is not None or not getattr(module, "is_causal", True):
        raise ValueError(
            f"{type(module).__name__} uses attention sinks or attends both ways, which packed "
            "pairs cannot do exactly yet: choose a causal model without sinks."
        )
    packed.layers_run += 1

    def attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedSegments = packed) -> Tensor:
        window = sliding_window if sliding_window and k.shape[2] > sliding_window else None
        if softcap is not None:
            mask = packed.mask(q.shape[2], k.shape[2], window, q.device)
            return _softcapped(q, k, v, mask, scaling, softcap, dropout)
        causal = q.shape[2] == k.shape[2] and window is None
        mask = None if causal else packed.mask(q.shape[2], k.shape[2], window, q.device)
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=causal, scale=scaling, enable_gqa=True
        )

    lengths = packed.split_tokens
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    blocks: list[Tensor] = []
    for segment in packed.segments:
        at, trunk = len(blocks), segment.trunk_tokens
        blocks.append(attend(queries[at], keys[at], values[at]))
        for branch in range(at + 1, at + max(1, len(segment.branch_tokens))):
            if queries[branch].shape[2] == 0:
                blocks.append(queries[branch])
                continue
            k = torch.cat([keys[at][:, :, :trunk], keys[branch]], dim=2)
            v = torch.cat([values[at][:, :, :trunk], values[branch]], dim=2)
            blocks.append(attend(queries[branch], k, v))
    return torch.cat(blocks, dim=2).transpose(1, 2).contiguous(), None


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float,
    dropout: float,
) -> Tensor:
    """Attention with capped scores (Gemma 2), which SDPA cannot express; (1, Hq, q, D)."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / softcap)) * softcap
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1, dtype=torch.float32)
    return F.dropout(weights.to(value.dtype), dropout) @ value


AttentionInterface.register(NAME, segment_attention)
