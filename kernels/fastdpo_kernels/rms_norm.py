"""RMSNorm of Llama and its relatives, alone or with the residual sum before it: one pass over x."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._backend import is_small, next_power_of_two, rounding, row_tiles, uses_triton
from ._rows import RowOrder

FORMS = ("llama", "olmo2", "gemma")
MAX_HIDDEN, MAX_TRAINED = 16384, 8192
"""Widest row that a program of the Triton kernels holds without spills, and with the gradient of
the weight; wider ones run the torch twin."""

EAGER_BELOW = 2**18
"""Numbers in x below which plain autograd is the faster on the CPU; four times that to score."""

STEPS = 32
"""Row tiles whose share of the weight's gradient one program sums."""


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    residual: None = None,
    form: str = "llama",
    centered: bool = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    residual: Tensor,
    form: str = "llama",
    centered: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    form: str = "llama",
    centered: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``x / sqrt(mean(x**2) + eps) * weight`` over the last dimension, saving x and 1/rms only.

    Args:
        x: (..., H) bf16, fp16, fp32 or fp64; any strides.
        weight: (H,) of any float dtype; frozen, then it gets no buffer, or trained.
        eps: added to the mean square.
        residual: like x, or None. What is normalized is then ``x + residual``, rounded to x's dtype
            and returned too; it takes x's place among the saved tensors.
        form: where the family rounds. "llama" rounds the normalized x to x's dtype, then multiplies
            (Llama, Mistral, Qwen2, Qwen3, Phi-3); "olmo2" multiplies in fp32 and rounds once
            (OLMo2, Cohere); "gemma" does so with ``1 + weight`` (Gemma 1 to 3).
        centered: subtract the mean of the row first: LayerNorm without bias (Cohere).
        backend: "triton" (CUDA; on the CPU under TRITON_INTERPRET=1), "torch" (any device), or
            "auto": triton on CUDA where it is installed, else torch, and for small inputs on the
            CPU plain autograd, which is faster there.

    Returns:
        (..., H) in x's dtype, and with `residual` the pair of it and ``x + residual``. In the form
        "llama" a weight of a wider dtype widens the first, as it does in transformers.
        Differentiable once in x, residual and weight.

    Raises:
        ValueError: shapes, dtypes or options disagree.
        RuntimeError: backend "triton" cannot run here; says what is missing.

    Numerics: fp32 inside (fp64 for fp64), gradients too, rounded where transformers' module and its
    gradient round; so bf16 values are its own bit for bit but where a sum in another order tips a
    rounding. The gradient of the weight is summed in fp32, in a fixed order.

    Source: RMSNorm, arXiv:1910.07467.
    """
    _validate(x, weight, residual, form)
    fits = x.shape[-1] <= (MAX_TRAINED if weight.requires_grad else MAX_HIDDEN)
    options = _Options(eps, form, centered, uses_triton(backend, x) and fits)
    given = (t for t in (x, residual, weight) if t is not None)
    with_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if is_small(backend, x, EAGER_BELOW if with_gradient else 4 * EAGER_BELOW):
        out, total = _eager(x, residual, weight, options)
    elif with_gradient:
        out, total = _RMSNorm.apply(x, residual, weight, options)
    else:
        out, total, *_ = options.forward(x, residual, weight, RowOrder.of(x))
    if residual is None:
        return out
    assert total is not None, "there is a sum where there is a residual"
    return out, total


@dataclass(frozen=True, slots=True)
class _Options:
    eps: float
    form: str
    centered: bool
    triton: bool

    def forward(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, order: RowOrder
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Out, the sum, 1/rms and the mean; the last two (N,) in the order of the rows."""
        rows = order.rows(x)
        run = _triton_forward if self.triton else _torch_forward
        residual_rows = None if residual is None else order.rows(residual)
        out, total, inverse_rms, mean = run(rows, residual_rows, weight, self)
        whole = None if total is None else order.restored(total)
        return order.restored(out), whole, inverse_rms, mean

    def out_dtype(self, x: Tensor, weight: Tensor) -> torch.dtype:
        return torch.promote_types(x.dtype, weight.dtype) if self.form == "llama" else x.dtype


def _eager(
    x: Tensor, residual: Tensor | None, weight: Tensor, options: _Options
) -> tuple[Tensor, Tensor]:
    """The definition, under autograd: transformers' own ops in their order."""
    total = x if residual is None else x + residual
    accumulation = torch.promote_types(x.dtype, torch.float32)
    centered = total.to(accumulation)
    if options.centered:
        centered = centered - centered.mean(-1, keepdim=True)
    square = centered.pow(2).mean(-1, keepdim=True)
    normalized = centered * torch.rsqrt(square + options.eps)
    factor = _factor(weight, accumulation, options.form)
    if options.form == "llama":
        return factor * normalized.to(x.dtype), total
    return (factor * normalized).to(x.dtype), total


class _RMSNorm(torch.autograd.Function):
    """Saves what was normalized, the weight, and one or two numbers a row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.options, ctx.order = options, RowOrder.of(x)
        out, total, inverse_rms, mean = options.forward(x, residual, weight, ctx.order)
        ctx.save_for_backward(x if total is None else total, weight, inverse_rms, mean)
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        grad_out: Tensor | None = grad_outputs[0]
        grad_sum: Tensor | None = grad_outputs[1]
        needs_x, needs_residual, needs_weight, _ = ctx.needs_input_grad
        if grad_out is None:
            return grad_sum, grad_sum if needs_residual else None, None, None
        x, weight, inverse_rms, mean = ctx.saved_tensors
        order: RowOrder = ctx.order
        grad_x, grad_weight = _gradients(
            _Saved(order.rows(x), weight, inverse_rms, mean),
            order.rows(grad_out),
            None if grad_sum is None else order.rows(grad_sum),
            needs_weight,
            ctx.options,
        )
        grad_x = order.restored(grad_x)
        return grad_x if needs_x else None, grad_x if needs_residual else None, grad_weight, None


@dataclass(frozen=True, slots=True)
class _Saved:
    rows: Tensor  # (N, H)
    weight: Tensor  # (H,)
    inverse_rms: Tensor  # (N,)
    mean: Tensor | None  # (N,)


def _gradients(
    saved: _Saved,
    grad_out: Tensor,  # (N, H)
    grad_sum: Tensor | None,  # (N, H)
    needs_weight: bool,
    options: _Options,
) -> tuple[Tensor, Tensor | None]:
    run = _triton_gradients if options.triton else _torch_gradients
    grad_x, grad_weight = run(saved, grad_out, grad_sum, needs_weight, options)
    return grad_x, None if grad_weight is None else grad_weight.to(saved.weight.dtype)


def _torch_forward(
    rows: Tensor, residual: Tensor | None, weight: Tensor, options: _Options
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The twin: eager's own ops, over tiles of rows."""
    accumulation = torch.promote_types(rows.dtype, torch.float32)
    out = rows.new_empty(rows.shape, dtype=options.out_dtype(rows, weight))
    total = None if residual is None else rows.new_empty(rows.shape)
    inverse_rms = rows.new_empty(len(rows), dtype=accumulation)
    mean = torch.empty_like(inverse_rms) if options.centered else None
    factor = _factor(weight, accumulation, options.form)
    for tile in row_tiles(rows):
        x = rows[tile]
        if residual is not None and total is not None:
            x = torch.add(x, residual[tile], out=total[tile])
        x = x.to(accumulation)
        if mean is not None:
            torch.mean(x, -1, out=mean[tile])
            x = x - mean[tile, None]
        square = x.pow(2).mean(-1, keepdim=True)
        scale = torch.rsqrt(square.add_(options.eps))
        inverse_rms[tile] = scale.squeeze(-1)
        normalized = x * scale
        if options.form == "llama":
            torch.mul(factor, normalized.to(rows.dtype), out=out[tile])
        else:
            out[tile] = normalized.mul_(factor)
    return out, total, inverse_rms, mean


def _torch_gradients(
    saved: _Saved,
    grad_out: Tensor,
    grad_sum: Tensor | None,
    needs_weight: bool,
    options: _Options,
) -> tuple[Tensor, Tensor | None]:
    rows, width = saved.rows, saved.rows.shape[-1]
    dtype, accumulation = rows.dtype, saved.inverse_rms.dtype
    factor = _factor(saved.weight, accumulation, options.form)
    grad_x = rows.new_empty(rows.shape)
    grad_weight = None
    if needs_weight:
        grad_weight = rows.new_zeros(width, dtype=accumulation)
    for tile in row_tiles(rows):
        grad, x = grad_out[tile], rows[tile].to(accumulation)
        scale = saved.inverse_rms[tile, None]
        if saved.mean is not None:
            x = x - saved.mean[tile, None]
        if grad_weight is not None:
            normalized = x * scale
            if options.form == "llama":
                normalized = normalized.to(dtype).to(accumulation)
            grad_weight += normalized.mul_(grad).sum(0)
        if options.form == "llama":
            grad = (grad * factor).to(dtype).to(accumulation)
        else:
            grad = grad * factor
        slope = (grad * x).sum(-1, keepdim=True).mul_(scale.pow(3)).div_(width)
        part = (grad * scale).sub_(x * slope)
        if saved.mean is not None:
            part -= part.mean(-1, keepdim=True)
        grad_x[tile] = part
        if grad_sum is not None:
            grad_x[tile] += grad_sum[tile]
    return grad_x, grad_weight


def _factor(weight: Tensor, accumulation: torch.dtype, form: str) -> Tensor:
    """Return the factor of the normalized rows."""
    if form == "llama":
        return weight
    weight = weight.to(accumulation)
    return weight + 1.0 if form == "gemma" else weight


def _triton_forward(
    rows: Tensor, residual: Tensor | None, weight: Tensor, options: _Options
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    from . import _triton_rms_norm

    count, width = rows.shape
    out = rows.new_empty(rows.shape, dtype=options.out_dtype(rows, weight))
    total = None if residual is None else rows.new_empty(rows.shape)
    inverse_rms = rows.new_empty(count, dtype=torch.float32)
    mean = torch.empty_like(inverse_rms) if options.centered else None
    shape = block_shape(width)
    if count == 0:
        return out, total, inverse_rms, mean
    launch: Any = _triton_rms_norm.rms_norm_kernel[(-(-count // shape["BLOCK_N"]),)]
    launch(
        rows,
        rows if residual is None else residual,
        weight.contiguous(),
        out,
        out if total is None else total,
        inverse_rms,
        inverse_rms if mean is None else mean,
        count,
        rows.stride(0),
        0 if residual is None else residual.stride(0),
        options.eps,
        HAS_RESIDUAL=residual is not None,
        CENTERED=options.centered,
        FORM=options.form,
        ROUND=rounding(rows.dtype),
        ROUND_OUT=rounding(out.dtype),
        HIDDEN=width,
        enable_fp_fusion=False,
        **shape,
    )
    return out, total, inverse_rms, mean


def _triton_gradients(
    saved: _Saved,
    grad_out: Tensor,
    grad_sum: Tensor | None,
    needs_weight: bool,
    options: _Options,
) -> tuple[Tensor, Tensor | None]:
    from . import _triton_rms_norm

    rows = saved.rows
    count, width = rows.shape
    grad_x = rows.new_empty(rows.shape)
    shape = block_shape(width)
    steps = STEPS if needs_weight else 1
    programs = -(-count // (shape["BLOCK_N"] * steps))
    partial = saved.inverse_rms
    if needs_weight:
        partial = rows.new_empty((programs, width), dtype=torch.float32)
    if programs == 0:
        return grad_x, partial.sum(0) if needs_weight else None
    launch: Any = _triton_rms_norm.rms_norm_gradient_kernel[(programs,)]
    launch(
        grad_out,
        grad_out if grad_sum is None else grad_sum,
        rows,
        saved.weight.contiguous(),
        saved.inverse_rms,
        saved.inverse_rms if saved.mean is None else saved.mean,
        grad_x,
        partial,
        count,
        grad_out.stride(0),
        0 if grad_sum is None else grad_sum.stride(0),
        rows.stride(0),
        HAS_GRAD_SUM=grad_sum is not None,
        WEIGHT_GRADIENT=needs_weight,
        CENTERED=options.centered,
        FORM=options.form,
        ROUND=rounding(rows.dtype),
        HIDDEN=width,
        STEPS=steps,
        enable_fp_fusion=False,
        **shape,
    )
    return grad_x, partial.sum(0) if needs_weight else None


def block_shape(width: int) -> dict[str, int]:
    """BLOCK_N, BLOCK_H and num_warps for rows of `width`: 16 numbers a thread, 32 in the widest."""
    block_h = max(16, next_power_of_two(width))
    block_n = max(1, 2048 // block_h)
    warps = min(16, max(1, block_n * block_h // 512))
    return {"BLOCK_N": block_n, "BLOCK_H": block_h, "num_warps": warps}


def _validate(x: Tensor, weight: Tensor, residual: Tensor | None, form: str) -> None:
    if x.ndim < 1 or weight.ndim != 1 or x.shape[-1] != weight.shape[0] or x.shape[-1] == 0:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit: need (..., H) and "
            "(H,). The norm runs over the last dimension."
        )
    if not x.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}: need floating dtypes.")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual {tuple(residual.shape)} {residual.dtype} does not fit x {tuple(x.shape)} "
            f"{x.dtype}: need the same shape and dtype; nothing is broadcast."
        )
    if form not in FORMS:
        raise ValueError(f"form {form!r} does not exist: choose from {FORMS}.")
