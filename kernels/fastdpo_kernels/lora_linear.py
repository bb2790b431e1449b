"""A frozen linear layer, dense or 4-bit, with its LoRA branch: saves its input and nothing else."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _dense_weights


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

    The input is saved before the product is formed, so a recomputation that stops at the last
    saved tensor (torch.utils.checkpoint does) skips the product of a block's last linear layer.

    Args:
        x: (..., in) bf16, fp16, fp32 or fp64.
        weight: (out, in) of x's dtype, or a bitsandbytes `Params4bit`, dequantized on the way in
            the forward and again in the backward. Frozen.
        lora_A: (r, in) fp32 (or any float dtype), or None for the layer without adapter.
        lora_B: (out, r), likewise.
        bias: (out,) frozen, or None.
        scaling: factor of the LoRA branch (alpha / r, or alpha / sqrt(r)).
        dropout: probability of zeroing an entry of x before A, in [0, 1). The mask is drawn again
            in the backward from a seed taken from torch's CPU generator.

    Returns:
        (..., out) in x's dtype; differentiable once in x, lora_A and lora_B.

    Raises:
        ValueError: shapes or dtypes disagree, one of lora_A and lora_B is missing, dropout is out
            of range, or a gradient of weight or bias is asked for.

    Numerics: GEMMs in x's dtype, under autocast too; the adapters keep their own (fp32) storage
    and are cast on the way, their gradients are returned in it.

    Source: LoRA, arXiv:2106.09685; NF4, arXiv:2305.14314.
    """
    validate(x, weight, lora_A, lora_B, bias, dropout)
    seed = int(torch.randint(2**62, ())) if dropout > 0.0 else 0
    layer = FrozenPart(weight, bias, scaling, dropout, seed)
    with torch.autocast(x.device.type, enabled=False):
        differentiable = (t for t in (x, lora_A, lora_B) if t is not None)
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)):
            return layer.product(x, lora_A, lora_B)
        gradient = _Gradient.apply(x, lora_A, lora_B, layer)
        adapter = (None if t is None else t.detach() for t in (lora_A, lora_B))
        return _Product.apply(gradient, x.detach(), *adapter, layer)


@dataclass(frozen=True, slots=True, eq=False)
class FrozenPart:
    """Arguments of a call that get no gradient."""

    weight: Tensor
    bias: Tensor | None
    scaling: float
    dropout: float
    seed: int

    @property
    def out_features(self) -> int:
        """Columns of the product."""
        return weight_shape(self.weight)[0]

    def drop(self, rows: Tensor) -> Tensor:
        """Rows under this call's dropout mask."""
        return dropped(rows, self.dropout, self.seed)

    def product(self, x: Tensor, lora_A: Tensor | None, lora_B: Tensor | None) -> Tensor:
        """(..., out) from (..., in)."""
        flat = x.reshape(-1, x.shape[-1])
        down = None if lora_A is None else self.drop(flat) @ lora_A.to(x.dtype).T
        return like_rows_of(x, self.accumulated(flat, down, lora_B))

    def accumulated(self, rows: Tensor, down: Tensor | None, lora_B: Tensor | None) -> Tensor:
        """(N, out): the large product is added to the branch and the bias while it is formed.

        So nothing is read again to be added to; and without adapter it starts from zeros, so that
        an adapter whose B is zero gives the same bits.
        """
        if down is None or lora_B is None:
            out = rows.new_zeros(len(rows), self.out_features)
            out = out if self.bias is None else out.copy_(self.bias)
        elif self.bias is None:
            out = scaled_product(down, lora_B.to(rows.dtype).T, self.scaling)
        else:
            out = torch.addmm(self.bias, down, lora_B.to(rows.dtype).T, alpha=self.scaling)
        return out.addmm_(rows, dense_weight(self.weight, rows.dtype).T)


class _Gradient(torch.autograd.Function):
    """Saves, and computes every gradient; its output is a port through which dL/dout arrives."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., in)
        lora_A: Tensor | None,  # (r, in)
        lora_B: Tensor | None,  # (out, r)
        layer: FrozenPart,
    ) -> Tensor:
        ctx.layer = layer
        ctx.saves_x = lora_A is not None and any(ctx.needs_input_grad[1:3])
        ctx.save_for_backward(x if ctx.saves_x else None, lora_A, lora_B)
        return x.new_empty(()).expand(*x.shape[:-1], layer.out_features)  # holds one number

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        grad_out: Tensor = grad_outputs[0]
        x, lora_A, lora_B = ctx.saved_tensors
        layer: FrozenPart = ctx.layer
        with torch.autocast(grad_out.device.type, enabled=False):
            flat_grad = grad_out.reshape(-1, grad_out.shape[-1])
            grad_x = grad_A = grad_B = grad_down = None
            if lora_B is not None:
                lora_B_cast = lora_B.to(flat_grad.dtype)
                grad_down = scaled_product(flat_grad, lora_B_cast, layer.scaling)  # (N, r)
            if ctx.needs_input_grad[0]:
                grad_x = input_gradient(layer, flat_grad, grad_down, lora_A)
                grad_x = grad_x.view(*grad_out.shape[:-1], grad_x.shape[-1])
            if ctx.saves_x and grad_down is not None:
                inputs = layer.drop(x.reshape(-1, x.shape[-1]))
                down = inputs @ lora_A.to(inputs.dtype).T
                grad_A = (grad_down.T @ inputs).to(lora_A.dtype)
                grad_B = scaled_product(flat_grad.T, down, layer.scaling).to(lora_B.dtype)
        return grad_x, grad_A, grad_B, None


class _Product(torch.autograd.Function):
    """The value. Saves nothing; hands the gradient on to the port."""

    @staticmethod
    def forward(
        ctx: Any,
        port: Tensor,  # (..., out), of `_Gradient`
        x: Tensor,  # (..., in), and the adapter: detached
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        layer: FrozenPart,
    ) -> Tensor:
        return layer.product(x, lora_A, lora_B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        return grad_outputs[0], None, None, None, None


def input_gradient(
    layer: FrozenPart, flat_grad: Tensor, grad_down: Tensor | None, lora_A: Tensor | None
) -> Tensor:
    """(N, in) from (N, out) and the branch's (N, r), the large product added to the small one."""
    weight = kept_dense_weight(layer.weight, flat_grad.dtype)
    if grad_down is None or lora_A is None:
        return flat_grad @ weight
    return layer.drop(grad_down @ lora_A.to(flat_grad.dtype)).addmm_(flat_grad, weight)


def like_rows_of(x: Tensor, flat: Tensor) -> Tensor:
    """(N, out) as (..., out), the axes of `x` but its last.

    It is no view to autograd, which lets nobody write into a view that a Function gives out; and
    layers do (`mlp_output += attention_output` in Falcon).
    """
    return torch.ops.aten._unsafe_view(flat, [*x.shape[:-1], flat.shape[-1]])


def scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """``scaling * left @ right``, the factor applied before the product is rounded."""
    out = left.new_empty(left.shape[0], right.shape[1])
    return out.addmm_(left, right, beta=0.0, alpha=scaling)


def dense_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The (out, in) matrix itself, or what a 4-bit weight stands for, in `dtype`.

    Dequantized straight into it, whatever dtype the weight was quantized from. A new tensor each
    time, dropped before the next layer's is made: torch's allocator hands out the same block again,
    in stream order, so one matrix is all that ever lies there. Buffers kept per shape would hold
    the sum of the shapes (0.28 GB of an 8B in place of 0.12 GB). In `KeptDenseWeights` those of
    one decoder layer lie there until its backward has used them.
    """
    quant_state = getattr(weight, "quant_state", None)
    if quant_state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    direct = torch.float32 if dtype == torch.float64 else dtype
    if quant_state.dtype != direct:
        quant_state = copy.copy(quant_state)
        quant_state.dtype = direct
    dense = dequantize_4bit(weight.data, quant_state).to(dtype)
    _dense_weights.keep(weight, dense)
    return dense


def kept_dense_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`dense_weight` for the backward, which may find the one of the recomputation."""
    kept = _dense_weights.take(weight)
    return dense_weight(weight, dtype) if kept is None or kept.dtype != dtype else kept


def dropped(rows: Tensor, dropout: float, seed: int) -> Tensor:
    """`rows` under the dropout mask of `seed`, scaled by 1 / (1 - dropout); the same each time."""
    if dropout == 0.0:
        return rows
    generator = torch.Generator(device=rows.device).manual_seed(seed)
    keep = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
    keep.bernoulli_(1.0 - dropout, generator=generator)
    return (rows * keep).mul_(1.0 / (1.0 - dropout))


def weight_shape(weight: Tensor) -> tuple[int, ...]:
    """(out, in), of a 4-bit weight as well."""
    quant_state = getattr(weight, "quant_state", None)
    return tuple(weight.shape if quant_state is None else quant_state.shape)


def validate(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    dropout: float,
) -> None:
    """Refuse with a ValueError what `lora_linear` cannot compute."""
    shape = weight_shape(weight)
    if len(shape) != 2 or x.shape[-1] != shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} does not fit weight {shape}: need (..., {shape[-1]})."
        )
    if getattr(weight, "quant_state", None) is None and weight.dtype != x.dtype:
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
    if torch.is_grad_enabled():
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"{name} requires a gradient, and lora_linear computes none for it: freeze it "
                    "with requires_grad_(False), or use torch.nn.functional.linear."
                )
