"""The gradient U = dlogp/dh in Triton: bringing E to one scale, the second GEMM, and U itself."""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton import round_to_bf16


@triton.jit(do_not_specialize=["rows", "tiles"])
def rescale_kernel(
    exponential_ptr,  # (N, padded V): E, rewritten
    reference_ptr,  # (N,) fp32: k of a row that needs nothing
    offset_ptr,  # (tiles, N) fp32: k
    row_offset_ptr,  # (N,) fp32: the largest k of the row
    rows,
    tiles,
    exponential_stride,
    EMULATE_BF16: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Brings rows with tiles on a scale of their own to the row's largest; one program a row.

    Every other row is left untouched: a tile's own k is above its row's, so the largest tells.
    """
    row = tl.program_id(0).to(tl.int64)
    row_offset = tl.load(row_offset_ptr + row)
    if row_offset != tl.load(reference_ptr + row):
        at = exponential_ptr + row * exponential_stride + tl.arange(0, BLOCK_V)
        for tile in range(0, tiles):
            shift = tl.exp2(tl.load(offset_ptr + tile * rows + row) - row_offset)
            if shift != 1.0:
                e = tl.load(at + tile * BLOCK_V).to(tl.float32) * shift
                if EMULATE_BF16:
                    e = round_to_bf16(e)
                tl.store(at + tile * BLOCK_V, e.to(exponential_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["rows", "tiles"])
def gradient_kernel(
    exponential_ptr,  # (N, padded V): E
    weight_ptr,  # (V, H)
    exponential_desc,  # the same two as TMA descriptors of (BLOCK_N, BLOCK_K), (BLOCK_K, BLOCK_H)
    weight_desc,
    target_ptr,  # (N,) int64
    target_logit_ptr,  # (N,) fp32
    offset_ptr,  # (tiles, N) fp32
    row_offset_ptr,  # (N,) fp32
    row_sum_ptr,  # (N,) fp32
    mass_ptr,  # (N,) fp32
    wanted_ptr,  # (row blocks, tiles) int32: the tiles to sum, in order
    wanted_count_ptr,  # (row blocks,) int32
    gradient_ptr,  # (N, H): U = dlogp / dh
    rows,
    vocabulary,
    hidden_size,
    tiles,
    exponential_stride,
    weight_stride,
    gradient_stride,
    constant,  # factor * inverse temperature
    softcap,
    inverse_temperature,
    HAS_SOFTCAP: tl.constexpr,
    SKIPS: tl.constexpr,  # only the wanted tiles
    SHIFTS: tl.constexpr,  # every tile is on a scale of its own
    TMA: tl.constexpr,
    EVEN_H: tl.constexpr,
    E_SCALE: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    ROUND_OUTPUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,  # columns of a statistics tile
    BLOCK_K: tl.constexpr,
):
    """U = constant (1 - p) (slope_t W_t - E @ W / s); one program = BLOCK_N rows x BLOCK_H."""
    STEPS: tl.constexpr = BLOCK_V // BLOCK_K
    row_block = tl.program_id(0)
    row_start = row_block.to(tl.int64) * BLOCK_N
    hidden_start = tl.program_id(1) * BLOCK_H
    row = tl.arange(0, BLOCK_N)
    row_inside = tl.minimum(row, (rows - 1 - row_start).to(tl.int32))
    row_at = row_start + row_inside
    inner = tl.arange(0, BLOCK_K)
    h = hidden_start + tl.arange(0, BLOCK_H)
    in_hidden = h < hidden_size  # a mask: a clamp on this axis would make loads two bytes wide
    e_at = exponential_ptr + row_start * exponential_stride
    e_at = e_at + row_inside[:, None].to(tl.int64) * exponential_stride + inner[None, :]
    row_offset = tl.load(row_offset_ptr + row_at)
    count = tl.load(wanted_count_ptr + row_block) if SKIPS else tiles
    total = tl.zeros((BLOCK_N, BLOCK_H), dtype=tl.float32)
    for step in range(0, count * STEPS):  # one loop over V: its loads run ahead across tiles
        column = step * BLOCK_K
        if SKIPS:
            place = step // STEPS
            tile = tl.load(wanted_ptr + row_block * tiles + place)
            column = tile * BLOCK_V + (step - place * STEPS) * BLOCK_K
        if TMA:
            e = exponential_desc.load([row_block * BLOCK_N, column])
            w = weight_desc.load([column, hidden_start])  # zeros beyond the vocabulary
        else:
            e = tl.load(e_at + column)
            v = tl.minimum(inner, vocabulary - 1 - column)  # E is 0 beyond the vocabulary
            w_at = weight_ptr + tl.cast(column, tl.int64) * weight_stride
            w_at = w_at + v[:, None] * weight_stride + h[None, :]
            w = tl.load(w_at) if EVEN_H else tl.load(w_at, mask=in_hidden[None, :], other=0.0)
        if EMULATE_BF16:
            e = e.to(tl.float32)
            w = w.to(tl.float32)
        if SHIFTS:  # after the product: both operands come straight from shared memory
            offset = tl.load(offset_ptr + column // BLOCK_V * rows + row_at)
            shift = tl.exp2(offset - row_offset)
            total += tl.dot(e, w, input_precision=PRECISION) * shift[:, None]
        else:
            total = tl.dot(e, w, total, input_precision=PRECISION)
    mass = tl.load(mass_ptr + row_at)
    share = mass / tl.maximum(tl.load(row_sum_ptr + row_at), 1e-37) / E_SCALE
    slope = mass
    if HAS_SOFTCAP:
        slope *= _slope(tl.load(target_logit_ptr + row_at), softcap, inverse_temperature)
    toward_at = weight_ptr + tl.load(target_ptr + row_at)[:, None] * weight_stride + h[None, :]
    toward = tl.load(toward_at, mask=in_hidden[None, :], other=0.0).to(tl.float32)
    gradient = (slope[:, None] * toward - total * share[:, None]) * constant
    if ROUND_OUTPUT:
        gradient = round_to_bf16(gradient)
    out = gradient_ptr + row_start * gradient_stride
    out = out + (row[:, None] * gradient_stride + h[None, :])
    kept = (row_start + row < rows)[:, None] & in_hidden[None, :]
    tl.store(out, gradient.to(gradient_ptr.dtype.element_ty), mask=kept)


@triton.jit
def finish_kernel(
    product_ptr,  # (N, H) fp32, contiguous: E @ W
    weight_ptr,  # (V, H)
    target_ptr,  # (N,) int64
    target_logit_ptr,  # (N,) fp32
    row_sum_ptr,  # (N,) fp32
    mass_ptr,  # (N,) fp32
    gradient_ptr,  # (N, H): U = dlogp / dh
    hidden_size,
    weight_stride,
    gradient_stride,
    constant,  # factor * inverse temperature
    softcap,
    inverse_temperature,
    HAS_SOFTCAP: tl.constexpr,
    E_SCALE: tl.constexpr,
    ROUND_OUTPUT: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """U = constant (1 - p) (slope_t W_t - E @ W / s) from the product; one program = BLOCK_H."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = h < hidden_size
    mass = tl.load(mass_ptr + row)
    share = mass / tl.maximum(tl.load(row_sum_ptr + row), 1e-37) / E_SCALE
    slope = mass
    if HAS_SOFTCAP:
        slope *= _slope(tl.load(target_logit_ptr + row), softcap, inverse_temperature)
    total = tl.load(product_ptr + row * hidden_size + h, mask=inside, other=0.0)
    toward = weight_ptr + tl.load(target_ptr + row) * weight_stride + h
    gradient = slope * tl.load(toward, mask=inside, other=0.0).to(tl.float32) - total * share
    gradient = gradient * constant
    if ROUND_OUTPUT:
        gradient = round_to_bf16(gradient)
    out = gradient_ptr + row * gradient_stride + h
    tl.store(out, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _slope(z, softcap, inverse_temperature):
    """Slope dz / d(h.W) of the softcap alone, without the constant."""
    capped = z / (softcap * inverse_temperature)
    return 1.0 - capped * capped
