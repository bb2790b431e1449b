"""Attention by a variable-length flash kernel: torch's own, or that of a flash-attn package.

Queries stay where they are in the packed sequence, cut into sequences for the kernel: the prefix
with its first suffix, then every further suffix. The keys of a further suffix are those of its
prefix and its own, so the prefix is gathered once more for it. One group of prefix p (4 tokens)
and suffixes a (3) and b (2), the numbers being places in the packed sequence:

    packed        p p p p a a a b b          T = 9
                  0 1 2 3 4 5 6 7 8
    queries       `--- 1 ------' `2'         query_ends  0 7 9
    keys          p p p p a a a p p p p b b  key_ends    0 7 13
                  0 1 2 3 4 5 6 0 1 2 3 7 8  gathered
                  `--- 1 ------'`--- 2 ---'

    first_index   0 1 2 3 4 5 6 11 12        where token 0, 1, ... 8 lies first among the keys
    duplicates    tokens 0 1 2 3, which lie once more at 7 8 9 10: a third suffix adds a second pair

A causal query of a sequence with more keys than queries sees them with the ends aligned, so token
7 sees p and itself. Gathered keys and values, (T + prefix tokens of further suffixes) x Hkv x
(D + Dv) numbers of one layer, take the place of keys and values among what backward keeps.

Flash attention 2 adds query gradients atomically unless torch.use_deterministic_algorithms is on
(`--full_determinism`); the gather's own gradient has a fixed order.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastdpo.batching import Segment
from fastdpo.modeling.attention.kept import attention_mode
from fastdpo.modeling.attention.segments import AttentionParams, PackedSegments
from fastdpo.system.device import to_device

Kernel = Callable[[Tensor, Tensor, Tensor, "VarlenLayout", AttentionParams], Tensor]
"""From (Tq, Hq, D), (Tk, Hkv, D), (Tk, Hkv, D), the layout and the params to (Tq, Hq, D)."""

PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
"""The modules that the flash-attn packages bring, by transformers' names of the backends."""


@dataclass(frozen=True, eq=False)
class VarlenLayout:
    """How the kernel's S sequences lie in one packed sequence of T tokens, on one device.

    Attributes:
        gathered: (Tk,) int64, the token at each place among the keys; None where that is the packed
            sequence itself.
        first_index: (T,) int64, each token's first place among the keys.
        duplicates: for the second, third, ... suffixes of all groups: prefix tokens, each once, and
            their further places among the keys.
        query_ends: (S + 1,) int32, where sequences end among the queries, from 0.
        key_ends: (S + 1,) int32, likewise among the keys.
        max_seqlen_q: queries of the longest sequence.
        max_seqlen_k: keys of the longest sequence.
    """

    gathered: Tensor | None
    first_index: Tensor
    duplicates: tuple[tuple[Tensor, Tensor], ...]
    query_ends: Tensor
    key_ends: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def layout_of(segments: tuple[Segment, ...], device: torch.device) -> VarlenLayout:
    """Lay out the sequences of one packed sequence."""
    gathered: list[np.ndarray] = []
    queries, keys = [], []
    duplicates: dict[int, list[tuple[np.ndarray, int]]] = {}
    placed = 0  # keys so far
    for segment in segments:
        first, *others = segment.suffix_tokens or (0,)
        prefix = np.arange(segment.start, segment.start + segment.prefix_tokens)
        end = segment.start + segment.prefix_tokens + first
        sequences = [(np.arange(segment.start, end), end - segment.start)]
        for number, tokens in enumerate(others):
            if tokens:
                duplicates.setdefault(number, []).append((prefix, placed + _keys_of(sequences)))
                suffix = np.arange(end, end + tokens)
                sequences.append((np.concatenate([prefix, suffix]), tokens))
                end += tokens
        for tokens_seen, num_queries in sequences:
            gathered.append(tokens_seen)
            queries.append(num_queries)
            keys.append(len(tokens_seen))
            placed += len(tokens_seen)
    key_tokens = np.concatenate(gathered)
    first_index = np.full(sum(queries), -1)
    # Written from the back, so that a token's first place is written last and stays.
    first_index[key_tokens[::-1]] = np.arange(placed)[::-1]

    def put(array: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return to_device(torch.from_numpy(array).to(dtype), device)

    def ends(lengths: list[int]) -> Tensor:
        return put(np.cumsum([0, *lengths]), torch.int32)

    repeated = tuple(
        (
            put(np.concatenate([prefix for prefix, _ in pieces])),
            put(np.concatenate([np.arange(at, at + len(prefix)) for prefix, at in pieces])),
        )
        for pieces in duplicates.values()
    )
    return VarlenLayout(
        put(key_tokens) if repeated else None, put(first_index), repeated, ends(queries),
        ends(keys), max(queries), max(keys),
    )  # fmt: skip


def _keys_of(sequences: list[tuple[np.ndarray, int]]) -> int:
    return sum(len(tokens_seen) for tokens_seen, _ in sequences)


class GatherKeys(torch.autograd.Function):
    """Gather (T, H, D) into (Tk, H, D); each token's gradients are added in a fixed order."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, layout: VarlenLayout) -> Tensor:
        """Copy the tokens to where the kernel's sequences have them."""
        ctx.layout = layout
        assert layout.gathered is not None, "there is something to gather"
        return tokens.index_select(0, layout.gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore
        """Add up the gradients of a token's first place and of its further ones."""
        layout = ctx.layout
        total = gradient.index_select(0, layout.first_index)
        for tokens, indices in layout.duplicates:
            more = total.index_select(0, tokens) + gradient.index_select(0, indices)
            total.index_copy_(0, tokens, more)
        return total, None


def attend_varlen(
    query: Tensor,  # (1, Hq, T, D)
    key: Tensor,  # (1, Hkv, T, D)
    value: Tensor,  # (1, Hkv, T, D)
    packed: PackedSegments,
    params: AttentionParams,
    kernel: Kernel,
) -> Tensor:
    """Attend to all segments by one call of a kernel.

    Returns:
        (1, Hq, T, D).
    """
    layout = packed.cached("varlen", lambda: layout_of(packed.segments, query.device))
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # views, both ways
    if layout.gathered is not None:
        k, v = GatherKeys.apply(k, layout), GatherKeys.apply(v, layout)
    return kernel(q, k, v, layout, params).transpose(0, 1)[None]


def attend_torch(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSegments, params: AttentionParams
) -> Tensor:
    """`attend_varlen` by torch's own kernel."""
    return attend_varlen(query, key, value, packed, params, torch_kernel(query.device))


def attend_flash_attention_2(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSegments, params: AttentionParams
) -> Tensor:
    """`attend_varlen` by the kernel of the flash-attn package."""
    return attend_varlen(query, key, value, packed, params, package_kernel("flash_attention_2"))


def attend_flash_attention_3(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedSegments, params: AttentionParams
) -> Tensor:
    """`attend_varlen` by the kernel of flash attention 3's package."""
    return attend_varlen(query, key, value, packed, params, package_kernel("flash_attention_3"))


@cache
def torch_kernel(device: torch.device) -> Kernel:
    """The kernel in torch.nn.attention.varlen, called with the arguments that this release has.

    Up to torch 2.11 it has no `enable_gqa`; whether it takes grouped heads is then tried once.
    """
    from torch.nn.attention import varlen

    varlen_attn: Callable[..., Tensor] = varlen.varlen_attn  # pyrefly: ignore[bad-assignment]
    knows_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def call(
        q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, params: AttentionParams
    ) -> Tensor:
        options: dict[str, Any] = {
            "scale": params.scale(q.shape[-1]),
            "window_size": _window(params),
        }
        if q.shape[1] != k.shape[1]:
            if knows_groups:
                options["enable_gqa"] = True
            elif not _takes_groups(device):
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        with attention_mode(params.dropout):
            return varlen_attn(
                q, k, v, layout.query_ends, layout.key_ends,
                layout.max_seqlen_q, layout.max_seqlen_k, **options,
            )  # fmt: skip

    @cache
    def _takes_groups(device: torch.device) -> bool:
        # Called in the midst of a forward: maybe without gradients, maybe inside a checkpoint,
        # which would count what is saved here.
        with torch.enable_grad(), saved_tensors_hooks(_identity, _identity):
            return _tries_groups(device)

    def _tries_groups(device: torch.device) -> bool:
        ends = torch.tensor([0, 8], dtype=torch.int32, device=device)
        q, k = (
            torch.linspace(-1, 1, 8 * heads * 64, device=device, dtype=torch.bfloat16)
            .view(8, heads, 64)
            .requires_grad_()
            for heads in (4, 2)
        )
        results = []
        for keys in (k, k.repeat_interleave(2, dim=1)):
            try:
                out = varlen_attn(q, keys, keys, ends, ends, 8, 8, window_size=(-1, 0))
                gradients = torch.autograd.grad(out.sum(), (q, k))
            except RuntimeError:
                return False
            results.append((out, *gradients))
        pairs = zip(*results, strict=True)
        return all(torch.allclose(a, b, atol=0.02, rtol=0.02) for a, b in pairs)

    return call


def _identity(tensor: Tensor) -> Tensor:
    return tensor


@cache
def package_kernel(name: str) -> Kernel:
    """The kernel of a flash-attn package, by transformers' name for the backend.

    Raises:
        ValueError: it is not installed.
    """
    try:
        module = __import__(PACKAGES[name])
        function = module.flash_attn_varlen_func
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"--attention {name} needs the package that brings `{PACKAGES[name]}`, which is not "
            f"installed here ({error}). Install it, or leave --attention at auto."
        ) from error
    known = inspect.signature(function).parameters

    def call(
        q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, params: AttentionParams
    ) -> Tensor:
        options: dict[str, Any] = {"causal": True, "softmax_scale": params.scale(q.shape[-1])}
        options["window_size"] = _window(params)
        if params.softcap is not None:
            options["softcap"] = params.softcap
        if "deterministic" in known:
            options["deterministic"] = torch.are_deterministic_algorithms_enabled()
        with attention_mode(params.dropout):
            out = function(
                q, k, v, cu_seqlens_q=layout.query_ends, cu_seqlens_k=layout.key_ends,
                max_seqlen_q=layout.max_seqlen_q, max_seqlen_k=layout.max_seqlen_k, **options,
            )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return call


def _window(params: AttentionParams) -> tuple[int, int]:
    """The window as (left, right): keys before the query's own, -1 for all, and keys after it."""
    return (params.window - 1 if params.window else -1, 0)
