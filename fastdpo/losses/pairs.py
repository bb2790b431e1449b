"""The log-probs of pairs that a loss may look at, and the accuracy that they have."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class PairLogps:
    """Everything about B pairs that a loss may look at.

    A loss of your own is a callable that takes one of these and returns the (B,) losses of its
    pairs, differentiable in `logps`: `DPOTrainer(..., loss_function=...)`. Their mean over the
    pairs of an update is that update's loss. A micro-batch shows a part of the update's pairs, so
    the loss of a pair may depend on that pair alone; a callable with an attribute `couples_pairs`
    that is True is given the whole update at once.

    Attributes:
        logps: (B, 2) float64, nats: policy log-probs of chosen and rejected, summed over the
            tokens of each completion, the tail weighed by `ld_alpha` where that is set.
        ref_logps: (B, 2) float64, nats, no gradient: reference log-probs, weighed like `logps`; 0
            with `reference_free`.
        tokens: (B, 2) int64: scored tokens of each completion.
        chosen_sums: (B,) float64: plain sum over the tokens of chosen, where `ld_alpha` has
            changed `logps`; None means `logps[:, 0]`.
        weights: (B,) float64, no gradient: weights of the pairs in WPO, else None.
        mean_chosen_tokens: scored chosen tokens per pair, over the whole update; `pair_losses`
            sets it.
    """

    logps: Tensor
    ref_logps: Tensor
    tokens: Tensor
    chosen_sums: Tensor | None = None
    weights: Tensor | None = None
    mean_chosen_tokens: float | Tensor | None = None

    @property
    def logratios(self) -> Tensor:
        """Log-ratios, policy less reference: (B, 2) of chosen and rejected, nats."""
        return self.logps - self.ref_logps

    @property
    def chosen_logratios(self) -> Tensor:
        """Log-ratios of the chosen completions, (B,), nats."""
        return self.logps[:, 0] - self.ref_logps[:, 0]

    @property
    def rejected_logratios(self) -> Tensor:
        """Log-ratios of the rejected completions, (B,), nats."""
        return self.logps[:, 1] - self.ref_logps[:, 1]

    @property
    def margins(self) -> Tensor:
        """Log-ratio of chosen less that of rejected, (B,), nats."""
        return self.chosen_logratios - self.rejected_logratios

    @property
    def mean_logps(self) -> Tensor:
        """Policy log-probs divided by the number of tokens, (B, 2), nats."""
        return self.logps / self.tokens.clamp(min=1)


def pair_accuracies(margins: Tensor) -> Tensor:
    """1 for each pair whose margin is above 0, 0.5 for a margin of 0, else 0; float64."""
    return (margins > 0).double() + 0.5 * (margins == 0).double()


def preference_accuracy(margins: Tensor) -> float:
    """Mean of `pair_accuracies` over (n,) margins: the share of pairs that are ordered right."""
    return float(pair_accuracies(margins).mean())
