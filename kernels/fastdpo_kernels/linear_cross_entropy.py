"""The public cross entropy: `linear_logprobs` behind the signature of torch's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._torch import accumulation_dtype, row_chunks
from .linear_logprobs import _as_autocast, linear_logprobs

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of a linear head without building the (N, V) logits.

    Computes ``cross_entropy(z, target)`` of ``z = cap(logit_scale * (h @ W.T + b))``. Names, order
    and defaults up to `options` are those of `torch.nn.functional.linear_cross_entropy` (2.13), so
    that swapping the import is enough. A token's loss with label smoothing e is

        (1 - e) (lse - z_t) + e (lse - mean_v z_v)  =  -logp_t + e (z_t - mean_v z_v)

    and z_t - mean_v z_v = logit_scale * (h . (W_t - mean W) + b_t - mean b) needs no logits either.

    Args:
        input: (..., H) fp64, fp32, bf16 or fp16; the state that predicts each target. torch takes
            (H,) and (N, H) alone.
        linear_weight: (V, H), same dtype and device; frozen, then no gradient buffer exists, or
            trainable.
        target: (...) int64 in [0, V), or `ignore_index`.
        linear_bias: (V,) or None.
        weight: must be None: classes are not weighted here.
        reduction: "mean" over the targets that are not ignored, "sum", or "none".
        ignore_index: rows with this target are dropped before any work and lose 0; None is -100.
        label_smoothing: e in [0, 1], probability spread evenly over the vocabulary.
        options: must be None: they size torch's chunks, and here no logits are held.
        softcap: cap of the logits (Gemma), or None; not with label smoothing.
        logit_scale: factor on the logits (Cohere; Granite divides: pass the inverse).
        backend: "auto", "triton" or "torch", as in `linear_logprobs`.

    Returns:
        A scalar, or (...) for "none", exactly 0 where ignored; differentiable once in input,
        linear_weight and linear_bias. fp32 (fp64 for fp64 input) where torch rounds to the input's
        dtype: a sum of bf16 token losses is off by whole nats. The mean is NaN, with gradients of
        0, where every target is ignored, as torch's is.

    Raises:
        ValueError: shapes, dtypes, devices or options disagree, or an argument is not supported;
            says why, and what to do.
        RuntimeError: backend "triton" cannot run here; says what is missing.

    Numerics: as `linear_logprobs`: logits, statistics and sums in fp32 (fp64 for fp64 input). The
    smoothing term is a second fp32 dot product per row. Its gradient and the first one's are each
    rounded to the operands' dtype and then added, so that the bound of `linear_logprobs` holds for
    each part, not for what is left where they cancel (p near 1 - e). With a trainable head it takes
    a second (V, H) buffer in the backward.

    Source: label smoothing, arXiv:1512.00567; the rest as `linear_logprobs`.
    """
    _validate(linear_weight, target, weight, reduction, label_smoothing, options, softcap)
    ignored = -100 if ignore_index is None else ignore_index
    states, head, bias = _as_autocast(input, linear_weight, linear_bias)
    losses = -linear_logprobs(
        states,
        head,
        target,
        bias=bias,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignored,
        backend=backend,
    )
    if label_smoothing > 0:
        above = _targets_above_mean(states, head, bias, target, ignored)
        losses = losses + (label_smoothing * logit_scale) * above
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (target != ignored).sum()


def _validate(
    linear_weight: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
    options: object | None,
    softcap: float | None,
) -> None:
    if weight is not None:
        raise ValueError(
            "weight (a factor per class) is not supported: multiply the losses of "
            "reduction='none' by weight[target], and divide by the sum of those for the mean."
        )
    if options is not None:
        raise ValueError(
            "options are not supported: they size the chunks of torch's logits, and here no "
            "logits are held. Leave them out."
        )
    if linear_weight.ndim > 2:
        raise ValueError(
            f"linear_weight is {tuple(linear_weight.shape)}: the K-dimensional loss is not "
            "supported, need (V, H). Call once per head."
        )
    if target.is_floating_point():
        raise ValueError(
            f"target is {target.dtype}: class probabilities are not supported, since they are as "
            "large as the logits. Need int64 class indices."
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} does not exist: choose from {REDUCTIONS}.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing is {label_smoothing}: need a number from 0 to 1.")
    if label_smoothing > 0 and softcap is not None:
        raise ValueError(
            f"label_smoothing {label_smoothing} with softcap {softcap} is not supported: the mean "
            "of capped logits is no linear function of the state. Leave one of them out."
        )


def _targets_above_mean(
    hidden_states: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    target_ids: Tensor,  # (...)
    ignore_index: int,
) -> Tensor:
    """a_t - mean_v a_v of the raw logits a = h @ W.T + b, (...), 0 at ignored positions."""
    flat_targets = target_ids.reshape(-1)
    kept = (flat_targets != ignore_index).nonzero().squeeze(-1)
    flat_hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    above = _TargetsAboveMean.apply(flat_hidden[kept], weight, bias, flat_targets[kept])
    return above.new_zeros(flat_targets.shape).index_copy(0, kept, above).reshape(target_ids.shape)


class _TargetsAboveMean(torch.autograd.Function):
    """h . (W_t - mean W) + b_t - mean b per row, in row chunks.

    By hand, since autograd would sum the gradients of a repeated target's row in bf16, and hold
    several (V, H) tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        target_ids: Tensor,  # (N,)
    ) -> Tensor:
        """(N,) in the accumulation dtype."""
        dtype = accumulation_dtype(weight.dtype)
        mean_row = weight.mean(dim=0, dtype=dtype)
        above = hidden_states.new_empty(target_ids.shape, dtype=dtype)
        for rows in row_chunks(target_ids.shape[0], weight.device):
            toward_target = weight[target_ids[rows]].to(dtype) - mean_row
            above[rows] = (toward_target * hidden_states[rows]).sum(dim=1)
        if bias is not None:
            above += bias[target_ids].to(dtype) - bias.mean(dtype=dtype)
        states = hidden_states if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(states, weight, target_ids, mean_row)
        return above

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        """In h: g (W_t - mean W). In W: the sum of g h at the targets' rows, less a V-th of all."""
        grad_above: Tensor = grad_outputs[0]
        hidden_states, weight, target_ids, mean_row = ctx.saved_tensors
        of_hidden, of_weight, of_bias, _ = ctx.needs_input_grad
        dtype, vocabulary = mean_row.dtype, weight.shape[0]
        shape = (target_ids.shape[0], weight.shape[1])
        grad_hidden = weight.new_empty(shape) if of_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if of_weight else None
        everywhere = torch.zeros_like(mean_row)
        for rows in row_chunks(target_ids.shape[0], weight.device):
            targets, upstream = target_ids[rows], grad_above[rows, None]
            if grad_hidden is not None:
                grad_hidden[rows] = (weight[targets].to(dtype) - mean_row) * upstream
            if grad_weight is not None:
                products = upstream * hidden_states[rows]
                grad_weight.index_put_((targets,), products, accumulate=True)  # sorts: no atomics
                everywhere += products.sum(dim=0)
        grad_bias = None
        if of_bias:
            grad_bias = grad_above.new_zeros(vocabulary)
            grad_bias.index_put_((target_ids,), grad_above, accumulate=True)
            grad_bias -= grad_above.sum() / vocabulary
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.sub_(everywhere / vocabulary).to(weight),
            None if grad_bias is None else grad_bias.to(weight),
            None,
        )
