"""Launches the rotary kernels: tile shapes, strides, and the sum of the weights' gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._backend import next_power_of_two, rounding

if TYPE_CHECKING:
    from .rotary import _Options

ELEMENTS = 2048
"""Numbers of one of the two halves in a program's tile, 16 for each of 128 threads."""


def turned(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: Sequence[Tensor],
    options: _Options,
    *,
    in_place: bool,
    transposed: bool = False,
) -> tuple[Tensor, Tensor]:
    """Both turned, in new tensors or over themselves; or gradients turned back."""
    from . import _triton_rotary

    q, k, cos, sin = _with_columns(q), _with_columns(k), *_of_equal_strides(cos, sin)
    outs = (q.detach(), k.detach()) if in_place else (torch.empty_like(q), torch.empty_like(k))
    rest = q.shape[-1] - cos.shape[-1]
    constants, grid, programs = tiles(q, k, cos, weights, options, transposed)
    norms = [w.contiguous() for w in weights] or (q, k)
    if grid == 0:
        return outs
    launch: Any = _triton_rotary.rotary_kernel[(grid,)]
    launch(
        q, k, *norms, *outs, cos, sin,
        q.shape[0] * q.shape[2], q.shape[2], programs,
        *_strides(q, k, *outs), *_cos_strides(cos), options.eps,
        NORM=bool(weights), TRANSPOSED=transposed, INTERLEAVED=options.interleaved,
        COPY_REST=rest > 0 and not in_place, **constants,
    )  # fmt: skip
    if in_place:
        torch.autograd.graph.increment_version([q, k])
    return outs


def norm_gradients(
    grads: Sequence[Tensor],  # of the turned q and k
    inputs: tuple[Tensor, Tensor],  # q and k before their norm
    cos: Tensor,
    sin: Tensor,
    weights: Sequence[Tensor],
    needs_weight: Sequence[bool],
    options: _Options,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q and k, and of the norms' weights where they are needed."""
    from . import _triton_rotary

    q, k = (_with_columns(t) for t in inputs)
    grads = [_with_columns(t) for t in grads]
    cos, sin = _of_equal_strides(cos, sin)
    outs = torch.empty_like(q), torch.empty_like(k)
    constants, grid, programs = tiles(q, k, cos, weights, options, True)
    width = q.shape[-1]
    counts = programs, grid - programs
    partials = [
        q.new_empty((count, width), dtype=torch.float32) if needed else q
        for needed, count in zip(needs_weight, counts, strict=True)
    ]
    if grid:
        launch: Any = _triton_rotary.rotary_norm_gradient_kernel[(grid,)]
        launch(
            *grads, q, k, *(w.contiguous() for w in weights), *outs, *partials, cos, sin,
            q.shape[0] * q.shape[2], q.shape[2], programs,
            *_strides(*grads, q, k, *outs), *_cos_strides(cos), options.eps,
            Q_WEIGHT_GRADIENT=needs_weight[0], K_WEIGHT_GRADIENT=needs_weight[1], **constants,
        )  # fmt: skip
    of_weights = [
        partial.sum(0).to(weight.dtype) if needed else None
        for partial, weight, needed in zip(partials, weights, needs_weight, strict=True)
    ]
    return outs[0], outs[1], of_weights[0], of_weights[1]


def tiles(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    weights: Sequence[Tensor],
    options: _Options,
    transposed: bool,
) -> tuple[dict[str, Any], int, int]:
    """Constants of a launch, its programs, and how many of them take q."""
    half, rest = cos.shape[-1] // 2, q.shape[-1] - cos.shape[-1]
    block_half = max(8, next_power_of_two(half))
    whole = bool(weights) and weights[0].shape[0] != q.shape[-1]
    constants: dict[str, Any] = {"HALF": half, "REST": rest, "BLOCK_HALF": block_half}
    constants["BLOCK_REST"] = max(8, next_power_of_two(max(rest, 1)))
    counts, largest = [], 0
    for name, x in (("Q", q), ("K", k)):
        block_t, block_heads = block_shape(x.shape[1], block_half, whole)
        constants |= {
            f"{name}_HEADS": x.shape[1],
            f"{name}_BLOCK_T": block_t,
            f"{name}_BLOCK_HEADS": block_heads,
        }
        largest = max(largest, block_t * block_heads * block_half)
        groups = -(-x.shape[1] // block_heads)
        counts.append(-(-(x.shape[0] * x.shape[2]) // block_t) * groups)
    # Products are formed in the wider dtype of q and cos; gradients' are rounded to q's.
    product = q.dtype if transposed else torch.promote_types(q.dtype, cos.dtype)
    constants |= {
        "FORM": options.form,
        "WHOLE": whole,
        "ROUND": rounding(q.dtype),
        "ROUND_PRODUCT": "none" if options.upcast else rounding(product),
        "num_warps": min(16, max(4, largest // 512)),
        "enable_fp_fusion": False,
    }
    return constants, sum(counts), counts[0]


def block_shape(heads: int, block_half: int, whole: bool) -> tuple[int, int]:
    """BLOCK_T and BLOCK_HEADS: all heads of a token where its norm runs over them."""
    padded = next_power_of_two(heads)
    block_heads = padded if whole else min(padded, max(1, ELEMENTS // block_half))
    return max(1, ELEMENTS // (block_heads * block_half)), block_heads


def _with_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _of_equal_strides(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    if cos.stride() == sin.stride() and cos.stride(-1) == 1:
        return cos, sin
    return cos.contiguous(), sin.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _cos_strides(cos: Tensor) -> tuple[int, int]:
    return 0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1)
