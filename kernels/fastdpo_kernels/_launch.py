"""The Triton backend: launches the kernels chunk by chunk.

Every kernel launch of a call is a `Launch` made by a method of `Chunk`, so that what a call would
compile can be listed without a GPU (`launches`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._buffers import Call, Plan
from ._chunk import Chunk, Launch
from ._configs import LaunchConfig
from ._torch import Request, RowStatistics, empty_statistics


def score(
    hidden_states: Tensor,  # (N, H)
    target_ids: Tensor,  # (N,)
    request: Request,
) -> RowStatistics:
    """One pass over the vocabulary; logits never leave the chip."""
    if not len(target_ids):
        return empty_statistics(hidden_states, request)
    call = Call(Plan(request), hidden_states, target_ids, gradients=None)
    for rows in call.slices():
        chunk = Chunk(call, rows)
        for launch in chunk.scoring():
            launch.run()
    return call.statistics()


def score_with_gradient(
    hidden_states: Tensor,  # (N, H)
    target_ids: Tensor,  # (N,)
    request: Request,
) -> tuple[RowStatistics, Tensor]:
    """Score as `score` does, and return U = dlogp/dh too, (N, H) in the hidden states' dtype."""
    gradients = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    if not len(target_ids):
        return empty_statistics(hidden_states, request), gradients
    call = Call(Plan(request), hidden_states, target_ids, gradients)
    for rows in call.slices():
        chunk = Chunk(call, rows)
        for launch in chunk.scoring():
            launch.run()
        if chunk.plan.one_scale:
            chunk.rescale().run()
        if chunk.plan.multiplies:
            chunk.multiply()
            chunk.finish().run()
        else:
            chunk.gradient().run()
    return call.statistics(), gradients


def launches(
    hidden_states: Tensor,
    target_ids: Tensor,
    request: Request,
    config: LaunchConfig | None = None,
    *,
    with_gradient: bool = True,
) -> list[Launch]:
    """List the launches of a call's first chunk, in order; nothing runs.

    With meta tensors nothing is allocated either; `config` then stands in for the GPU's.
    """
    plan = Plan(request) if config is None else Plan(request, config)
    gradients = torch.empty_like(hidden_states) if with_gradient else None
    call = Call(plan, hidden_states, target_ids, gradients)
    chunk = Chunk(call, next(call.slices()))
    found = list(chunk.scoring())
    if with_gradient and plan.one_scale:
        found.append(chunk.rescale())
    if with_gradient:
        found.append(chunk.finish() if plan.multiplies else chunk.gradient())
    return found
