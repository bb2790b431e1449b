"""Attention segment by segment: on every device, in every dtype, with everything a model asks for.

The other backends are tested against it. Each call has the shapes of one segment, so on the CPU a
segment's bits depend on neither its place nor its neighbours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from fastdpo.modeling.attention.kept import attention_mode
from fastdpo.modeling.attention.segments import AttentionParams, PackedSegments


def attend_segments(
    query: Tensor,  # (R, Hq, T, D)
    key: Tensor,  # (R, Hkv, T, D)
    value: Tensor,  # (R, Hkv, T, Dv)
    packed: PackedSegments,
    params: AttentionParams,
) -> Tensor:
    """Attend in each prefix with its first suffix, then in every further suffix over both.

    Returns:
        (R, Hq, T, Dv); R is 1 unless the sequences are padded ones.
    """
    with attention_mode(params.dropout):
        return _attend_each(query, key, value, packed, params)


def _attend_each(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSegments, params: AttentionParams
) -> Tensor:
    if not packed.segments:
        return _attend(query, key, value, packed, params)
    lengths = packed.split_tokens
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    blocks: list[Tensor] = []
    for segment in packed.segments:
        first, prefix = len(blocks), segment.prefix_tokens
        blocks.append(_attend(queries[first], keys[first], values[first], packed, params))
        for suffix in range(first + 1, first + max(1, len(segment.suffix_tokens))):
            if queries[suffix].shape[2] == 0:
                blocks.append(values[suffix].new_zeros(*queries[suffix].shape[:3], value.shape[3]))
                continue
            k = torch.cat([keys[first][:, :, :prefix], keys[suffix]], dim=2)
            v = torch.cat([values[first][:, :, :prefix], values[suffix]], dim=2)
            blocks.append(_attend(queries[suffix], k, v, packed, params))
    return torch.cat(blocks, dim=2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedSegments, params: AttentionParams
) -> Tensor:
    """Causal attention of the last q of k positions."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    window = params.window if params.window and num_keys > params.window else None
    if params.softcap is not None or params.sinks is not None:
        return _eager(q, k, v, packed.mask(num_queries, num_keys, window, q.device), params)
    causal = num_queries == num_keys and window is None
    mask = None if causal else packed.mask(num_queries, num_keys, window, q.device)
    if q.is_cuda and not causal:
        # A mask together with grouped heads falls to the kernel that writes all scores to memory.
        duplicates = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(duplicates, dim=1) for x in (k, v))
        mask = causal_lower_right(num_queries, num_keys) if window is None else mask
    return F.scaled_dot_product_attention(
        q, k, v, mask, params.dropout, is_causal=causal, scale=params.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, params: AttentionParams) -> Tensor:
    """Attention with capped scores (Gemma 2) or sinks (gpt-oss), which SDPA cannot express."""
    duplicates = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(duplicates, dim=1), v.repeat_interleave(duplicates, dim=1)
    scale = params.scale(q.shape[-1])
    if params.softcap is None:
        scores = q @ k.transpose(2, 3) * scale
    else:
        capped = torch.tanh(q @ k.transpose(2, 3) * (scale / params.softcap))
        scores = capped * params.softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if params.sinks is not None:
        sinks = params.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32)[..., : k.shape[2]]
    return F.dropout(weights.to(v.dtype), params.dropout) @ v
