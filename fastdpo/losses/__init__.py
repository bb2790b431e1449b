"""The losses: pure tensor functions of log-probs per pair; no model, no kernel."""

from fastdpo.losses.formulas import LOSSES
from fastdpo.losses.pairs import PairLogps, ld_logps, wpo_alignment, wpo_weights
from fastdpo.losses.total import (
    LossFunction,
    couples_pairs,
    needs_reference,
    pair_losses,
    token_outputs,
)

__all__ = [
    "LOSSES",
    "LossFunction",
    "PairLogps",
    "couples_pairs",
    "ld_logps",
    "needs_reference",
    "pair_losses",
    "token_outputs",
    "wpo_alignment",
    "wpo_weights",
]
