"""Finds updates whose loss or gradient is not finite, and names their rows."""

from collections.abc import Sequence

import torch
from torch import nn

from fastdpo.batching import PromptGroup
from fastdpo.trainer.metrics import UpdateResult

MAX_LISTED_ROWS = 8


def nonfinite_reason(
    policy: nn.Module,
    result: UpdateResult,
    groups: Sequence[PromptGroup],
    *,
    check_gradient: bool = True,
) -> str:
    """Describe what is not finite in the loss or gradient of an update.

    Args:
        policy: with its gradient.
        result: what the update computed.
        groups: its B pairs.
        check_gradient: off where a loss scaler looks at the gradient itself.

    Returns:
        The fault with the rows of the pairs, as a sentence without "the"; empty if all is finite.
    """
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    norm = torch.zeros_like(result.loss)
    if check_gradient and gradients:
        norm = torch.nn.utils.get_total_norm(gradients).to(result.loss)
    loss_is_finite, gradient_is_finite = torch.isfinite(torch.stack([result.loss, norm])).tolist()
    if not loss_is_finite:
        wrong = ~torch.isfinite(result.logps).all(dim=1)
        named = [g for g, is_wrong in zip(groups, wrong.tolist(), strict=True) if is_wrong]
        return f"loss is {result.loss.item()} ({_rows(named or groups)})"
    if gradient_is_finite:
        return ""
    return f"gradient is not finite ({_rows(groups)})"


def _rows(groups: Sequence[PromptGroup]) -> str:
    """Rows of the data set that the groups come from, counted from 1."""
    numbers = sorted(group.row + 1 for group in groups)
    shown = ", ".join(map(str, numbers[:MAX_LISTED_ROWS]))
    return f"rows {shown}{' and others' if len(numbers) > MAX_LISTED_ROWS else ''}"
