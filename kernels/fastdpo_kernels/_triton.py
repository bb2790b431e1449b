"""The fused log-prob in Triton: the only file with jit code. The same code runs in the interpreter.

Logits live in the base-2 domain, z2 = z * log2(e). A vocabulary tile of a row is stored as
E = 2^(z2 - k) with k a whole number per (row, tile), so that rescaling to the row's own offset is
an exact shift of the exponent. The target column is left out of every sum and of E; its logit is
kept apart in fp32. Partial sums are combined in a fixed order, never by atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

MASKED = tl.constexpr(-1e30)
"""Offset of a tile without a single counted column: finite, so that nothing becomes NaN."""

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _round_to_bf16(x):
    """Round fp32 to the nearest bf16, ties to even, kept in fp32: the interpreter truncates."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def _tanh(x):
    """Odd and monotone; absolute error below 2e-7."""
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    square = x * x
    near = tl.abs(x) * (1.0 - square * (0.33333333 - square * (0.13333333 - square * 0.053968254)))
    size = tl.where(tl.abs(x) < 0.2, near, far)
    return tl.where(x < 0, -size, size)


@triton.jit(do_not_specialize=["rows"])
def logits_kernel(
    hidden_ptr,  # (N, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,)
    target_ptr,  # (N,) int64
    offset_ptr,  # (tiles, N) fp32: k
    sum_ptr,  # (tiles, N) fp32: sum of 2^(z2 - k)
    target_logit_ptr,  # (N,) fp32: z of the target
    exponential_ptr,  # (N, padded V): E
    max_ptr,  # (tiles, N) fp32: largest z, and below: sums of z 2^(z2-k), z, 2^(2 z2 - 2 k)
    weighted_ptr,
    plain_ptr,
    square_ptr,
    rows,
    vocabulary,
    hidden_size,
    hidden_stride,
    weight_stride,
    exponential_stride,
    factor,  # z = softcapped(factor * (h.W + b)) * inverse_temperature
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STORE_E: tl.constexpr,
    EXTRAS: tl.constexpr,
    EVEN_H: tl.constexpr,
    E_SCALE: tl.constexpr,
    EMULATE_BF16: tl.constexpr,  # the interpreter: upcast before the dot, round by hand
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Z = transform(h @ W.T); one program = BLOCK_N rows x one vocabulary tile of BLOCK_V."""
    row_tile, tile = _swizzled(tl.program_id(0), rows, vocabulary, BLOCK_N, BLOCK_V, GROUP)
    row_start = row_tile.to(tl.int64) * BLOCK_N
    column_start = tile.to(tl.int64) * BLOCK_V
    row = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_V)
    inner = tl.arange(0, BLOCK_H)
    # Clamped, not masked: fewer registers, and what lies outside is never stored or counted.
    row_inside = tl.minimum(row, (rows - 1 - row_start).to(tl.int32))
    column_inside = tl.minimum(column, (vocabulary - 1 - column_start).to(tl.int32))
    hidden_at = hidden_ptr + row_start * hidden_stride + row_inside[:, None] * hidden_stride
    weight_at = weight_ptr + column_start * weight_stride + column_inside[None, :] * weight_stride
    raw = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        if EVEN_H:
            h = tl.load(hidden_at + (start + inner)[None, :])
            w = tl.load(weight_at + (start + inner)[:, None])
        else:
            inside = start + inner < hidden_size
            h = tl.load(hidden_at + (start + inner)[None, :], mask=inside[None, :], other=0.0)
            w = tl.load(weight_at + (start + inner)[:, None], mask=inside[:, None], other=0.0)
        if EMULATE_BF16:
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        raw = tl.dot(h, w, raw, input_precision=PRECISION)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + column_start + column_inside).to(tl.float32)[None, :]
    z = raw * factor
    if HAS_SOFTCAP:
        z = _tanh(z / softcap) * softcap
    z = z * inverse_temperature

    in_rows = row_start + row < rows
    target = tl.load(target_ptr + row_start + row_inside) - column_start
    is_target = column[None, :] == target[:, None]
    holds_target = (target >= 0) & (target < BLOCK_V) & in_rows
    target_z = tl.sum(tl.where(is_target, z, 0.0), axis=1)
    tl.store(target_logit_ptr + row_start + row, target_z, mask=holds_target)
    counted = (column_start + column < vocabulary)[None, :] & (is_target == 0)
    largest = tl.max(tl.where(counted, z, MASKED), axis=1)
    offset = tl.floor(tl.maximum(largest * LOG2_E, MASKED) + 0.5)
    partial = tile.to(tl.int64) * rows + row_start + row
    if EXTRAS:  # what needs z alone goes first: registers are short here
        tl.store(max_ptr + partial, largest, mask=in_rows)
        tl.store(plain_ptr + partial, tl.sum(tl.where(counted, z, 0.0), axis=1), mask=in_rows)
    exponential = tl.where(counted, tl.exp2(z * LOG2_E - offset[:, None]), 0.0)
    tl.store(offset_ptr + partial, offset, mask=in_rows)
    tl.store(sum_ptr + partial, tl.sum(exponential, axis=1), mask=in_rows)
    if EXTRAS:
        weighted = tl.where(exponential > 0, exponential * z, 0.0)
        tl.store(weighted_ptr + partial, tl.sum(weighted, axis=1), mask=in_rows)
        tl.store(square_ptr + partial, tl.sum(exponential * exponential, axis=1), mask=in_rows)
    if STORE_E:
        kept = exponential * E_SCALE
        if HAS_SOFTCAP:
            capped = z / (softcap * inverse_temperature)
            kept = kept * (1.0 - capped * capped)
        if EMULATE_BF16:
            kept = _round_to_bf16(kept)
        at = exponential_ptr + row_start * exponential_stride + column_start
        at = at + row[:, None].to(tl.int64) * exponential_stride + column[None, :]
        tl.store(at, kept.to(exponential_ptr.dtype.element_ty), mask=in_rows[:, None])


@triton.jit(do_not_specialize=["rows", "tiles"])
def combine_kernel(
    offset_ptr,  # (tiles, N) fp32
    sum_ptr,  # (tiles, N) fp32
    target_logit_ptr,  # (N,) fp32
    row_offset_ptr,  # (N,) fp32: the largest k of the row
    row_sum_ptr,  # (N,) fp32: sum of 2^(z2 - k) over the row
    logp_ptr,  # (N,) fp32
    mass_ptr,  # (N,) fp32: 1 - p of the target
    rows,
    tiles,
    BLOCK: tl.constexpr,
):
    """Partial sums to log-probs, in fp64, tile by tile; one program = BLOCK rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    largest = tl.full((BLOCK,), MASKED, dtype=tl.float32)
    for tile in range(0, tiles):
        offset = tl.load(offset_ptr + tile * rows + row, mask=inside, other=MASKED)
        largest = tl.maximum(largest, offset)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for tile in range(0, tiles):
        at = tile * rows + row
        offset = tl.load(offset_ptr + at, mask=inside, other=MASKED)
        partial = tl.load(sum_ptr + at, mask=inside, other=0.0)
        total += (partial * tl.exp2(offset - largest)).to(tl.float64)
    total = tl.where(total == 0.0, 1e-300, total)  # the target is the only column: p is 1
    target = tl.load(target_logit_ptr + row, mask=inside, other=0.0).to(tl.float64)
    ratio = largest.to(tl.float64) * LN_2 + tl.log(total) - target  # d = lse of the others - z_t
    decay = tl.exp(-tl.abs(ratio))
    logp = -(tl.maximum(ratio, 0.0) + tl.log(1.0 + decay))
    logp = tl.where(decay < 1e-5, -(tl.maximum(ratio, 0.0) + decay), logp)  # log1p where 1 + x is 1
    mass = tl.where(ratio < 0, decay, 1.0) / (1.0 + decay)
    tl.store(row_offset_ptr + row, largest, mask=inside)
    tl.store(row_sum_ptr + row, total.to(tl.float32), mask=inside)
    tl.store(logp_ptr + row, logp.to(tl.float32), mask=inside)
    tl.store(mass_ptr + row, mass.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["rows", "tiles"])
def gradient_kernel(
    exponential_ptr,  # (N, padded V): E
    weight_ptr,  # (V, H)
    target_ptr,  # (N,) int64
    offset_ptr,  # (tiles, N) fp32
    sum_ptr,  # (tiles, N) fp32
    row_offset_ptr,  # (N,) fp32
    row_sum_ptr,  # (N,) fp32
    mass_ptr,  # (N,) fp32
    target_slope_ptr,  # (N,) fp32: dz / d(h.W) of the target, without the constant
    gradient_ptr,  # (N, H): U = dlogp / dh
    rows,
    vocabulary,
    hidden_size,
    tiles,
    exponential_stride,
    weight_stride,
    gradient_stride,
    constant,  # factor * inverse temperature
    skip_mass,  # most probability mass that a row may drop
    SKIPS: tl.constexpr,
    EVEN_H: tl.constexpr,
    E_SCALE: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    ROUND_OUTPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,  # of the logits kernel: one offset holds for this many columns
    BLOCK_K: tl.constexpr,
):
    """U = constant (1 - p) (slope_t W_t - E @ W / s); one program = BLOCK_N rows x BLOCK_H."""
    row_start = tl.program_id(0).to(tl.int64) * BLOCK_N
    hidden_start = tl.program_id(1) * BLOCK_H
    row = tl.arange(0, BLOCK_N)
    row_inside = tl.minimum(row, (rows - 1 - row_start).to(tl.int32))
    inner = tl.arange(0, BLOCK_K)
    h = hidden_start + tl.arange(0, BLOCK_H)
    # Masked, not clamped: a clamp on the contiguous axis makes every load two bytes wide.
    in_hidden = h < hidden_size
    row_at = row_start + row_inside
    row_offset = tl.load(row_offset_ptr + row_at)
    row_sum = tl.load(row_sum_ptr + row_at)
    mass = tl.load(mass_ptr + row_at)
    share = mass / tl.maximum(row_sum, 1e-37)
    e_at = exponential_ptr + row_at[:, None] * exponential_stride
    dropped = tl.zeros((BLOCK_N,), dtype=tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_H), dtype=tl.float32)
    for tile in range(0, tiles):
        partial = tile * rows + row_at
        shift = tl.exp2(tl.load(offset_ptr + partial) - row_offset)
        wanted = True
        if SKIPS:
            would_drop = dropped + tl.load(sum_ptr + partial) * shift * share
            wanted = tl.max(would_drop, axis=0) > skip_mass
            dropped = tl.where(wanted, dropped, would_drop)
        if wanted:
            for start in range(0, BLOCK_V, BLOCK_K):
                column = (tile * BLOCK_V + start + inner).to(tl.int64)
                e = tl.load(e_at + column[None, :]).to(tl.float32) * shift[:, None]
                v = tl.minimum(column, vocabulary - 1)  # E is 0 beyond the vocabulary
                w_at = weight_ptr + v[:, None] * weight_stride + h[None, :]
                w = tl.load(w_at) if EVEN_H else tl.load(w_at, mask=in_hidden[None, :], other=0.0)
                if EMULATE_BF16:
                    w = w.to(tl.float32)
                total = tl.dot(e.to(w.dtype), w, total, input_precision=PRECISION)
    target = tl.load(target_ptr + row_at)
    toward_at = weight_ptr + target[:, None] * weight_stride + h[None, :]
    toward = tl.load(toward_at, mask=in_hidden[None, :], other=0.0)
    slope = tl.load(target_slope_ptr + row_at) * mass
    gradient = slope[:, None] * toward.to(tl.float32) - total * (share / E_SCALE)[:, None]
    gradient = gradient * constant
    if ROUND_OUTPUT:
        gradient = _round_to_bf16(gradient)
    out = gradient_ptr + (row_start + row)[:, None] * gradient_stride + h[None, :]
    kept = (row_start + row < rows)[:, None] & in_hidden[None, :]
    tl.store(out, gradient.to(gradient_ptr.dtype.element_ty), mask=kept)


@triton.jit
def _swizzled(
    program, rows, vocabulary, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr
):
    """Row tile and vocabulary tile of a program: GROUP row tiles share the same columns in L2."""
    row_tiles = tl.cdiv(rows, BLOCK_N)
    per_group = GROUP * tl.cdiv(vocabulary, BLOCK_V)
    first = (program // per_group) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    return first + (program % per_group) % size, (program % per_group) // size
