"""What a loss may look at: the log-probs of pairs, and how tokens are weighed into them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PairLogps:
    """Everything a loss may look at, of B pairs.

    A loss of your own is a callable that takes one of these and returns the (B,) losses of its
    pairs, differentiable in `logps`: `DPOTrainer(..., loss_function=...)`. Their mean over the
    pairs of an update is that update's loss. A micro-batch shows a part of the update's pairs, so
    the loss of a pair may depend on that pair alone; a callable with an attribute `couples_pairs`
    that is True is given the whole update at once.

    Attributes:
        logps: (B, 2) float64, nats: policy log-probs of chosen and rejected, summed over the
            tokens of each completion, the tail weighed by `ld_alpha` where that is set.
        ref_logps: (B, 2) float64, nats, no gradient: likewise of the reference; 0 with
            `reference_free`.
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
        """(B, 2) policy less reference, nats."""
        return self.logps - self.ref_logps

    @property
    def chosen_logratios(self) -> Tensor:
        """(B,) policy less reference of chosen, nats."""
        return self.logps[:, 0] - self.ref_logps[:, 0]

    @property
    def rejected_logratios(self) -> Tensor:
        """(B,) policy less reference of rejected, nats."""
        return self.logps[:, 1] - self.ref_logps[:, 1]

    @property
    def margins(self) -> Tensor:
        """(B,) chosen less rejected log-ratio, nats."""
        return self.chosen_logratios - self.rejected_logratios

    @property
    def mean_logps(self) -> Tensor:
        """(B, 2) policy log-probs per token, nats."""
        return self.logps / self.tokens.clamp(min=1)


def ld_logps(
    token_logps: Tensor, completion_tokens: Tensor, shared_tokens: Tensor, ld_alpha: float
) -> Tensor:
    """Summed log-probs of completions whose tail counts `ld_alpha`; for policy and reference alike.

    Args:
        token_logps: (M,) nats, completion by completion.
        completion_tokens: (C,) int64 tokens of each completion; they sum to M.
        shared_tokens: (C,) int64 tokens of the shorter completion of each one's pair; what comes
            after as many is the tail.
        ld_alpha: 0 leaves the tail out, 1 changes nothing.

    Returns:
        (C,) float64, nats, differentiable in `token_logps`.

    Source: LD-DPO, arXiv:2409.06411.
    """
    starts = completion_tokens.cumsum(0) - completion_tokens
    tail_starts = (starts + shared_tokens).repeat_interleave(completion_tokens)
    in_tail = torch.arange(len(token_logps), device=token_logps.device) >= tail_starts
    whole = token_logps.double()
    return _sums(torch.where(in_tail, ld_alpha * whole, whole), completion_tokens)


def wpo_alignment(
    token_logps: Tensor, log_sum_sq_probs: Tensor, completion_tokens: Tensor
) -> Tensor:
    """How likely the policy itself is to write a completion: mean of log pi_t - log sum_v p_v^2.

    Args:
        token_logps: (M,) nats, completion by completion.
        log_sum_sq_probs: (M,) log of the sum over the vocabulary of p^2: the output of that
            name of `linear_logprobs`.
        completion_tokens: (C,) int64 tokens of each completion; they sum to M.

    Returns:
        (C,) float64, nats per token, without gradient.

    Source: WPO, arXiv:2406.11827, section 3, weights aligned to the sampling policy's mean.
    """
    aligned = token_logps.detach().double() - log_sum_sq_probs.detach().double()
    return _sums(aligned, completion_tokens) / completion_tokens.clamp(min=1)


def wpo_weights(alignment: Tensor) -> Tensor:
    """Weights of B pairs: the product of both completions' exp(`wpo_alignment`).

    Args:
        alignment: (B, 2) of chosen and rejected, nats per token.

    Returns:
        (B,) float64, without gradient.

    Source: WPO, arXiv:2406.11827, equation 2.
    """
    return alignment.detach().sum(dim=1).exp()


def _sums(per_token: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(per_token, "sum", lengths=lengths, unsafe=True)


def preference_accuracy(margins: Tensor) -> float:
    """Share of pairs whose margin is above 0, ties counted 0.5; `margins` is (n,)."""
    return float(((margins > 0).double() + 0.5 * (margins == 0).double()).mean())
