"""RMSNorm in Triton, alone or with the residual sum before it. Jit code only.

One program = BLOCK_N whole rows. Values are rounded where the family's eager module rounds them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_rounding import rounded


@triton.jit
def norm_weight(weight_ptr, column, inside, FORM: tl.constexpr):
    """Load the factor of the normalized rows, fp32."""
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if FORM == "gemma":
        weight += 1.0
    return weight


@triton.jit
def scaled(normalized, weight, FORM: tl.constexpr, ROUND: tl.constexpr):
    """The normalized rows times the weight, in the order of casts of the form; fp32."""
    if FORM == "llama":
        normalized = rounded(normalized, ROUND)
    return normalized * weight


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x_ptr,  # (N, H)
    residual_ptr,  # (N, H)
    weight_ptr,  # (H,)
    out_ptr,  # (N, H) contiguous
    sum_ptr,  # (N, H) contiguous: x + residual
    inverse_rms_ptr,  # (N,) fp32
    mean_ptr,  # (N,) fp32
    rows,
    x_stride,
    residual_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    CENTERED: tl.constexpr,
    FORM: tl.constexpr,
    ROUND: tl.constexpr,  # to the dtype of x
    ROUND_OUT: tl.constexpr,  # to the dtype of out
    HIDDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_H)
    in_rows = row < rows
    in_columns = column < HIDDEN
    inside = in_rows[:, None] & in_columns[None, :]
    dense = row[:, None] * HIDDEN + column[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    if HAS_RESIDUAL:
        at = residual_ptr + row[:, None] * residual_stride + column[None, :]
        x = rounded(x + tl.load(at, mask=inside, other=0.0).to(tl.float32), ROUND)
        tl.store(sum_ptr + dense, x, mask=inside)
    if CENTERED:
        mean = tl.sum(x, axis=1) / HIDDEN
        tl.store(mean_ptr + row, mean, mask=in_rows)
        x = tl.where(in_columns[None, :], x - mean[:, None], 0.0)
    inverse_rms = tl.rsqrt(tl.sum(x * x, axis=1) / HIDDEN + eps)
    tl.store(inverse_rms_ptr + row, inverse_rms, mask=in_rows)
    weight = norm_weight(weight_ptr, column, in_columns, FORM)
    out = scaled(x * inverse_rms[:, None], weight[None, :], FORM, ROUND)
    tl.store(out_ptr + dense, rounded(out, ROUND_OUT), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_gradient_kernel(
    grad_out_ptr,  # (N, H)
    grad_sum_ptr,  # (N, H): of the sum, where it is an output
    x_ptr,  # (N, H): what was normalized
    weight_ptr,  # (H,)
    inverse_rms_ptr,  # (N,) fp32
    mean_ptr,  # (N,) fp32
    grad_x_ptr,  # (N, H) contiguous
    partial_ptr,  # (programs, H) fp32: gradient of the weight
    rows,
    grad_out_stride,
    grad_sum_stride,
    x_stride,
    HAS_GRAD_SUM: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr,
    CENTERED: tl.constexpr,
    FORM: tl.constexpr,
    ROUND: tl.constexpr,  # to the dtype of x
    HIDDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One program = STEPS tiles of BLOCK_N rows, whose share of the weight's gradient it sums."""
    column = tl.arange(0, BLOCK_H)
    in_columns = column < HIDDEN
    weight = norm_weight(weight_ptr, column, in_columns, FORM)[None, :]
    share = tl.zeros((BLOCK_N, BLOCK_H), dtype=tl.float32)
    for step in range(STEPS):
        tile = tl.program_id(0).to(tl.int64) * STEPS + step
        row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        in_rows = row < rows
        inside = in_rows[:, None] & in_columns[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
        at = grad_out_ptr + row[:, None] * grad_out_stride + column[None, :]
        grad = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        inverse_rms = tl.load(inverse_rms_ptr + row, mask=in_rows, other=0.0)[:, None]
        x = x.to(tl.float32)
        if CENTERED:
            mean = tl.load(mean_ptr + row, mask=in_rows, other=0.0)[:, None]
            x = tl.where(in_columns[None, :], x - mean, 0.0)
        if WEIGHT_GRADIENT:
            share += grad * scaled(x * inverse_rms, 1.0, FORM, ROUND)
        grad = grad * weight
        if FORM == "llama":
            grad = rounded(grad, ROUND)
        product = tl.sum(grad * x, axis=1, keep_dims=True)
        slope = product * (inverse_rms * inverse_rms * inverse_rms) / HIDDEN
        grad_x = grad * inverse_rms - x * slope
        if CENTERED:
            counted = tl.where(in_columns[None, :], grad_x, 0.0)
            grad_x -= tl.sum(counted, axis=1, keep_dims=True) / HIDDEN
        grad_x = rounded(grad_x, ROUND)
        if HAS_GRAD_SUM:
            at = grad_sum_ptr + row[:, None] * grad_sum_stride + column[None, :]
            grad_x += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            grad_x = rounded(grad_x, ROUND)
        tl.store(grad_x_ptr + row[:, None] * HIDDEN + column[None, :], grad_x, mask=inside)
    if WEIGHT_GRADIENT:
        at = partial_ptr + tl.program_id(0).to(tl.int64) * HIDDEN + column
        tl.store(at, tl.sum(share, axis=0), mask=in_columns)
