"""Optimizers as the trainer sees them: which cannot work here, and those with averaged weights."""

import inspect
from typing import Any

from torch.optim import Optimizer
from transformers.training_args import OptimizerNames

WITHIN_BACKWARD = ("lomo", "adalomo", "layerwise")
"""How the names end of those that update weights inside the backward of every micro-batch."""


def refuse_optimizer(optimizer: Optimizer | OptimizerNames | str | None) -> None:
    """Refuse an optimizer that cannot take the gradient of a whole update in one step.

    Args:
        optimizer: one that the user made, the value of `--optim`, or None.

    Raises:
        ValueError: it would fail at its first step or never take one; says why.
    """
    if not isinstance(optimizer, Optimizer):
        name = str(getattr(optimizer, "value", optimizer))
        shown, reason = f"--optim {name}", _reason_by_name(name)
    else:
        shown, reason = type(optimizer).__name__, _reason(optimizer)
    if reason:
        raise ValueError(f"{shown} cannot work here: {reason}; choose another optimizer.")


def _reason_by_name(name: str) -> str:
    if name.lower().endswith(WITHIN_BACKWARD):
        return (
            "it updates the weights within the backward of every micro-batch, and an update here "
            "is the clipped gradient of all its pairs"
        )
    return ""


def _reason(optimizer: Optimizer) -> str:
    if type(optimizer).__name__ == "SparseAdam":
        return "it takes sparse gradients alone, and these are dense"
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return "its step computes the loss again and again, and an update here has one gradient"
    return _reason_by_name(type(optimizer).__name__)


def show_averaged_weights(optimizer: Any) -> None:
    """Let the model have the weights that are evaluated and saved.

    A schedule-free optimizer trains at one point and gives out another, the average of its steps;
    it moves the parameters between the two. Other optimizers have one point: nothing happens.
    """
    if callable(show := getattr(optimizer, "eval", None)):
        show()


def show_training_weights(optimizer: Any) -> None:
    """Let the model have the weights at which a schedule-free optimizer wants the gradient."""
    if callable(show := getattr(optimizer, "train", None)):
        show()
