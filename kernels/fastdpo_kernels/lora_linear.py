"""A frozen linear layer, dense or 4-bit, with its LoRA branch as one autograd node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """``x @ W.T + bias + scaling * (drop(x) @ A.T) @ B.T`` of a frozen W, saving only x.

    Args:
        x: (..., in) bf16, fp16, fp32 or fp64.
        weight: (out, in) of x's dtype, or a bitsandbytes `Params4bit`, dequantized on the way in
            the forward and again in the backward. Frozen: it gets no gradient.
        lora_A: (r, in) fp32 (or any float dtype), or None for the layer without adapter.
        lora_B: (out, r), likewise.
        bias: (out,) frozen, or None.
        scaling: factor of the LoRA branch (alpha / r, or alpha / sqrt(r)).
        dropout: probability of zeroing an entry of x before A, in [0, 1). The mask is drawn again
            in the backward from a seed taken from torch's CPU generator.

    Returns:
        (..., out) in x's dtype; differentiable once in x, lora_A and lora_B.

    Raises:
        ValueError: shapes or dtypes disagree, one of lora_A and lora_B is missing, or dropout is
            out of range.

    Numerics: GEMMs in x's dtype; the adapters keep their own (fp32) storage and are cast on the
    way, their gradients are returned in it.

    Source: LoRA, arXiv:2106.09685; NF4, arXiv:2305.14314.
    """
    _validate(x, weight, lora_A, lora_B, dropout)
    seed = int(torch.randint(2**62, ())) if dropout > 0.0 else 0
    return _LoraLinear.apply(x, weight, lora_A, lora_B, bias, scaling, dropout, seed)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., in)
        weight: Tensor,
        lora_A: Tensor | None,  # (r, in)
        lora_B: Tensor | None,  # (out, r)
        bias: Tensor | None,
        scaling: float,
        dropout: float,
        seed: int,
    ) -> Tensor:
        ctx.weight, ctx.scaling, ctx.dropout, ctx.seed = weight, scaling, dropout, seed
        ctx.saves_x = lora_A is not None and any(ctx.needs_input_grad[2:4])
        ctx.save_for_backward(x if ctx.saves_x else None, lora_A, lora_B)
        flat = x.reshape(-1, x.shape[-1])
        out = torch.nn.functional.linear(flat, dense_weight(weight, x.dtype), bias)
        if lora_A is not None and lora_B is not None:
            down = dropped(flat, dropout, seed) @ lora_A.to(x.dtype).T
            out.addmm_(down, lora_B.to(x.dtype).T, alpha=scaling)
        return out.reshape(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        grad_out: Tensor = grad_outputs[0]
        x, lora_A, lora_B = ctx.saved_tensors
        dtype = grad_out.dtype
        flat_grad = grad_out.reshape(-1, grad_out.shape[-1])
        grad_x = grad_A = grad_B = grad_down = None
        if lora_B is not None:
            grad_down = flat_grad @ lora_B.to(dtype) * ctx.scaling  # (N, r)
        if ctx.needs_input_grad[0]:
            grad_x = flat_grad @ dense_weight(ctx.weight, dtype)
            if grad_down is not None:
                branch = grad_down @ lora_A.to(dtype)
                grad_x += dropped(branch, ctx.dropout, ctx.seed)
            grad_x = grad_x.reshape(*grad_out.shape[:-1], grad_x.shape[-1])
        if ctx.saves_x and grad_down is not None:
            inputs = dropped(x.reshape(-1, x.shape[-1]), ctx.dropout, ctx.seed)
            down = inputs @ lora_A.to(dtype).T
            grad_A = (grad_down.T @ inputs).to(lora_A.dtype)
            grad_B = (flat_grad.T @ down * ctx.scaling).to(lora_B.dtype)
        return grad_x, None, grad_A, grad_B, None, None, None, None


def dense_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The (out, in) matrix itself, or what a 4-bit weight stands for, in `dtype`."""
    quant_state = getattr(weight, "quant_state", None)
    if quant_state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, quant_state).to(dtype)


def dropped(rows: Tensor, dropout: float, seed: int) -> Tensor:
    """`rows` under the dropout mask of `seed`, scaled by 1 / (1 - dropout); the same each time."""
    if dropout == 0.0:
        return rows
    generator = torch.Generator(device=rows.device).manual_seed(seed)
    keep = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    keep = keep.uniform_(generator=generator) >= dropout
    return rows * keep * (1.0 / (1.0 - dropout))


def _validate(
    x: Tensor, weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, dropout: float
) -> None:
    quant_state = getattr(weight, "quant_state", None)
    shape = tuple(weight.shape if quant_state is None else quant_state.shape)
    if len(shape) != 2 or x.shape[-1] != shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} does not fit weight {shape}: need (..., {shape[-1]})."
        )
    if quant_state is None and weight.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}: need one dtype; cast x.")
    if (lora_A is None) != (lora_B is None):
        raise ValueError("only one of lora_A and lora_B was given: pass both, or neither.")
    if lora_A is not None and lora_B is not None:
        rank = lora_A.shape[0]
        if tuple(lora_A.shape) != (rank, shape[1]) or tuple(lora_B.shape) != (shape[0], rank):
            raise ValueError(
                f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not fit weight "
                f"{shape}: need (r, {shape[1]}) and ({shape[0]}, r)."
            )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}: need a number in [0, 1).")
