"""The public fused log-prob: validate, flatten, drop ignored rows, choose a backend."""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor

from . import _torch
from ._backend import uses_triton
from ._function import Backend, FrozenHeadLogprobs, TrainedHeadLogprobs
from ._torch import Bounds, LogitTransform, Request

NUMERICS_VERSION = 1
"""Raised whenever a change moves the log-probs by more than rounding: stored ones then miss."""

EXTRA_OUTPUTS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


class LinearLogprobs(NamedTuple):
    """Result of `linear_logprobs` with extra outputs; those that were not requested are None."""

    token_logps: Tensor
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


@overload
def linear_logprobs(
    hidden_states: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    outputs: tuple[()] = (),
    backend: str = "auto",
    max_buffer_mib: int = 276,
    skip_mass: float = 0.0,
) -> Tensor: ...
@overload
def linear_logprobs(
    hidden_states: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    outputs: tuple[str, ...],
    backend: str = "auto",
    max_buffer_mib: int = 276,
    skip_mass: float = 0.0,
) -> Tensor | LinearLogprobs: ...
def linear_logprobs(
    hidden_states: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    outputs: tuple[str, ...] = (),
    backend: str = "auto",
    max_buffer_mib: int = 276,
    skip_mass: float = 0.0,
) -> Tensor | LinearLogprobs:
    """Log-probability of each target token without building the (N, V) logits.

    Computes ``log_softmax(z)[target]`` of ``z = cap(logit_scale * (h @ W.T + bias)) / temperature``
    with ``cap(y) = softcap * tanh(y / softcap)``. With a frozen head the gradient is formed in the
    forward (two GEMMs in all, the backward scales rows); with a trainable head the tiles are
    recomputed in the backward. Extra memory is a few tiles, whatever N and V are, plus one (N, H)
    tensor in the place of the saved hidden states.

    Args:
        hidden_states: (..., H) fp64, fp32, bf16 or fp16; the state that predicts each target.
        weight: (V, H), same dtype and device; frozen, then no gradient buffer exists, or trainable.
        target_ids: (...) int64 in [0, V), or `ignore_index`.
        bias: (V,) or None.
        softcap: cap of the logits (Gemma), or None.
        logit_scale: factor on the logits (Cohere; Granite divides: pass the inverse).
        temperature: divisor of the logits after the cap.
        ignore_index: rows with this target are dropped before any work and return 0. None promises
            that there are none, which spares a synchronisation on CUDA.
        outputs: any of "entropy", "mean_logits", "is_top1", "log_sum_sq_probs": per-token metrics
            free of gradient, computed only when asked for.
        backend: "triton" (CUDA; on the CPU under TRITON_INTERPRET=1), "torch" (any device), or
            "auto": triton for bf16 and fp16 on CUDA where it is installed, else torch.
        max_buffer_mib: bound of the temporary buffers, MiB; smaller is slower (kernels/README.md:
            how much). U, which takes the place of the saved hidden states, is not counted.
        skip_mass: most probability mass whose part of the gradient a row may leave out, which
            bounds the row's error by skip_mass * |dz/d(h.W)| * the largest row norm of weight.
            0 is exact. The torch backend leaves nothing out.

    Returns:
        (...) fp32 (fp64 for fp64 input), nats, <= 0, exactly 0 at ignored positions; differentiable
        once in hidden_states, weight and bias. With `outputs`, a `LinearLogprobs`.

    Raises:
        ValueError: shapes, dtypes, devices or options disagree, or a target is out of range (on the
            CPU; on CUDA the range is the caller's promise).
        RuntimeError: backend "triton" cannot run here; says what is missing.

    Numerics: logits and statistics in fp32 (fp64 for fp64 input), never rounded to bf16; the target
    column is kept apart, so nothing cancels when a probability is near 1. A row's bits depend on
    the row, not on N or its neighbours: rows are worked in chunks of one fixed size.

    Source: online softmax, arXiv:1805.02867; the algebra is in kernels/README.md.
    """
    hidden_states, weight, bias = _as_autocast(hidden_states, weight, bias)
    _validate(hidden_states, weight, target_ids, bias, softcap, temperature, outputs)
    request = Request(
        weight,
        bias,
        LogitTransform(softcap=softcap, factor=logit_scale, temperature=temperature),
        outputs,
        Bounds(max_buffer_mib * 2**20, skip_mass),
    )
    _validate_bounds(request.bounds)
    chosen = _backend(backend, hidden_states)
    flat_hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
    flat_targets = target_ids.reshape(-1)
    kept = None
    if ignore_index is not None:
        scored = flat_targets != ignore_index
        if not bool(scored.all()):
            kept = scored.nonzero().squeeze(-1)
            flat_hidden, flat_targets = flat_hidden[kept], flat_targets[kept]
    _validate_range(flat_targets, weight.shape[0])
    logps, extras = _dispatch(flat_hidden, flat_targets, request, chosen)

    def restored(rows: Tensor) -> Tensor:
        if kept is not None:
            rows = rows.new_zeros(target_ids.numel()).index_copy(0, kept, rows)
        return rows.reshape(target_ids.shape)

    if not outputs:
        return restored(logps)
    return LinearLogprobs(restored(logps), **{name: restored(extras[name]) for name in outputs})


def _dispatch(
    hidden_states: Tensor,  # (N, H)
    target_ids: Tensor,  # (N,)
    request: Request,
    backend: Backend,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Score without gradient, or through the autograd node that fits what needs one."""
    weight, bias = request.weight, request.bias
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and head_trains:
        logps, *metrics = TrainedHeadLogprobs.apply(
            hidden_states, weight, bias, target_ids, request, backend
        )
    elif torch.is_grad_enabled() and hidden_states.requires_grad:
        logps, *metrics = FrozenHeadLogprobs.apply(hidden_states, target_ids, request, backend)
    else:
        with torch.no_grad():
            rows = backend.score(hidden_states, target_ids, request)
        return rows.logps, rows.extras
    return logps, dict(zip(request.outputs, metrics, strict=True))


def _as_autocast(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast behave as torch.nn.functional.linear does: operands in its dtype."""
    device_type = hidden_states.device.type
    if not torch.is_autocast_enabled(device_type):
        return hidden_states, weight, bias
    dtype = torch.get_autocast_dtype(device_type)
    return hidden_states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _validate(
    hidden_states: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    outputs: tuple[str, ...],
) -> None:
    if weight.ndim != 2 or hidden_states.ndim < 1 or hidden_states.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden_states {tuple(hidden_states.shape)} and weight {tuple(weight.shape)} do not "
            "fit: need (..., H) and (V, H). Pass lm_head.weight as it is, not transposed."
        )
    if target_ids.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"target_ids {tuple(target_ids.shape)} do not fit hidden_states "
            f"{tuple(hidden_states.shape)}: need one target per state. Shift before the call."
        )
    if hidden_states.dtype != weight.dtype or not weight.is_floating_point():
        raise ValueError(
            f"hidden_states are {hidden_states.dtype} and weight is {weight.dtype}: need one "
            "floating dtype. Cast one of them, or call under torch.autocast."
        )
    if target_ids.dtype != torch.int64:
        raise ValueError(f"target_ids are {target_ids.dtype}: need int64. Call .long() on them.")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"bias {tuple(bias.shape)} {bias.dtype} does not fit weight {tuple(weight.shape)} "
            f"{weight.dtype}: need ({weight.shape[0]},) of the same dtype."
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}: need a number above 0, or None for no cap.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: need a number above 0.")
    unknown = [name for name in outputs if name not in EXTRA_OUTPUTS]
    if unknown:
        raise ValueError(f"outputs {unknown} are unknown: choose from {EXTRA_OUTPUTS}.")


def _validate_bounds(bounds: Bounds) -> None:
    if bounds.buffer_bytes <= 0:
        raise ValueError(f"max_buffer_mib is {bounds.buffer_bytes / 2**20:g}: need 1 or more.")
    if not 0.0 <= bounds.skip_mass < 1.0:
        raise ValueError(
            f"skip_mass is {bounds.skip_mass}: need a probability below 1; 0 is exact."
        )


def _backend(name: str, hidden_states: Tensor) -> Backend:
    """The module that computes; triton is imported only when it is chosen."""
    half = hidden_states.dtype in (torch.bfloat16, torch.float16)
    if (name == "auto" and not half) or not uses_triton(name, hidden_states):
        return _torch
    from . import _launch

    return _launch


def _validate_range(target_ids: Tensor, vocabulary_size: int) -> None:
    if target_ids.is_cuda or target_ids.numel() == 0:
        return
    low, high = int(target_ids.min()), int(target_ids.max())
    if low < 0 or high >= vocabulary_size:
        raise ValueError(
            f"target_ids lie in [{low}, {high}], the vocabulary in [0, {vocabulary_size - 1}]: the "
            "tokenizer does not belong to this model, or its embeddings were not resized."
        )
