"""Attention by a variable-length flash kernel: torch's own, or that of a flash-attn package.

Queries lie as they do in the packed sequence: [prefix | suffix 1], [suffix 2], ... are one sequence
each. The keys of a later suffix are its prefix's and its own, so the prefixes of those lie a second
time among the keys: (T + prefix tokens of further suffixes) x Hkv x (D + Dv) numbers of one layer,
which take the place of keys and values among what backward keeps. In the kernel a causal query of a
sequence with more keys than queries sees all but the last keys, ends aligned, as a suffix must.

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
from fastdpo.modeling.attention.segments import AttentionParams, PackedSegments

Kernel = Callable[[Tensor, Tensor, Tensor, "VarlenLayout", AttentionParams], Tensor]
"""(Tq, Hq, D), (Tk, Hkv, D), (Tk, Hkv, D), the sequences and the terms to (Tq, Hq, D)."""

PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
"""By transformers' names, the modules of the flash-attn packages."""


@dataclass(frozen=True, eq=False)
class VarlenLayout:
    """The sequences of one row, S of them, on one device."""

    gathered: Tensor | None  # (Tk,) int64: the row's tokens as they lie among the keys; None: as is
    first_index: Tensor  # (T,) int64: where each token lies first among the keys
    duplicates: tuple[tuple[Tensor, Tensor], ...]  # tokens, each once, and where they lie once more
    query_ends: Tensor  # (S + 1,) int32, from 0
    key_ends: Tensor  # (S + 1,) int32, from 0
    max_seqlen_q: int
    most_keys: int


def layout_of(segments: tuple[Segment, ...], device: torch.device) -> VarlenLayout:
    """Lay out the sequences of a row."""
    gathered: list[np.ndarray] = []
    queries, keys = [], []
    duplicates: dict[int, list[tuple[np.ndarray, int]]] = {}
    placed = 0
    for segment in segments:
        first, *others = segment.suffix_tokens or (0,)
        prefix = np.arange(segment.start, segment.start + segment.prefix_tokens)
        end = segment.start + segment.prefix_tokens + first
        sequences = [(np.arange(segment.start, end), end - segment.start)]
        for number, tokens in enumerate(others):
            if tokens:
                duplicates.setdefault(number, []).append((prefix, placed + _keys_of(sequences)))
                own = np.arange(end, end + tokens)
                sequences.append((np.concatenate([prefix, own]), tokens))
                end += tokens
        for places, requested in sequences:
            gathered.append(places)
            queries.append(requested)
            keys.append(len(places))
            placed += len(places)
    places = np.concatenate(gathered)
    first_index = np.full(sum(queries), -1)
    first_index[places[::-1]] = np.arange(placed)[::-1]  # of several, the first is written last

    def put(array: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(array).to(dtype).to(device, non_blocking=True)

    def ends(lengths: list[int]) -> Tensor:
        return put(np.cumsum([0, *lengths]), torch.int32)

    again = tuple(
        (
            put(np.concatenate([prefix for prefix, _ in found])),
            put(np.concatenate([np.arange(at, at + len(prefix)) for prefix, at in found])),
        )
        for found in duplicates.values()
    )
    return VarlenLayout(
        put(places) if again else None, put(first_index), again, ends(queries), ends(keys),
        max(queries), max(keys),
    )  # fmt: skip


def _keys_of(sequences: list[tuple[np.ndarray, int]]) -> int:
    """Keys of all the sequences."""
    return sum(len(places) for places, _ in sequences)


class GatherKeys(torch.autograd.Function):
    """Rows of (T, H, D) to (Tk, H, D); each row's gradients are added in a fixed order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: VarlenLayout) -> Tensor:
        """Copy the tokens to where the sequences want them."""
        ctx.layout = layout
        assert layout.gathered is not None, "there is something to gather"
        return rows.index_select(0, layout.gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore
        """A token's gradient is that of its first place plus those of its further ones."""
        layout = ctx.layout
        total = gradient.index_select(0, layout.first_index)
        for tokens, places in layout.duplicates:
            more = total.index_select(0, tokens) + gradient.index_select(0, places)
            total.index_copy_(0, tokens, more)
        return total, None


def attend_varlen(
    query: Tensor,  # (1, Hq, T, D)
    key: Tensor,  # (1, Hkv, T, D)
    value: Tensor,  # (1, Hkv, T, D)
    packed: PackedSegments,
    terms: AttentionParams,
    kernel: Kernel,
) -> Tensor:
    """All segments by one call of a kernel, (1, Hq, T, D)."""
    layout = packed.cached("varlen", lambda: layout_of(packed.segments, query.device))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if layout.gathered is not None:
        k, v = GatherKeys.apply(k, layout), GatherKeys.apply(v, layout)
    return kernel(q, k, v, layout, terms).transpose(0, 1)[None]


@cache
def torch_kernel(device: torch.device) -> Kernel:
    """torch.nn.attention.varlen, whatever the arguments of this release.

    Up to torch 2.11 it has no `enable_gqa`; whether it takes grouped heads is then tried once.
    """
    from torch.nn.attention import varlen

    varlen_attn: Callable[..., Tensor] = varlen.varlen_attn  # pyrefly: ignore[bad-assignment]
    knows_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def call(
        q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, terms: AttentionParams
    ) -> Tensor:
        options: dict[str, Any] = {"scale": terms.scale(q.shape[-1]), "window_size": _window(terms)}
        if q.shape[1] != k.shape[1]:
            if knows_groups:
                options["enable_gqa"] = True
            elif not _takes_groups(device):
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return varlen_attn(
            q, k, v, layout.query_ends, layout.key_ends, layout.max_seqlen_q, layout.most_keys,
            **options,
        )  # fmt: skip

    @cache
    def _takes_groups(device: torch.device) -> bool:
        # Asked for in the midst of a forward: maybe without gradients, maybe inside a checkpoint,
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
        found = []
        for keys in (k, k.repeat_interleave(2, dim=1)):
            try:
                out = varlen_attn(q, keys, keys, ends, ends, 8, 8, window_size=(-1, 0))
                gradients = torch.autograd.grad(out.sum(), (q, k))
            except RuntimeError:
                return False
            found.append((out, *gradients))
        return all(torch.allclose(a, b, atol=0.02, rtol=0.02) for a, b in zip(*found, strict=True))

    return call


def _identity(tensor: Tensor) -> Tensor:
    return tensor


@cache
def package_kernel(name: str) -> Kernel:
    """A flash-attn package's kernel, by transformers' name for it.

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
        q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, terms: AttentionParams
    ) -> Tensor:
        options: dict[str, Any] = {"causal": True, "softmax_scale": terms.scale(q.shape[-1])}
        options["window_size"] = _window(terms)
        if terms.softcap is not None:
            options["softcap"] = terms.softcap
        if "deterministic" in known:
            options["deterministic"] = torch.are_deterministic_algorithms_enabled()
        out = function(
            q, k, v, cu_seqlens_q=layout.query_ends, cu_seqlens_k=layout.key_ends,
            max_seqlen_q=layout.max_seqlen_q, max_seqlen_k=layout.most_keys, **options,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return call


def _window(terms: AttentionParams) -> tuple[int, int]:
    """(left, right) as flash kernels count: keys before the query's own, -1 for all, and after."""
    return (terms.window - 1 if terms.window else -1, 0)
