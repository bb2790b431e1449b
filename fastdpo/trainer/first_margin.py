"""The first update as a check: where policy and reference are one, their log-probs are too.

Whatever makes the two differ before anything was trained (a store of another model, dropout that
cannot be turned off, an adapter that does not start at its reference) shows in the first update.
"""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from fastdpo.batching import PromptGroup
from fastdpo.modeling.dropout import has_dropout
from fastdpo.trainer.metrics import UpdateResult

logger = logging.getLogger(__name__)

EXACT = 1e-4
"""Nats a token of a completion, in fp32 and fp64."""

ROUNDED = 0.03
"""Nats a token of a completion in bf16, fp16 and TF32, which round by shapes and kernels."""

ROUNDED_LEAST = 0.5
"""Nats of a whole completion that rounding may make in these, however short it is."""


def drops_out(policy: nn.Module, *, adapter_is_zero: bool) -> bool:
    """Return True if dropout changes the policy's log-probs in training.

    Args:
        policy: the model that is trained.
        adapter_is_zero: whether its LoRA adapter adds nothing yet, dropped out or not.
    """
    return has_dropout(policy) or any(
        isinstance(module, nn.Dropout) and module.p > 0
        for name, module in policy.named_modules()
        if not (adapter_is_zero and "lora_dropout" in name)
    )


def first_margin_fault(
    groups: Sequence[PromptGroup], result: UpdateResult, *, exact: bool
) -> str | None:
    """Describe the completion whose policy and reference log-probs differ most, if they do.

    Args:
        groups: the B pairs of the first update.
        result: what it computed, before any weight has changed.
        exact: whether the matrix products run in fp32 or fp64.

    Returns:
        A sentence with both log-probs, the difference a token and what is allowed; None if all
        differences are rounding.
    """
    apart, tokens = (result.logps - result.ref_logps).abs(), result.tokens
    allowed = EXACT * tokens if exact else (ROUNDED * tokens).clamp(min=ROUNDED_LEAST)
    excess = apart / allowed
    pair, side = divmod(int(excess.flatten().argmax()), 2)
    if not excess[pair, side] > 1:
        return None
    return (
        f"in the first update, where policy and reference are the same model, the "
        f"{('chosen', 'rejected')[side]} completion of row {groups[pair].row + 1} has "
        f"{result.logps[pair, side]:.6f} nats under the policy and "
        f"{result.ref_logps[pair, side]:.6f} under the reference, "
        f"{apart[pair, side] / tokens[pair, side]:.2g} a token apart "
        f"(at most {EXACT if exact else ROUNDED:g})"
    )


def check_first_margin(
    groups: Sequence[PromptGroup], result: UpdateResult, *, exact: bool, action: str
) -> None:
    """Stop or warn where the first update shows that the reference is not the policy's start.

    Takes the arguments of `first_margin_fault`, and `--first_margin`.

    Raises:
        ValueError: they differ and the action is stop; no weight has changed.
    """
    fault = first_margin_fault(groups, result, exact=exact)
    if fault is None:
        return
    if action == "warn":
        logger.warning("Policy and reference differ: %s.", fault)
        return
    raise ValueError(
        f"{fault}. Either the reference log-probs are another model's, or the policy computes "
        "something else in training, as dropout that stays on does; no weight has changed. Try "
        "--ref_cache off, or another --ref_cache folder, and look at the model's dropout; "
        "--first_margin warn goes on."
    )


def is_exact(dtype: torch.dtype, device: torch.device) -> bool:
    """Return True if matrix products of this dtype keep at least fp32's precision on a device."""
    if dtype not in (torch.float32, torch.float64):
        return False
    return device.type != "cuda" or not torch.backends.cuda.matmul.allow_tf32
