"""The loss of pairs as the options define it: a sum of weighted formulas, times WPO's weights."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fastdpo.losses.formulas import LOSSES
from fastdpo.losses.pairs import PairLogps
from fastdpo.options import COUPLED_LOSSES, REFERENCE_FREE_LOSSES, LossOptions

LossFunction = Callable[[PairLogps], Tensor]
"""A loss of the user's own: `PairLogps` is its contract."""


def pair_losses(
    pairs: PairLogps,
    options: LossOptions,
    *,
    update_pairs: int,
    update_chosen_tokens: int | Tensor,
    loss_function: LossFunction | None = None,
) -> Tensor:
    """The losses of B pairs of an update; the update's loss is their sum over `update_pairs`.

    B may be a part of the update (a micro-batch) unless `couples_pairs` says that the loss looks
    across pairs; then the pairs must be the whole update, and the sum alone has a meaning.

    Args:
        pairs: the log-probs of the pairs, and with `use_weighting` their weights.
        options: the losses, their weights and parameters. With `reference_free` the reference
            log-probs count as 0, whatever their values.
        update_pairs: number of pairs of the whole update, or of the whole evaluation set.
        update_chosen_tokens: scored tokens of all its chosen completions.
        loss_function: takes the place of `loss_type` and `loss_weights`.

    Returns:
        (B,) float64, differentiable in `pairs.logps` and `pairs.chosen_sums`.

    Raises:
        ValueError: `use_weighting` without weights; a part of an update for a loss that couples
            its pairs; a `loss_function` that does not return (B,) numbers.
    """
    if couples_pairs(options, loss_function) and len(pairs.logps) != update_pairs:
        raise ValueError(
            f"{len(pairs.logps)} of the update's {update_pairs} pairs were given to a loss that "
            "couples the pairs of an update; give it all of them at once."
        )
    chosen_tokens = torch.as_tensor(update_chosen_tokens, dtype=torch.float64)
    pairs = replace(pairs, mean_chosen_tokens=chosen_tokens / update_pairs)
    if options.reference_free:
        pairs = replace(pairs, ref_logps=torch.zeros_like(pairs.ref_logps))
    if loss_function is not None:
        losses = _checked(loss_function(pairs), len(pairs.logps))
    else:
        weights = options.loss_weights or [1.0] * len(options.loss_type)
        terms = zip(weights, options.loss_type, strict=True)
        losses = torch.stack([w * LOSSES[name](pairs, options) for w, name in terms]).sum(dim=0)
    if not options.use_weighting:
        return losses
    if pairs.weights is None:
        raise ValueError("--use_weighting is on, but the pairs have no weights: see wpo_weights.")
    return losses * pairs.weights


def couples_pairs(options: LossOptions, loss_function: LossFunction | None = None) -> bool:
    """True if the loss of a pair depends on the other pairs of the update.

    `pair_losses` is then called once, on all pairs of the update.
    """
    if loss_function is not None:
        return bool(getattr(loss_function, "couples_pairs", False))
    return any(name in COUPLED_LOSSES for name in options.loss_type)


def needs_reference(options: LossOptions, loss_function: LossFunction | None = None) -> bool:
    """True if reference log-probs are needed; else they count as 0, in the rewards too.

    They are not needed with `reference_free`, nor for simpo and orpo, alone or with sft. For sft
    alone they are, for the logged rewards, as in TRL.
    """
    if options.reference_free:
        return False
    if loss_function is not None or options.loss_type == ["sft"]:
        return True
    return not set(options.loss_type) <= set(REFERENCE_FREE_LOSSES)


def _checked(losses: object, pairs: int) -> Tensor:
    """The (B,) losses of a user's function as float64; ValueError for anything else."""
    returned = type(losses).__name__
    if isinstance(losses, Tensor):
        if losses.shape == (pairs,) and losses.is_floating_point():
            return losses.double()
        returned = f"a tensor of shape {tuple(losses.shape)} and {losses.dtype}"
    raise ValueError(
        f"loss_function returned {returned} for {pairs} pairs; it must return one "
        f"floating-point loss per pair, shape ({pairs},), and leave their mean to the trainer."
    )
