"""act(gate) * up in Triton, forward and backward. Jit code only.

One program = BLOCK columns of one row. exp is the hardware's, so values may differ from torch's
before they are rounded by 2e-7 of themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_rounding import rounded


@triton.jit
def _sigmoid(x):
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    """Absolute error below 2e-7, and rounded like the true one near 1."""
    decay = tl.exp(-2.0 * tl.abs(x))
    far = tl.div_rn(1.0 - decay, 1.0 + decay)
    square = x * x
    near = tl.abs(x) * (1.0 - square * (0.33333333 - square * (0.13333333 - square * 0.053968254)))
    size = tl.where(tl.abs(x) < 0.2, near, far)
    return tl.where(x < 0, -size, size)


@triton.jit
def _activated(x, KIND: tl.constexpr):
    """act(x) in fp32."""
    if KIND == "silu":
        return tl.div_rn(x, 1.0 + tl.exp(-x))
    elif KIND == "gelu_tanh":
        return 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * (x * x * x))))
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _slope(x, KIND: tl.constexpr):
    """dact/dx in fp32."""
    if KIND == "silu":
        share = _sigmoid(x)
        return share * (1.0 + x * (1.0 - share))
    elif KIND == "gelu_tanh":
        tanh = _tanh(0.7978845608028654 * (x + 0.044715 * (x * x * x)))
        inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * (x * x))
        return 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * inner
    else:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density


@triton.jit
def gated_activation_kernel(
    gate_ptr,  # (N, I)
    up_ptr,  # (N, I)
    out_ptr,  # (N, I) contiguous
    gate_stride,
    up_stride,
    KIND: tl.constexpr,
    ROUND: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < COLUMNS
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    out = rounded(rounded(_activated(gate, KIND), ROUND) * up, ROUND)
    tl.store(out_ptr + row * COLUMNS + column, out, mask=inside)


@triton.jit
def gated_activation_gradient_kernel(
    grad_ptr,  # (N, I)
    gate_ptr,  # (N, I)
    up_ptr,  # (N, I)
    grad_gate_ptr,  # (N, I): may be gate_ptr
    grad_up_ptr,  # (N, I): may be up_ptr
    grad_stride,
    gate_stride,
    up_stride,
    grad_gate_stride,
    grad_up_stride,
    KIND: tl.constexpr,
    ROUND: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < COLUMNS
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    grad_up = rounded(grad * rounded(_activated(gate, KIND), ROUND), ROUND)
    grad_gate = rounded(rounded(grad * up, ROUND) * _slope(gate, KIND), ROUND)
    tl.store(grad_gate_ptr + row * grad_gate_stride + column, grad_gate, mask=inside)
    tl.store(grad_up_ptr + row * grad_up_stride + column, grad_up, mask=inside)
