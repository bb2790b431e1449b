"""Autograd bookkeeping of `linear_logprobs`: what is saved, and what the backward does with it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._torch import (
    LogitTransform,
    Request,
    RowStatistics,
    accumulation_dtype,
    logits_tile,
    matmul,
    padded,
    row_chunks,
    rows_per_chunk,
    take_target,
    vocabulary_tiles,
)


class Backend(Protocol):
    """A module that computes the passes: `_torch` or `_launch`."""

    @staticmethod
    def score(hidden_states: Tensor, target_ids: Tensor, request: Request) -> RowStatistics: ...

    @staticmethod
    def score_with_gradient(
        hidden_states: Tensor, target_ids: Tensor, request: Request
    ) -> tuple[RowStatistics, Tensor]: ...


class FrozenHeadLogprobs(torch.autograd.Function):
    """Frozen head: the forward hands over U = dlogp/dh, the backward scales its rows.

    U is kept in the dtype of the hidden states, whose place among the saved tensors it takes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,  # (N, H)
        target_ids: Tensor,  # (N,)
        request: Request,
        backend: Backend,
    ) -> tuple[Tensor, ...]:
        """(N,) log-probs, then one (N,) tensor per asked output."""
        rows, gradients = backend.score_with_gradient(hidden_states, target_ids, request)
        ctx.save_for_backward(gradients)
        metrics = [rows.extras[name] for name in request.outputs]
        ctx.mark_non_differentiable(*metrics)
        return (rows.logps, *metrics)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        """Row scaling, rounded once; the upstream gradient of the metrics is nobody's."""
        grad_logps: Tensor = grad_outputs[0]
        (gradients,) = ctx.saved_tensors
        scaled = torch.empty_like(gradients)
        torch.mul(gradients, grad_logps[:, None], out=scaled)  # in fp32, without fp32 temporaries
        return scaled, None, None, None


class TrainedHeadLogprobs(torch.autograd.Function):
    """Trainable head: the forward only scores, the backward recomputes the tiles.

    dz_v = -g (1 - p) exp(z_v - m) / s for v != t and dz_t = g (1 - p): nothing cancels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,  # (N, H)
        weight: Tensor,  # (V, H); the request's, named here because it gets a gradient
        bias: Tensor | None,
        target_ids: Tensor,  # (N,)
        request: Request,
        backend: Backend,
    ) -> tuple[Tensor, ...]:
        """(N,) log-probs, then one (N,) tensor per asked output."""
        rows = backend.score(hidden_states, target_ids, request)
        ctx.save_for_backward(
            hidden_states,
            weight,
            bias,
            target_ids,
            rows.target_logits,
            rows.max_others,
            rows.sum_others,
            rows.mass_others,
        )
        ctx.transform = request.transform
        metrics = [rows.extras[name] for name in request.outputs]
        ctx.mark_non_differentiable(*metrics)
        return (rows.logps, *metrics)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        """Gradients of hidden states, weight and bias, accumulated in fp32 (fp64 for fp64)."""
        grad_logps: Tensor = grad_outputs[0]
        hidden_states, weight, bias, target_ids, z_target, maximum, total, mass = ctx.saved_tensors
        transform: LogitTransform = ctx.transform
        dtype = accumulation_dtype(weight.dtype)
        size = rows_per_chunk(hidden_states.device)
        grad_hidden = torch.empty_like(hidden_states)
        grad_weight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if ctx.needs_input_grad[2] else None
        # Of the loss in the other columns' logits, before exp(z - m), and in the target's.
        of_others = -grad_logps * mass / total.clamp_min(torch.finfo(dtype).tiny)
        of_target = grad_logps * mass * transform.slope(z_target)
        pivot = maximum.clamp_min(torch.finfo(dtype).min)
        for rows in row_chunks(hidden_states.shape[0], hidden_states.device):
            states = padded(hidden_states[rows], size)
            targets = padded(target_ids[rows], size)
            chunk_grad = torch.zeros_like(states, dtype=dtype)
            for start, stop in vocabulary_tiles(weight):
                tile = weight[start:stop]
                z = logits_tile(states, tile, None if bias is None else bias[start:stop], transform)
                take_target(z, targets, start)
                slope = transform.slope(z)
                grad_z = z.sub_(padded(pivot[rows], size)[:, None]).exp_()
                grad_z *= padded(of_others[rows], size)[:, None]
                if isinstance(slope, Tensor):  # infinite where the target column holds -inf
                    grad_z = torch.where(grad_z == 0, 0.0, grad_z * slope)
                else:
                    grad_z *= slope
                _add_target(grad_z, targets, padded(of_target[rows], size), start)
                chunk_grad += matmul(grad_z, tile)
                if grad_weight is not None:
                    grad_weight[start:stop] += matmul(grad_z.T, states)
                if grad_bias is not None:
                    grad_bias[start:stop] += grad_z.sum(dim=0)
            grad_hidden[rows] = chunk_grad[: rows.stop - rows.start].to(grad_hidden.dtype)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(weight.dtype),
            None,
            None,
            None,
        )


def _add_target(grad_z: Tensor, target_ids: Tensor, of_target: Tensor, start: int) -> None:
    """Add the target's own gradient where its column lies in this tile."""
    columns = target_ids - start
    inside = (columns >= 0) & (columns < grad_z.shape[1])
    values = torch.where(inside, of_target, 0.0)
    grad_z.scatter_add_(1, torch.where(inside, columns, 0)[:, None], values[:, None])
