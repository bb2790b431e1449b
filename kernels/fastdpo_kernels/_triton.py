"""The fused log-prob in Triton: the first GEMM and its fold. The same code runs in the interpreter.

Logits live in the base-2 domain, z2 = z * log2(e). A vocabulary tile of a row is stored as
E = 2^(z2 - k) with k a whole number, so that a change of scale is an exact shift of the exponent. k
is one per row, near the target's own z2, and a tile's own only where that would exceed the row's by
2^96; fp16 has too few exponents and takes each tile's own. The target column is left out of every
sum and of E; its logit is kept apart in fp32. Partial sums are combined in a fixed order, never by
atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

MASKED = tl.constexpr(-1e30)
"""Offset of a tile without a single counted column: finite, so that nothing becomes NaN."""

ROOM = tl.constexpr(96.0)
"""A tile keeps the row's offset unless its largest entry exceeds 2^ROOM: sums of entries and their
products with W stay below fp32's 2^128."""

SQUARES_SHRINK = tl.constexpr(2.0**-40)
"""Factor on entries before they are squared: (2^96)^2 would overflow."""

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def round_to_bf16(x):
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


@triton.jit
def _transformed(raw, factor, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr):
    """Raw logits h.W + b to z."""
    if HAS_SOFTCAP:
        z = _tanh(raw * (factor / softcap)) * (softcap * inverse_temperature)
    else:
        z = raw * (factor * inverse_temperature)
    return z


@triton.jit(do_not_specialize=["rows"])
def target_kernel(
    hidden_ptr,  # (N, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,)
    target_ptr,  # (N,) int64
    target_logit_ptr,  # (N,) fp32: z of the target
    reference_ptr,  # (N,) fp32: whole number nearest to the target's z2
    rows,
    hidden_size,
    hidden_stride,
    weight_stride,
    factor,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Each row's target logit and its offset: the dot product of its state with one row of W."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_H)
    in_rows = row < rows
    target = tl.load(target_ptr + row, mask=in_rows, other=0).to(tl.int64)
    hidden_at = hidden_ptr + row.to(tl.int64)[:, None] * hidden_stride
    weight_at = weight_ptr + target[:, None] * weight_stride
    total = tl.zeros((BLOCK_N, BLOCK_H), dtype=tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        column = start + inner
        inside = in_rows[:, None] & (column < hidden_size)[None, :]
        h = tl.load(hidden_at + column[None, :], mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight_at + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += h * w
    raw = tl.sum(total, axis=1)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + target, mask=in_rows, other=0.0).to(tl.float32)
    z = _transformed(raw, factor, softcap, inverse_temperature, HAS_SOFTCAP)
    tl.store(target_logit_ptr + row, z, mask=in_rows)
    finite = tl.minimum(tl.maximum(tl.where(z == z, z, 0.0) * LOG2_E, MASKED), -MASKED)
    tl.store(reference_ptr + row, tl.floor(finite + 0.5), mask=in_rows)


@triton.jit(do_not_specialize=["rows"])
def logits_kernel(
    hidden_ptr,  # (N, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,)
    target_ptr,  # (N,) int64
    reference_ptr,  # (N,) fp32: the row's k
    offset_ptr,  # (tiles, N) fp32: k
    sum_ptr,  # (tiles, N) fp32: sum of 2^(z2 - k)
    exponential_ptr,  # (N, padded V): E
    max_ptr,  # (tiles, N) fp32: largest z, and below: sums of z 2^(z2-k), z, 2^(2 z2 - 2 k)
    weighted_ptr,
    plain_ptr,
    square_ptr,  # times SQUARES_SHRINK twice
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
    ONE_SCALE: tl.constexpr,  # the row's k where it fits, else each tile's own
    STORE_E: tl.constexpr,
    EXTRAS: tl.constexpr,
    EVEN_H: tl.constexpr,
    E_SCALE: tl.constexpr,
    EMULATE_BF16: tl.constexpr,  # the interpreter: upcast before the dot, round by hand
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PART_V: tl.constexpr,  # columns of a statistics tile: BLOCK_V or its half
    GROUP: tl.constexpr,
):
    """Z = transform(h @ W.T); one program = BLOCK_N rows x BLOCK_V columns of the vocabulary."""
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
    # The accumulator is worked off in parts: the whole at once would not fit the registers.
    PARTS: tl.constexpr = BLOCK_V // PART_V
    if PARTS == 2:
        halves = tl.permute(tl.reshape(raw, (BLOCK_N, 2, PART_V)), (0, 2, 1))
        first, second = tl.split(halves)
    else:
        first, second = raw, raw
    for part in tl.static_range(PARTS):
        if (tile * PARTS + part) * PART_V < vocabulary:
            _work_off(
                first if part == 0 else second,
                tile * PARTS + part,
                row_start,
                bias_ptr,
                target_ptr,
                reference_ptr,
                offset_ptr,
                sum_ptr,
                exponential_ptr,
                max_ptr,
                weighted_ptr,
                plain_ptr,
                square_ptr,
                rows,
                vocabulary,
                exponential_stride,
                factor,
                softcap,
                inverse_temperature,
                HAS_BIAS,
                HAS_SOFTCAP,
                ONE_SCALE,
                STORE_E,
                EXTRAS,
                E_SCALE,
                EMULATE_BF16,
                BLOCK_N,
                PART_V,
            )


@triton.jit
def _work_off(
    raw,  # (BLOCK_N, PART_V) fp32: h @ W.T
    tile,  # statistics tile: columns from tile * PART_V on
    row_start,
    bias_ptr,
    target_ptr,
    reference_ptr,
    offset_ptr,
    sum_ptr,
    exponential_ptr,
    max_ptr,
    weighted_ptr,
    plain_ptr,
    square_ptr,
    rows,
    vocabulary,
    exponential_stride,
    factor,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ONE_SCALE: tl.constexpr,
    STORE_E: tl.constexpr,
    EXTRAS: tl.constexpr,
    E_SCALE: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART_V: tl.constexpr,
):
    """Statistics and E of one part of the accumulator."""
    # 64-bit scalars, 32-bit inside the tile: everything that lives per entry costs registers.
    column_start = tile * PART_V
    row = tl.arange(0, BLOCK_N)
    column = tl.arange(0, PART_V)
    in_rows = row < rows - row_start.to(tl.int32)
    in_vocabulary = column < vocabulary - column_start
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column_start + column, mask=in_vocabulary, other=0.0)
        raw += bias.to(tl.float32)[None, :]
    z = _transformed(raw, factor, softcap, inverse_temperature, HAS_SOFTCAP)
    partial = tile.to(tl.int64) * rows + row_start
    target = tl.load(target_ptr + row_start + row, mask=in_rows, other=-1).to(tl.int32)
    at_target = target - column_start
    is_target = column[None, :] == at_target[:, None]
    counted = in_vocabulary[None, :] & (is_target == 0)
    z = tl.where(counted, z, MASKED)
    largest = tl.max(z, axis=1)
    offset = tl.floor(tl.maximum(largest * LOG2_E, MASKED) + 0.5)
    if ONE_SCALE:
        reference = tl.load(reference_ptr + row_start + row, mask=in_rows, other=0.0)
        offset = tl.where(offset - reference <= ROOM, reference, offset)
    exponential = tl.exp2(z * LOG2_E - offset[:, None])
    tl.store(offset_ptr + partial + row, offset, mask=in_rows)
    tl.store(sum_ptr + partial + row, tl.sum(exponential, axis=1), mask=in_rows)
    if EXTRAS:
        tl.store(max_ptr + partial + row, largest, mask=in_rows)
        plain = tl.sum(tl.where(z != MASKED, z, 0.0), axis=1)
        tl.store(plain_ptr + partial + row, plain, mask=in_rows)
        weighted = tl.where(exponential > 0, exponential * z, 0.0)
        tl.store(weighted_ptr + partial + row, tl.sum(weighted, axis=1), mask=in_rows)
        small = exponential * SQUARES_SHRINK
        tl.store(square_ptr + partial + row, tl.sum(small * small, axis=1), mask=in_rows)
    if STORE_E:
        kept = exponential * E_SCALE
        if HAS_SOFTCAP:
            capped = z / (softcap * inverse_temperature)
            kept = tl.where(kept > 0, kept * (1.0 - capped * capped), 0.0)  # masked: infinite
        if EMULATE_BF16:
            kept = round_to_bf16(kept)
        at = exponential_ptr + row_start * exponential_stride + column_start
        at = at + (row[:, None] * exponential_stride + column[None, :])
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
    max_ptr,  # (tiles, N) fp32, and the three below
    weighted_ptr,
    plain_ptr,
    square_ptr,
    row_moment_ptr,  # (4, N) fp64: of the row, in that order, squares without their factor
    rows,
    tiles,
    moment_stride,
    EXTRAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Partial sums to log-probs, in fp64, AT_ONCE tiles at a time; one program = BLOCK_N rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    step = tl.arange(0, AT_ONCE)
    largest = tl.full((BLOCK_N,), MASKED, dtype=tl.float32)
    for start in range(0, tiles, AT_ONCE):
        mask = (start + step < tiles)[:, None] & inside[None, :]
        at = (start + step).to(tl.int64)[:, None] * rows + row[None, :]
        offset = tl.load(offset_ptr + at, mask=mask, other=MASKED)
        largest = tl.maximum(largest, tl.max(offset, axis=0))
    total = tl.zeros((BLOCK_N,), dtype=tl.float64)
    highest = tl.full((BLOCK_N,), MASKED, dtype=tl.float32)
    weighted = tl.zeros((BLOCK_N,), dtype=tl.float64)
    plain = tl.zeros((BLOCK_N,), dtype=tl.float64)
    squares = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for start in range(0, tiles, AT_ONCE):
        mask = (start + step < tiles)[:, None] & inside[None, :]
        at = (start + step).to(tl.int64)[:, None] * rows + row[None, :]
        offset = tl.load(offset_ptr + at, mask=mask, other=MASKED)
        shift = tl.exp2(offset - largest[None, :])
        partial = tl.load(sum_ptr + at, mask=mask, other=0.0) * shift
        total += tl.sum(partial.to(tl.float64), axis=0)
        if EXTRAS:
            z = tl.load(max_ptr + at, mask=mask, other=MASKED)
            highest = tl.maximum(highest, tl.max(z, axis=0))
            z = tl.load(weighted_ptr + at, mask=mask, other=0.0) * shift
            weighted += tl.sum(z.to(tl.float64), axis=0)
            z = tl.load(plain_ptr + at, mask=mask, other=0.0)
            plain += tl.sum(z.to(tl.float64), axis=0)
            z = tl.load(square_ptr + at, mask=mask, other=0.0) * shift * shift
            squares += tl.sum(z.to(tl.float64), axis=0)
    if EXTRAS:
        tl.store(row_moment_ptr + row, highest.to(tl.float64), mask=inside)
        tl.store(row_moment_ptr + moment_stride + row, weighted, mask=inside)
        tl.store(row_moment_ptr + 2 * moment_stride + row, plain, mask=inside)
        squares = squares / SQUARES_SHRINK / SQUARES_SHRINK
        tl.store(row_moment_ptr + 3 * moment_stride + row, squares, mask=inside)
    tl.store(row_offset_ptr + row, largest, mask=inside)
    tl.store(row_sum_ptr + row, total.to(tl.float32), mask=inside)
    total = tl.where(total == 0.0, 1e-300, total)  # the target is the only column: p is 1
    target = tl.load(target_logit_ptr + row, mask=inside, other=0.0).to(tl.float64)
    ratio = largest.to(tl.float64) * LN_2 + tl.log(total) - target  # d = lse of the others - z_t
    decay = tl.exp(-tl.abs(ratio))
    logp = -(tl.maximum(ratio, 0.0) + tl.log(1.0 + decay))
    logp = tl.where(decay < 1e-5, -(tl.maximum(ratio, 0.0) + decay), logp)  # log1p where 1 + x is 1
    mass = tl.where(ratio < 0, decay, 1.0) / (1.0 + decay)
    tl.store(logp_ptr + row, logp.to(tl.float32), mask=inside)
    tl.store(mass_ptr + row, mass.to(tl.float32), mask=inside)


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
