"""The losses: pure tensor functions of log-probs, from tokens to the loss of an update."""

from fastdpo.losses.formulas import LOSSES
from fastdpo.losses.pairs import PairLogps, pair_accuracies, preference_accuracy
from fastdpo.losses.tokens import (
    TokenLogps,
    completion_terms,
    ld_logps,
    pair_logps,
    term_names,
    token_outputs,
    weighted_logps,
    wpo_alignment,
    wpo_weights,
)
from fastdpo.losses.total import (
    LossFunction,
    couples_pairs,
    needs_reference,
    pair_losses,
)

__all__ = [
    "LOSSES",
    "LossFunction",
    "PairLogps",
    "TokenLogps",
    "completion_terms",
    "couples_pairs",
    "ld_logps",
    "needs_reference",
    "pair_accuracies",
    "pair_logps",
    "pair_losses",
    "preference_accuracy",
    "term_names",
    "token_outputs",
    "weighted_logps",
    "wpo_alignment",
    "wpo_weights",
]
