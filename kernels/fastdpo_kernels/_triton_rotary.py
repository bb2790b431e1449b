"""Rotary embedding of q and k in one launch, with their norms folded in. Jit code only.

One program = BLOCK_T tokens x BLOCK_HEADS heads of q or of k, as three tiles: the two halves of
what is turned, and the columns behind it. The first programs take q, the others k; the two are
branches of one kernel, so that each keeps what the compiler knows of its pointers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_rms_norm import scaled
from ._triton_rounding import rounded

ZERO, ONE = tl.constexpr(0), tl.constexpr(1)
NO, YES = tl.constexpr(False), tl.constexpr(True)


@triton.jit
def _tokens(block, HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HEADS: tl.constexpr):
    """Tokens (BLOCK_T,) and heads (BLOCK_HEADS,) of a program's tile."""
    groups: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    token = (block // groups) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = (block % groups) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    return token, head


@triton.jit
def _rows_at(ptr, token, head, length, batch_stride, head_stride, token_stride):
    """Pointers to the first column, (BLOCK_T, BLOCK_HEADS, 1)."""
    batch = (token // length).to(tl.int64) * batch_stride
    place = (token % length).to(tl.int64) * token_stride
    head_at = head.to(tl.int64) * head_stride
    return ptr + ((batch + place)[:, None] + head_at[None, :])[:, :, None]


@triton.jit
def _load(at, inside, start: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = inside & (column < WIDTH)[None, None, :]
    return tl.load(at + (column + start)[None, None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(at, value, inside, start: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = inside & (column < WIDTH)[None, None, :]
    tl.store(at + (column + start)[None, None, :], value, mask=mask)


@triton.jit
def _load_halves(
    at, inside, T: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Return the columns of each rotated pair: i and i + HALF, or 2 i and 2 i + 1."""
    if INTERLEAVED:
        both = _load(at, inside, ZERO, 2 * HALF, 2 * BLOCK)
        return tl.split(tl.reshape(both, (T, HEADS, BLOCK, 2)))
    else:
        return _load(at, inside, ZERO, HALF, BLOCK), _load(at, inside, HALF, HALF, BLOCK)


@triton.jit
def _turned(
    low, high, cos_ptr, sin_ptr, token, length, tokens, cos_batch_stride, cos_token_stride,
    TRANSPOSED: tl.constexpr, ROUND: tl.constexpr, ROUND_PRODUCT: tl.constexpr,
    INTERLEAVED: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The rotation, or for gradients its transpose."""
    inside = (token < tokens)[:, None, None]
    first = tl.arange(0, 1)
    strides = (cos_batch_stride, 0, cos_token_stride)
    cos_at = _rows_at(cos_ptr, token, first, length, strides[0], strides[1], strides[2])
    sin_at = _rows_at(sin_ptr, token, first, length, strides[0], strides[1], strides[2])
    cos_low, cos_high = _load_halves(cos_at, inside, BLOCK_T, ONE, HALF, BLOCK_HALF, INTERLEAVED)
    sin_low, sin_high = _load_halves(sin_at, inside, BLOCK_T, ONE, HALF, BLOCK_HALF, INTERLEAVED)
    if TRANSPOSED:
        crossed_low = rounded(high * sin_high, ROUND_PRODUCT)
        crossed_high = -rounded(low * sin_low, ROUND_PRODUCT)
    else:
        crossed_low = -rounded(high * sin_low, ROUND_PRODUCT)
        crossed_high = rounded(low * sin_high, ROUND_PRODUCT)
    new_low = rounded(rounded(low * cos_low, ROUND_PRODUCT) + crossed_low, ROUND)
    new_high = rounded(rounded(high * cos_high, ROUND_PRODUCT) + crossed_high, ROUND)
    return new_low, new_high


@triton.jit
def _factor(
    weight_ptr, head, start: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WHOLE: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """The norm's weight for a tile: (1, 1, BLOCK), or (1, BLOCK_HEADS, BLOCK) of a whole row."""
    if WHOLE:
        at = weight_ptr + (head * SIZE)[None, :, None]
        inside = (head < HEADS)[None, :, None]
    else:
        at = weight_ptr + tl.zeros((1, 1, 1), dtype=tl.int32)
        inside = tl.full((1, 1, 1), True, dtype=tl.int1)
    weight = _load(at, inside, start, WIDTH, BLOCK)
    if FORM == "gemma":
        weight += 1.0
    return weight


@triton.jit
def _row_sum(low, high, rest, REST: tl.constexpr, WHOLE: tl.constexpr):
    """Sum over a head, (T, heads, 1), or over all heads of a token, (T, 1, 1)."""
    total = tl.sum(low, axis=2, keep_dims=True) + tl.sum(high, axis=2, keep_dims=True)
    if REST > 0:
        total += tl.sum(rest, axis=2, keep_dims=True)
    if WHOLE:
        total = tl.sum(total, axis=1, keep_dims=True)
    return total


@triton.jit
def _turn_tile(
    block, x_ptr, weight_ptr, out_ptr, cos_ptr, sin_ptr, tokens, length,
    x_batch_stride, x_head_stride, x_token_stride,
    out_batch_stride, out_head_stride, out_token_stride,
    cos_batch_stride, cos_token_stride, eps,
    HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    NORM: tl.constexpr, FORM: tl.constexpr, WHOLE: tl.constexpr, TRANSPOSED: tl.constexpr,
    COPY_REST: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROUND: tl.constexpr, ROUND_PRODUCT: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    token, head = _tokens(block, HEADS, BLOCK_T, BLOCK_HEADS)
    inside = (token < tokens)[:, None, None] & (head < HEADS)[None, :, None]
    at = _rows_at(x_ptr, token, head, length, x_batch_stride, x_head_stride, x_token_stride)
    low, high = _load_halves(at, inside, BLOCK_T, BLOCK_HEADS, HALF, BLOCK_HALF, INTERLEAVED)
    rest = low
    if COPY_REST:
        rest = _load(at, inside, 2 * HALF, REST, BLOCK_REST)
    if NORM:
        size: tl.constexpr = 2 * HALF + REST
        count: tl.constexpr = size * (HEADS if WHOLE else 1)
        square = _row_sum(low * low, high * high, rest * rest, REST, WHOLE)
        scale = tl.rsqrt(square / count + eps)
        factor = _factor(weight_ptr, head, ZERO, HALF, BLOCK_HALF, HEADS, size, WHOLE, FORM)
        low = rounded(scaled(low * scale, factor, FORM, ROUND), ROUND)
        factor = _factor(weight_ptr, head, HALF, HALF, BLOCK_HALF, HEADS, size, WHOLE, FORM)
        high = rounded(scaled(high * scale, factor, FORM, ROUND), ROUND)
        if REST > 0:
            factor = _factor(weight_ptr, head, 2 * HALF, REST, BLOCK_REST, HEADS, size, WHOLE, FORM)
            rest = rounded(scaled(rest * scale, factor, FORM, ROUND), ROUND)
    low, high = _turned(
        low, high, cos_ptr, sin_ptr, token, length, tokens, cos_batch_stride, cos_token_stride,
        TRANSPOSED, ROUND, ROUND_PRODUCT, INTERLEAVED, HALF, BLOCK_HALF, BLOCK_T,
    )  # fmt: skip
    at = _rows_at(out_ptr, token, head, length, out_batch_stride, out_head_stride, out_token_stride)
    if INTERLEAVED:
        both = tl.reshape(tl.join(low, high), (BLOCK_T, BLOCK_HEADS, 2 * BLOCK_HALF))
        _store(at, both, inside, ZERO, 2 * HALF, 2 * BLOCK_HALF)
    else:
        _store(at, low, inside, ZERO, HALF, BLOCK_HALF)
        _store(at, high, inside, HALF, HALF, BLOCK_HALF)
    if COPY_REST:
        _store(at, rest, inside, 2 * HALF, REST, BLOCK_REST)


@triton.jit(do_not_specialize=["tokens", "length", "q_programs"])
def rotary_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr,
    tokens, length, q_programs,
    q_batch_stride, q_head_stride, q_token_stride,
    k_batch_stride, k_head_stride, k_token_stride,
    q_out_batch_stride, q_out_head_stride, q_out_token_stride,
    k_out_batch_stride, k_out_head_stride, k_out_token_stride,
    cos_batch_stride, cos_token_stride, eps,
    Q_HEADS: tl.constexpr, Q_BLOCK_T: tl.constexpr, Q_BLOCK_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr, K_BLOCK_T: tl.constexpr, K_BLOCK_HEADS: tl.constexpr,
    NORM: tl.constexpr, FORM: tl.constexpr, WHOLE: tl.constexpr, TRANSPOSED: tl.constexpr,
    COPY_REST: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROUND: tl.constexpr, ROUND_PRODUCT: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """q, k (B, heads, T, D) turned by cos, sin (B, T, 2 HALF); the columns behind are copied."""
    block = tl.program_id(0)
    if block < q_programs:
        _turn_tile(
            block, q_ptr, q_weight_ptr, q_out_ptr, cos_ptr, sin_ptr, tokens, length,
            q_batch_stride, q_head_stride, q_token_stride,
            q_out_batch_stride, q_out_head_stride, q_out_token_stride,
            cos_batch_stride, cos_token_stride, eps, Q_HEADS, Q_BLOCK_T, Q_BLOCK_HEADS,
            NORM, FORM, WHOLE, TRANSPOSED, COPY_REST, INTERLEAVED, ROUND, ROUND_PRODUCT,
            HALF, REST, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        _turn_tile(
            block - q_programs, k_ptr, k_weight_ptr, k_out_ptr, cos_ptr, sin_ptr, tokens, length,
            k_batch_stride, k_head_stride, k_token_stride,
            k_out_batch_stride, k_out_head_stride, k_out_token_stride,
            cos_batch_stride, cos_token_stride, eps, K_HEADS, K_BLOCK_T, K_BLOCK_HEADS,
            NORM, FORM, WHOLE, TRANSPOSED, COPY_REST, INTERLEAVED, ROUND, ROUND_PRODUCT,
            HALF, REST, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


@triton.jit
def _norm_gradient_tile(
    block, grad_ptr, x_ptr, weight_ptr, out_ptr, partial_ptr, cos_ptr, sin_ptr, tokens, length,
    grad_batch_stride, grad_head_stride, grad_token_stride,
    x_batch_stride, x_head_stride, x_token_stride,
    out_batch_stride, out_head_stride, out_token_stride,
    cos_batch_stride, cos_token_stride, eps,
    HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    FORM: tl.constexpr, WHOLE: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr,
    ROUND: tl.constexpr, ROUND_PRODUCT: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    size: tl.constexpr = 2 * HALF + REST
    count: tl.constexpr = size * (HEADS if WHOLE else 1)
    token, head = _tokens(block, HEADS, BLOCK_T, BLOCK_HEADS)
    inside = (token < tokens)[:, None, None] & (head < HEADS)[None, :, None]
    at = _rows_at(
        grad_ptr, token, head, length, grad_batch_stride, grad_head_stride, grad_token_stride
    )
    low = _load(at, inside, ZERO, HALF, BLOCK_HALF)
    high = _load(at, inside, HALF, HALF, BLOCK_HALF)
    low, high = _turned(
        low, high, cos_ptr, sin_ptr, token, length, tokens, cos_batch_stride, cos_token_stride,
        YES, ROUND, ROUND_PRODUCT, NO, HALF, BLOCK_HALF, BLOCK_T,
    )  # fmt: skip
    rest = low
    x_at = _rows_at(x_ptr, token, head, length, x_batch_stride, x_head_stride, x_token_stride)
    x_low = _load(x_at, inside, ZERO, HALF, BLOCK_HALF)
    x_high = _load(x_at, inside, HALF, HALF, BLOCK_HALF)
    x_rest = x_low
    if REST > 0:
        rest = _load(at, inside, 2 * HALF, REST, BLOCK_REST)
        x_rest = _load(x_at, inside, 2 * HALF, REST, BLOCK_REST)
    square = _row_sum(x_low * x_low, x_high * x_high, x_rest * x_rest, REST, WHOLE)
    scale = tl.rsqrt(square / count + eps)
    if WEIGHT_GRADIENT:  # of a norm over single heads
        share_at = partial_ptr + block.to(tl.int64) * size
        column = tl.arange(0, BLOCK_HALF)
        share = tl.sum(tl.sum(low * scaled(x_low * scale, 1.0, FORM, ROUND), axis=1), axis=0)
        tl.store(share_at + column, share, mask=column < HALF)
        share = tl.sum(tl.sum(high * scaled(x_high * scale, 1.0, FORM, ROUND), axis=1), axis=0)
        tl.store(share_at + HALF + column, share, mask=column < HALF)
        if REST > 0:
            column = tl.arange(0, BLOCK_REST)
            share = tl.sum(tl.sum(rest * scaled(x_rest * scale, 1.0, FORM, ROUND), axis=1), axis=0)
            tl.store(share_at + 2 * HALF + column, share, mask=column < REST)
    low *= _factor(weight_ptr, head, ZERO, HALF, BLOCK_HALF, HEADS, size, WHOLE, FORM)
    high *= _factor(weight_ptr, head, HALF, HALF, BLOCK_HALF, HEADS, size, WHOLE, FORM)
    if REST > 0:
        rest *= _factor(weight_ptr, head, 2 * HALF, REST, BLOCK_REST, HEADS, size, WHOLE, FORM)
    if FORM == "llama":
        low, high, rest = rounded(low, ROUND), rounded(high, ROUND), rounded(rest, ROUND)
    product = _row_sum(low * x_low, high * x_high, rest * x_rest, REST, WHOLE)
    slope = product * (scale * scale * scale) / count
    at = _rows_at(out_ptr, token, head, length, out_batch_stride, out_head_stride, out_token_stride)
    _store(at, rounded(low * scale - x_low * slope, ROUND), inside, ZERO, HALF, BLOCK_HALF)
    _store(at, rounded(high * scale - x_high * slope, ROUND), inside, HALF, HALF, BLOCK_HALF)
    if REST > 0:
        out = rounded(rest * scale - x_rest * slope, ROUND)
        _store(at, out, inside, 2 * HALF, REST, BLOCK_REST)


@triton.jit(do_not_specialize=["tokens", "length", "q_programs"])
def rotary_norm_gradient_kernel(
    q_grad_ptr, k_grad_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_out_ptr, k_out_ptr,
    q_partial_ptr, k_partial_ptr, cos_ptr, sin_ptr, tokens, length, q_programs,
    q_grad_batch_stride, q_grad_head_stride, q_grad_token_stride,
    k_grad_batch_stride, k_grad_head_stride, k_grad_token_stride,
    q_batch_stride, q_head_stride, q_token_stride,
    k_batch_stride, k_head_stride, k_token_stride,
    q_out_batch_stride, q_out_head_stride, q_out_token_stride,
    k_out_batch_stride, k_out_head_stride, k_out_token_stride,
    cos_batch_stride, cos_token_stride, eps,
    Q_HEADS: tl.constexpr, Q_BLOCK_T: tl.constexpr, Q_BLOCK_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr, K_BLOCK_T: tl.constexpr, K_BLOCK_HEADS: tl.constexpr,
    Q_WEIGHT_GRADIENT: tl.constexpr, K_WEIGHT_GRADIENT: tl.constexpr,
    FORM: tl.constexpr, WHOLE: tl.constexpr, ROUND: tl.constexpr, ROUND_PRODUCT: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Gradients through the rotation and the norms before it; 1/rms is formed again from q, k."""
    block = tl.program_id(0)
    if block < q_programs:
        _norm_gradient_tile(
            block, q_grad_ptr, q_ptr, q_weight_ptr, q_out_ptr, q_partial_ptr, cos_ptr, sin_ptr,
            tokens, length, q_grad_batch_stride, q_grad_head_stride, q_grad_token_stride,
            q_batch_stride, q_head_stride, q_token_stride,
            q_out_batch_stride, q_out_head_stride, q_out_token_stride,
            cos_batch_stride, cos_token_stride, eps, Q_HEADS, Q_BLOCK_T, Q_BLOCK_HEADS,
            FORM, WHOLE, Q_WEIGHT_GRADIENT, ROUND, ROUND_PRODUCT,
            HALF, REST, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        _norm_gradient_tile(
            block - q_programs, k_grad_ptr, k_ptr, k_weight_ptr, k_out_ptr, k_partial_ptr,
            cos_ptr, sin_ptr,
            tokens, length, k_grad_batch_stride, k_grad_head_stride, k_grad_token_stride,
            k_batch_stride, k_head_stride, k_token_stride,
            k_out_batch_stride, k_out_head_stride, k_out_token_stride,
            cos_batch_stride, cos_token_stride, eps, K_HEADS, K_BLOCK_T, K_BLOCK_HEADS,
            FORM, WHOLE, K_WEIGHT_GRADIENT, ROUND, ROUND_PRODUCT,
            HALF, REST, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
