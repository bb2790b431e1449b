"""FlexAttention over a whole packed sequence: caps, sinks and windows in one compiled kernel.

The mask is a function of token indices, never a (T, T) tensor: per block of 128 queries and keys
it is known whether all, some or none are allowed, and only the second kind asks the function.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from fastdpo.batching import Segment
from fastdpo.modeling.attention.segments import AttentionParams, PackedSegments
from fastdpo.system.device import to_device

BLOCK_TOKENS = 128
MAX_KERNELS = 256
"""Kernels of one process: one for each window, cap, size and count of heads, dtype, with and
without gradient, and before lengths are seen to vary. At torch's own limit of 8 `fullgraph`
raises."""

Allowed = Callable[[Any, Any, Any, Any], Tensor]
"""Tells of (batch, head, query index, key index) whether the query sees the key."""


def allowed_by(segments: tuple[Segment, ...], window: int | None, device: torch.device) -> Allowed:
    """The mask of a packed sequence as a function.

    A query sees the keys of its prefix and of its own suffix that do not come after it.
    """
    group, suffix, position = (
        to_device(torch.from_numpy(values), device) for values in _coordinates(segments)
    )

    def allowed(_batch: Any, _head: Any, query: Any, key: Any) -> Tensor:
        shared = (suffix[key] == 0) | (suffix[key] == suffix[query])
        seen = (group[query] == group[key]) & shared & (query >= key)
        if window is None:
            return seen
        return seen & (position[query] - position[key] < window)

    return allowed


def _coordinates(segments: tuple[Segment, ...]) -> np.ndarray:
    """Group, suffix (0 for the prefix) and position of every token, (3, T) int32."""
    columns = []
    for group, segment in enumerate(segments):
        for suffix, tokens in enumerate((segment.prefix_tokens, *segment.suffix_tokens)):
            first = segment.prefix_tokens if suffix else 0
            positions = np.arange(first, first + tokens)
            columns.append(np.stack([np.full(tokens, group), np.full(tokens, suffix), positions]))
    return np.concatenate(columns, axis=1).astype(np.int32)


def block_mask_of(
    segments: tuple[Segment, ...], window: int | None, device: torch.device
) -> BlockMask:
    """Find which blocks of keys each block of queries sees fully, in part or not at all.

    It is counted on the host from the segments: a query sees an interval of its own prefix or
    suffix and one of its group's prefix, so no (T, T) mask is formed and the device is not asked.
    """
    tokens = sum(segment.tokens for segment in segments)
    blocks = -(-tokens // BLOCK_TOKENS)
    starts = np.arange(blocks) * BLOCK_TOKENS
    intervals = _intervals(segments, window)
    some = np.zeros((blocks, blocks), dtype=bool)
    every = np.zeros_like(some)
    for block in range(blocks):
        first, end = intervals[:, :, block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS, None]
        inside = np.minimum(end, starts + BLOCK_TOKENS) - np.maximum(first, starts)
        seen = inside.clip(0).sum(axis=0)  # (queries, blocks): keys that a query sees of each block
        every[block] = (seen == BLOCK_TOKENS).all(axis=0) & (len(seen) == BLOCK_TOKENS)
        some[block] = (seen > 0).any(axis=0) & ~every[block]
    num_partial, partial_indices = _ordered(some, device)
    num_full, full_indices = _ordered(every, device)
    return BlockMask.from_kv_blocks(
        num_partial, partial_indices, num_full, full_indices, BLOCK_SIZE=BLOCK_TOKENS,
        mask_mod=allowed_by(segments, window, device),
        seq_lengths=(tokens, tokens),
    )  # fmt: skip


def _intervals(segments: tuple[Segment, ...], window: int | None) -> np.ndarray:
    """The keys that every token sees, (2, 2, T) int64: first and end of two disjoint intervals.

    The first lies in the token's own prefix or suffix; the second, in its group's prefix, is empty
    for a token of a prefix.
    """
    reach = np.iinfo(np.int32).max if window is None else window
    columns = []
    for segment in segments:
        at = segment.start
        for suffix, count in enumerate((segment.prefix_tokens, *segment.suffix_tokens)):
            query = np.arange(at, at + count)
            own = np.maximum(at, query - reach + 1), query + 1
            end = np.full(count, segment.start + (segment.prefix_tokens if suffix else 0))
            position = query - at + (segment.prefix_tokens if suffix else 0)
            seen_from = segment.start + np.maximum(0, position - reach + 1)
            columns.append(np.array([[own[0], np.minimum(seen_from, end)], [own[1], end]]))
            at += count
    return np.concatenate(columns, axis=2)


def _ordered(seen: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """From (blocks, blocks) bool, how many key blocks each query block sees, and their indices.

    The indices of those that it does not see follow.
    """
    indices = np.argsort(~seen, axis=1, kind="stable").astype(np.int32)
    counts = seen.sum(axis=1, dtype=np.int32)
    return tuple(  # pyrefly: ignore[bad-return]
        to_device(torch.from_numpy(each)[None, None], device) for each in (counts, indices)
    )


@cache
def capped_by(softcap: float) -> Callable[..., Tensor]:
    """A function that caps a score s: softcap * tanh(s / softcap).

    One object for each cap, so that it is compiled once.
    """

    def capped(score: Tensor, *_: Any) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@cache
def _kernel(compiled: bool) -> Callable[..., Any]:
    if not compiled:
        return flex_attention
    # Without fullgraph, too many shapes would silently fall back to all scores in memory.
    function = torch.compile(flex_attention, fullgraph=True)

    def call(*args: Any, **options: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=MAX_KERNELS):
            return function(*args, **options)

    return call


def attend_flex(
    query: Tensor,  # (1, Hq, T, D)
    key: Tensor,  # (1, Hkv, T, D)
    value: Tensor,  # (1, Hkv, T, D)
    packed: PackedSegments,
    params: AttentionParams,
) -> Tensor:
    """Attend over the whole packed sequence by one call; on the CPU uncompiled, without gradient.

    Returns:
        (1, Hq, T, D).
    """
    mask = packed.cached(
        ("flex", params.window), lambda: block_mask_of(packed.segments, params.window, query.device)
    )
    options: dict[str, Any] = {} if params.sinks is None else {"return_aux": AuxRequest(lse=True)}
    result = _kernel(query.is_cuda)(
        query, key, value,
        score_mod=None if params.softcap is None else capped_by(params.softcap),
        block_mask=mask,
        scale=params.scale(query.shape[-1]),
        enable_gqa=query.shape[1] != key.shape[1],
        **options,
    )  # fmt: skip
    if params.sinks is None:
        return result
    out, further = result
    # One more key of score s and value 0: all weights shrink by exp(lse) / (exp(lse) + exp(s)).
    share = torch.sigmoid(further.lse - params.sinks.float()[None, :, None])
    return (out.float() * share[..., None]).to(out.dtype)
