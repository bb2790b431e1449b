"""Finds what is wrong with an update: loss, gradient or weights not finite, or no gradient."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn

from fastdpo.batching import PromptGroup
from fastdpo.modeling.finite import named, nonfinite_tensors, saved_tensors, trained_tensors
from fastdpo.trainer.metrics import UpdateResult

MAX_LISTED_ROWS = 8


def nonfinite_reason(
    parameters: Sequence[nn.Parameter],
    result: UpdateResult,
    groups: Sequence[PromptGroup],
    *,
    check_gradient: bool = True,
) -> str:
    """Describe what is not finite in the loss or gradient of an update.

    Args:
        parameters: of the policy, with their gradients.
        result: what the update computed.
        groups: its B pairs.
        check_gradient: off where a loss scaler looks at the gradient itself.

    Returns:
        The fault with the rows of the pairs, as a sentence without "the"; empty if all is finite.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
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


def require_finite_step(policy: nn.Module, update: int) -> None:
    """Look at an adapter after its last optimizer step, and where a loss is not finite.

    Between, nothing waits for the device: a step that spoils a weight spoils the next loss. Before
    a save all that is written is looked at.

    Raises:
        FloatingPointError: it is not finite, and nothing can bring it back.
    """
    if isinstance(policy, PeftModel):
        _require_finite(trained_tensors(policy), update)


def require_finite_weights(policy: nn.Module, update: int) -> None:
    """Look at everything that a save would write.

    Raises:
        FloatingPointError: a tensor is not finite.
    """
    _require_finite(saved_tensors(policy), update)


def _require_finite(tensors: dict[str, Tensor], update: int) -> None:
    if wrong := nonfinite_tensors(tensors):
        raise FloatingPointError(
            f"the weights after update {update} are not finite: {named(wrong, len(tensors))}. None "
            "of them were saved; checkpoints of earlier updates are as they were. Loss and "
            "gradient were finite, so look at the optimizer: lower the learning rate, and leave "
            "--adam_epsilon near 1e-8."
        )


def _rows(groups: Sequence[PromptGroup]) -> str:
    """Rows of the data set that the groups come from, counted from 1."""
    numbers = sorted(group.row + 1 for group in groups)
    shown = ", ".join(map(str, numbers[:MAX_LISTED_ROWS]))
    return f"rows {shown}{' and others' if len(numbers) > MAX_LISTED_ROWS else ''}"
