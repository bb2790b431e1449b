"""Optimizers as the trainer sees them: which cannot work here, and those with averaged weights."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import OptimizerNames

from fastdpo.config import DPOConfig

WITHIN_BACKWARD = ("lomo", "adalomo", "layerwise")
"""How the names end of those that update weights inside the backward of every micro-batch."""


OPTIMIZER_OPTIONS = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
)
"""Options of the optimizer and its schedule that a resumed run shares, or says it changes."""

GROUP_OPTIONS = ("initial_lr", "weight_decay", "betas", "eps")
"""Names of options in an optimizer's groups, where some optimizers keep state of theirs too."""


@contextmanager
def following_options(optimizer: Optimizer, scheduler: Any) -> Iterator[None]:
    """Let this run's options hold after the state of a checkpoint was loaded in the context.

    They are those of the checkpoint, unless a change was allowed; and the schedule may have another
    length now, of which the learning rate in the checkpoint knows nothing. Only for schedules of
    transformers: others keep the rate and more in the optimizer.
    """
    present = [{k: g[k] for k in GROUP_OPTIONS if k in g} for g in optimizer.param_groups]
    yield
    if not isinstance(scheduler, LambdaLR) or any("initial_lr" not in each for each in present):
        return
    for group, options in zip(optimizer.param_groups, present, strict=True):
        group.update(options)
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


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


def check_own_optimizer(optimizer: Optimizer, policy: nn.Module) -> None:
    """Refuse an optimizer of the user's own over other tensors than those that are trained.

    Raises:
        ValueError: it holds a tensor that is no parameter of the model, or none that is trained:
            it was made before the adapter was.
    """
    parameters = {id(each): each for each in policy.parameters()}
    held = [each for group in optimizer.param_groups for each in group["params"]]
    strange = [each for each in held if id(each) not in parameters]
    if strange or not any(each.requires_grad for each in held):
        what = "tensors that are no parameters of the model" if strange else "frozen tensors alone"
        raise ValueError(
            f"the optimizer holds {what} ({len(strange or held)} of {len(held)}), so they could "
            "not be trained and saved: make it after get_peft_model, from the parameters of the "
            "model that is passed, or leave it out and use --optim."
        )


def check_evaluates(scheduler: Any, args: DPOConfig) -> None:
    """Refuse a schedule that follows a metric in a run without evaluations: it would stand still.

    Args:
        scheduler: one that the user made, or None for that of the options.
        args: the options of the run.

    Raises:
        ValueError: the run does not evaluate.
    """
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    by_name = scheduler is None and name in ("reduce_lr_on_plateau", "greedy")
    if (by_name or follows_metric(scheduler)) and args.eval_strategy == IntervalStrategy.NO:
        shown = name if by_name else type(scheduler).__name__
        raise ValueError(
            f"the schedule {shown} follows a metric of evaluations, and --eval_strategy is no: "
            "pass --eval_strategy steps and an evaluation set, or use another schedule."
        )


def follows_metric(scheduler: Any) -> bool:
    """Tell whether a scheduler's step wants a metric (ReduceLROnPlateau, GreedyLR)."""
    if scheduler is None:
        return False
    metrics = inspect.signature(type(scheduler).step).parameters.get("metrics")
    return metrics is not None and metrics.default is inspect.Parameter.empty


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
