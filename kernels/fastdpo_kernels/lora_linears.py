"""Frozen linear layers on one input, their LoRA branches stacked: one node, one skinny product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .lora_linear import (
    FrozenPart,
    kept_dense_weight,
    like_rows_of,
    lora_linear,
    scaled_product,
    validate,
)


class LoraModule(NamedTuple):
    """One linear layer of `lora_linears`; the fields are `lora_linear`'s arguments."""

    weight: Tensor
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    bias: Tensor | None = None
    scaling: float = 1.0


def lora_linears(
    x: Tensor, modules: Sequence[LoraModule], *, dropout: float = 0.0
) -> tuple[Tensor, ...]:
    """`lora_linear` of several modules on the same x: q, k and v, or gate and up.

    The A matrices lie stacked in one product, forward and backward, so x is read once for all
    branches; the gradients of x are added up inside the products that make them. Saves x and
    nothing else. The adapters stay parameters of their own.

    Args:
        x: (..., in) bf16, fp16, fp32 or fp64.
        modules: each with a frozen weight (out, in), dense or `Params4bit`; lora_A (r, in) and
            lora_B (out, r) or neither; a frozen bias or None; the factor of its branch. Outs and
            ranks may differ.
        dropout: as in `lora_linear`. Every module has a mask of its own, so above 0 each runs
            alone.

    Returns:
        One (..., out) per module, in x's dtype; differentiable once in x and the adapters.

    Raises:
        ValueError: a module's shapes or dtypes disagree, or a frozen tensor asks for a gradient.

    Numerics: of `lora_linear`, to rounding; the gradient of x is rounded after each module.

    Source: LoRA, arXiv:2106.09685.
    """
    for m in modules:
        validate(x, m.weight, m.lora_A, m.lora_B, m.bias, dropout)
    if dropout > 0.0:
        return tuple(
            lora_linear(
                x, m.weight, m.lora_A, m.lora_B, bias=m.bias, scaling=m.scaling, dropout=dropout
            )
            for m in modules
        )
    group = _Group([FrozenPart(m.weight, m.bias, m.scaling, 0.0, 0) for m in modules])
    adapters = [t for m in modules for t in (m.lora_A, m.lora_B)]
    with torch.autocast(x.device.type, enabled=False):
        given = [t for t in (x, *adapters) if t is not None]
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
            return group.products(x, adapters)
        ports = _Gradients.apply(x, group, *adapters)
        detached = [None if t is None else t.detach() for t in adapters]
        return _Products.apply(group, x.detach(), *detached, *ports)


class _Group:
    """The frozen parts of the modules."""

    def __init__(self, parts: list[FrozenPart]) -> None:
        self.parts = parts

    def products(self, x: Tensor, adapters: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """One (..., out) per module; `adapters` are A and B of the first, A and B of the next."""
        rows = x.reshape(-1, x.shape[-1])
        cast = Adapters.cast(adapters, x.dtype)
        return tuple(
            like_rows_of(x, part.accumulated(rows, down, lora_B))
            for part, down, lora_B in zip(self.parts, cast.downs(rows), cast.ups, strict=True)
        )


@dataclass(frozen=True, slots=True, eq=False)
class Adapters:
    """The matrices of several adapters in the dtype of the products, cast in one launch."""

    stacked: Tensor | None  # (sum of the ranks, in): the A matrices one below the other
    ups: list[Tensor | None]  # (out, r) each: the B matrices
    ranks: list[int]  # 0 where there is no adapter

    @classmethod
    def cast(cls, adapters: Sequence[Tensor | None], dtype: torch.dtype) -> Adapters:
        """From A and B of the first module, A and B of the next."""
        downs, ups = adapters[::2], list(adapters[1::2])
        given = [matrix for matrix in downs if matrix is not None]
        ranks = [0 if matrix is None else len(matrix) for matrix in downs]
        if not given:
            return cls(None, ups, ranks)
        stacked = given[0].new_empty(sum(ranks), given[0].shape[1], dtype=dtype)
        targets = list(stacked.split([len(matrix) for matrix in given]))
        for place, matrix in enumerate(ups):
            if matrix is not None and matrix.dtype != dtype:
                given.append(matrix)
                targets.append(torch.empty_like(matrix, dtype=dtype))
                ups[place] = targets[-1]
        with torch.no_grad():
            torch._foreach_copy_(targets, given)
        return cls(stacked, ups, ranks)

    def downs(self, rows: Tensor) -> list[Tensor | None]:
        """(N, r) of each module, views of one product, or None where there is no adapter."""
        return self.sliced(None if self.stacked is None else rows @ self.stacked.T)

    def sliced(self, columns: Tensor | None) -> list[Tensor | None]:
        """The columns of each module's rank, in order; None where it has no adapter."""
        if columns is None:
            return [None] * len(self.ranks)
        parts = columns.split(self.ranks, dim=1)
        return [part if rank else None for part, rank in zip(parts, self.ranks, strict=True)]


class _Gradients(torch.autograd.Function):
    """Saves, and computes every gradient; its outputs are ports through which dL/dout arrives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: _Group, *adapters: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        ctx.group = group
        ctx.saves_x = any(ctx.needs_input_grad[2:])
        ctx.save_for_backward(x if ctx.saves_x else None, *adapters)
        one = x.new_empty(())  # each port holds one number
        return tuple(one.expand(*x.shape[:-1], part.out_features) for part in group.parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        x, *adapters = ctx.saved_tensors
        given = next((g for g in grad_outputs if g is not None), None)
        if given is None:
            return None, None, *(None for _ in adapters)
        with torch.autocast(given.device.type, enabled=False):
            grads = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grad_outputs]
            cast = Adapters.cast(adapters, given.dtype)
            grad_downs = _grad_downs(ctx.group, grads, cast)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = _input_gradient(ctx.group, grads, grad_downs, cast)
                grad_x = grad_x.view(*given.shape[:-1], grad_x.shape[-1])
            of_adapters: list[Tensor | None] = [None] * len(adapters)
            if ctx.saves_x:
                rows = x.reshape(-1, x.shape[-1])
                of_adapters = _adapter_gradients(ctx.group, rows, grads, grad_downs, cast)
                of_adapters = [
                    None if g is None or t is None else g.to(t.dtype)
                    for g, t in zip(of_adapters, adapters, strict=True)
                ]
        return grad_x, None, *of_adapters


class _Products(torch.autograd.Function):
    """The values. Saves nothing; hands the gradients on to the ports."""

    @staticmethod
    def forward(ctx: Any, group: _Group, x: Tensor, *tensors: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        count = 2 * len(group.parts)
        return group.products(x, tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        return None, None, *(None for _ in range(2 * len(grad_outputs))), *grad_outputs


def _grad_downs(group: _Group, grads: Sequence[Tensor | None], cast: Adapters) -> Tensor | None:
    """(N, sum of the ranks): dL/d(x @ A.T) of all modules side by side, None without adapters."""
    if cast.stacked is None:
        return None
    like = next(g for g in grads if g is not None)
    grad_downs = like.new_empty(len(like), sum(cast.ranks))
    places = cast.sliced(grad_downs)
    for part, grad, place, lora_B in zip(group.parts, grads, places, cast.ups, strict=True):
        if place is None or lora_B is None:
            continue
        if grad is None:
            place.zero_()
        else:
            place.addmm_(grad, lora_B, beta=0.0, alpha=part.scaling)
    return grad_downs


def _input_gradient(
    group: _Group, grads: Sequence[Tensor | None], grad_downs: Tensor | None, cast: Adapters
) -> Tensor:
    """(N, in): the small product first, each large one added to it while it is formed."""
    grad_x = None
    if grad_downs is not None and cast.stacked is not None:
        grad_x = grad_downs @ cast.stacked
    for part, grad in zip(group.parts, grads, strict=True):
        if grad is not None:
            weight = kept_dense_weight(part.weight, grad.dtype)
            grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
    assert grad_x is not None, "one gradient has arrived"
    return grad_x


def _adapter_gradients(
    group: _Group,
    rows: Tensor,
    grads: Sequence[Tensor | None],
    grad_downs: Tensor | None,
    cast: Adapters,
) -> list[Tensor | None]:
    """Gradients of A and B of the first module, A and B of the next, in the products' dtype."""
    columns = cast.sliced(None if grad_downs is None else (grad_downs.T @ rows).T)
    found: list[Tensor | None] = []
    for part, grad, down, column in zip(group.parts, grads, cast.downs(rows), columns, strict=True):
        if grad is None or down is None or column is None:
            found += [None, None]
        else:
            found += [column.T, scaled_product(grad.T, down, part.scaling)]
    return found
