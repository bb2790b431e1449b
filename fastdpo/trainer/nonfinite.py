"""Finds updates whose loss or gradient is not finite, names their rows; or whose gradient is 0."""

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
    if not torch.isfinite(result.loss):
        wrong = ~torch.isfinite(result.logps).all(dim=1)
        named = [g for g, is_wrong in zip(groups, wrong.tolist(), strict=True) if is_wrong]
        return f"loss is {result.loss.item()} ({_rows(named or groups)})"
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    if not check_gradient or torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
        return ""
    return f"gradient is not finite ({_rows(groups)})"


def require_gradient(policy: nn.Module) -> None:
    """Refuse to go on where the first update has no gradient at all: no later one would have.

    Raises:
        ValueError: every gradient is exactly 0, or nothing that is trained had a part in the loss.
    """
    trained = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
    if any(grad is not None and bool(grad.any()) for grad in trained.values()):
        return
    unused = [name for name, grad in trained.items() if grad is None]
    why = (
        f"{len(unused)} of {len(trained)} trained tensors ({unused[0]} ...) have no part in the "
        "loss: the log-probs come from the decoder's layers and the head"
        if unused
        else "the loss does not change with the policy"
    )
    raise ValueError(
        f"the gradient of the first update is exactly 0, so nothing would be trained: {why}. Train "
        "an adapter inside the decoder's layers (LoRA), all weights, or with another loss."
    )


def _rows(groups: Sequence[PromptGroup]) -> str:
    """Rows of the data set that the groups come from, counted from 1."""
    numbers = sorted(group.row + 1 for group in groups)
    shown = ", ".join(map(str, numbers[:MAX_LISTED_ROWS]))
    return f"rows {shown}{' and others' if len(numbers) > MAX_LISTED_ROWS else ''}"
