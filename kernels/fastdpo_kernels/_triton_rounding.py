"""Rounding inside a kernel, as eager code rounds between two ops. Jit code only."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(x, ROUND: tl.constexpr):
    """fp32 rounded to the nearest value of the dtype that ROUND names, kept in fp32."""
    if ROUND == "bf16":
        return x.to(tl.bfloat16).to(tl.float32)
    elif ROUND == "fp16":
        return x.to(tl.float16).to(tl.float32)
    elif ROUND == "bf16 by hand":  # ties to even; the interpreter's own cast truncates
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    else:
        return x
