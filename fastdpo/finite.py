"""Whether an update may be applied: what of it is not finite, and in which rows."""

from collections.abc import Sequence

import torch
from torch import nn

from fastdpo.batching import Group
from fastdpo.update import UpdateResult

MOST_ROWS = 8


def what_is_not_finite(
    policy: nn.Module, result: UpdateResult, groups: Sequence[Group], *, check_gradient: bool = True
) -> str:
    """Look at loss and gradient of one update.

    Args:
        policy: with its gradient.
        result: of the update.
        groups: its B pairs.
        check_gradient: off where a loss scaler looks at the gradient itself.

    Returns:
        What is wrong, to follow "the", with the rows; empty if all is finite.
    """
    if not torch.isfinite(result.loss):
        wrong = ~torch.isfinite(result.logps).all(dim=1)
        named = [g for g, is_wrong in zip(groups, wrong.tolist(), strict=True) if is_wrong]
        return f"loss is {result.loss.item()} ({_rows(named or groups)})"
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    if not check_gradient or torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
        return ""
    return f"gradient is not finite ({_rows(groups)})"


def _rows(groups: Sequence[Group]) -> str:
    """Which rows of the data set, for people: the first is 1."""
    numbers = sorted(group.row + 1 for group in groups)
    shown = ", ".join(map(str, numbers[:MOST_ROWS]))
    return f"rows {shown}{' and others' if len(numbers) > MOST_ROWS else ''}"
