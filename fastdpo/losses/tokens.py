"""From the log-probs of tokens to the terms of a loss: how tokens are weighed into a completion.

A loss that weighs tokens is added here: its formula, and its term in `completion_terms` and
`pair_logps`. Policy, reference, updates and evaluations all pass through these functions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdpo.losses.pairs import PairLogps
from fastdpo.options import LossOptions


@dataclass(frozen=True, eq=False)
class TokenLogps:
    """Log-probs of C completions with M tokens in all, under the policy or the reference.

    The two completions of a pair may lie anywhere, also in different objects.
    """

    logps: Tensor  # (C,) float64, nats: plain sums over the tokens of each completion
    token_logps: Tensor  # (M,) nats, completion by completion
    tokens: Tensor  # (C,) int64: tokens of each completion; they sum to M
    pair_tokens: Tensor  # (C, 2) int64: tokens of chosen and rejected of each completion's pair
    outputs: Mapping[str, Tensor] = field(default_factory=dict)  # (M,) each: `token_outputs`


def token_outputs(options: LossOptions) -> tuple[str, ...]:
    """Names of the outputs of `linear_logprobs` that the loss needs beside `token_logps`."""
    return ("log_sum_sq_probs",) if options.use_weighting else ()


def weighted_logps(scored: TokenLogps, options: LossOptions) -> Tensor:
    """(C,) float64 log-probs of completions as the loss takes them, nats.

    Policy and reference are weighed alike. Without `LossOptions.weighs_tokens` they are the sums.
    """
    if options.ld_alpha is None:
        return scored.logps
    shared = scored.pair_tokens.amin(dim=1)
    return ld_logps(scored.token_logps, scored.tokens, shared, options.ld_alpha)


def completion_terms(scored: TokenLogps, options: LossOptions) -> dict[str, Tensor]:
    """The numbers of each policy completion that the loss is a function of.

    Returns:
        (C,) float64 by name, differentiable in the log-probs unless a formula says otherwise. They
        go to `pair_logps`, gathered over the two completions of each pair.
    """
    return {name: _TERMS[name](scored, options) for name in term_names(options)}


def term_names(options: LossOptions) -> tuple[str, ...]:
    """The names of the terms that `completion_terms` returns, in its order."""
    sums = ("sums",) if options.weighs_tokens else ()
    return ("logps", *sums, *(("alignment",) if options.use_weighting else ()))


def pair_logps(terms: Mapping[str, Tensor], ref_logps: Tensor, tokens: Tensor) -> PairLogps:
    """The log-probs that a loss looks at, of B pairs.

    Args:
        terms: from `completion_terms`, (2 B,) each: chosen and rejected of each pair in turns.
        ref_logps: (B, 2) float64, nats: `weighted_logps` of the reference.
        tokens: (B, 2) int64: scored tokens.
    """
    pairs = {name: values.view(-1, 2) for name, values in terms.items()}
    return PairLogps(
        logps=pairs["logps"],
        ref_logps=ref_logps,
        tokens=tokens,
        chosen_sums=pairs["sums"][:, 0] if "sums" in pairs else None,
        weights=wpo_weights(pairs["alignment"]) if "alignment" in pairs else None,
    )


def ld_logps(
    token_logps: Tensor, completion_tokens: Tensor, shared_tokens: Tensor, ld_alpha: float
) -> Tensor:
    """Sums of token log-probs in which the tail of the longer completion counts `ld_alpha`.

    Args:
        token_logps: (M,) nats, completion by completion.
        completion_tokens: (C,) int64 tokens of each completion; they sum to M.
        shared_tokens: (C,) int64 tokens of the shorter completion of each one's pair; the tokens
            after that many are the tail.
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
    """Measure how likely the policy itself is to write each completion.

    It is the mean of log pi_t - log sum_v p_v^2 over the tokens t of a completion.

    Args:
        token_logps: (M,) nats, completion by completion.
        log_sum_sq_probs: (M,) log of the sum of p^2 over the vocabulary, an output of
            `linear_logprobs`.
        completion_tokens: (C,) int64 tokens of each completion; they sum to M.

    Returns:
        (C,) float64, nats per token, without gradient.

    Source: WPO, arXiv:2406.11827, section 3, weights aligned to the sampling policy's mean.
    """
    aligned = token_logps.detach().double() - log_sum_sq_probs.detach().double()
    return _sums(aligned, completion_tokens) / completion_tokens.clamp(min=1)


def wpo_weights(alignment: Tensor) -> Tensor:
    """Weights of B pairs, each the product of both completions' exp(`wpo_alignment`).

    Args:
        alignment: (B, 2) of chosen and rejected, nats per token.

    Returns:
        (B,) float64, without gradient.

    Source: WPO, arXiv:2406.11827, equation 2.
    """
    return alignment.detach().sum(dim=1).exp()


def _alignment(scored: TokenLogps, options: LossOptions) -> Tensor:
    squares = scored.outputs["log_sum_sq_probs"]
    return wpo_alignment(scored.token_logps, squares, scored.tokens)


_TERMS: dict[str, Callable[[TokenLogps, LossOptions], Tensor]] = {
    "logps": weighted_logps,
    "sums": lambda scored, options: scored.logps,
    "alignment": _alignment,
}


def _sums(per_token: Tensor, lengths: Tensor) -> Tensor:
    """Sum (M,) values over successive completions of these lengths, (C,)."""
    return torch.segment_reduce(per_token, "sum", lengths=lengths, unsafe=True)
