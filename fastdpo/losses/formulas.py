"""Preference losses: pure functions of the log-probs of pairs, one formula each.

Each takes the pairs and the loss options and returns (B,) float64 losses. Names in the formulas:
`c`, `r` log-ratios of chosen and rejected; `d` their difference after the f-divergence; `b` beta;
`e` label_smoothing; `ls` log sigmoid; `C`, `R` tokens of chosen and rejected. Finite, with finite
gradients, for log-ratios of 10,000 nats either way.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.pairs import PairLogps
from fastdpo.options import LossOptions

_LARGEST_EXPONENT = 40.0  # the gradient of e^40 squared still fits into float32
_LARGEST_MEAN_LOGP = -(2.0**-52)  # a probability of 1 has no odds


def divergence_scores(logratios: Tensor, options: LossOptions) -> Tensor:
    """f'(u) of the chosen f-divergence between policy and reference, u being exp(log-ratio).

    Reverse KL (log u) is DPO. Exponents are clamped at 40: a completion that the policy has moved
    that far from no longer pulls.

    Args:
        logratios: policy less reference log-probs, nats, any shape.
        options: `f_divergence_type` and, for alpha_divergence, `f_alpha_divergence_coef`.

    Returns:
        Scores of the same shape; beta times their difference takes the place of DPO's logit.

    Source: f-DPO, arXiv:2309.16240, table 1.
    """
    kind = options.f_divergence_type
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    alpha = {"reverse_kl": 1.0, "forward_kl": 0.0}.get(kind, options.f_alpha_divergence_coef)
    if abs(alpha - 1) < 1e-6:
        return logratios
    return torch.expm1(((alpha - 1) * logratios).clamp(max=_LARGEST_EXPONENT)) / (alpha - 1)


def _score_margins(pairs: PairLogps, options: LossOptions) -> Tensor:
    scores = divergence_scores(pairs.logratios, options)
    return scores[:, 0] - scores[:, 1]


def _mean_score_margins(pairs: PairLogps, options: LossOptions) -> Tensor:
    scores = divergence_scores(pairs.logratios, options) / pairs.tokens.clamp(min=1)
    return scores[:, 0] - scores[:, 1]


def _smoothed(logits: Tensor, options: LossOptions) -> Tensor:
    """Cross entropy of `logits` with a label that is wrong with probability e."""
    smoothing = options.label_smoothing
    loss = -(1 - smoothing) * F.logsigmoid(logits)
    return loss - smoothing * F.logsigmoid(-logits) if smoothing else loss


def sigmoid(pairs: PairLogps, options: LossOptions) -> Tensor:
    """DPO, and cDPO where e > 0: -(1 - e) ls(b d) - e ls(-b d).

    Source: arXiv:2305.18290, equation 7; smoothing: E. Mitchell, A note on DPO with noisy
    preferences (ericmitchell.ai/cdpo.pdf). TRL 1.16 leaves label_smoothing out of this loss.
    """
    return _smoothed(options.beta * _score_margins(pairs, options), options)


def hinge(pairs: PairLogps, options: LossOptions) -> Tensor:
    """max(0, 1 - b d). RSO is this loss on rejection-sampled data, so `rso` names it too.

    Source: SLiC-HF, arXiv:2305.10425; with a reference: RSO, arXiv:2309.06657.
    """
    return F.relu(1 - options.beta * _score_margins(pairs, options))


def ipo(pairs: PairLogps, options: LossOptions) -> Tensor:
    """(c / C - r / R - 1 / (2 b))^2, per token as the authors run it.

    Source: arXiv:2310.12036, equation 17, whose tau is beta.
    """
    return (_mean_score_margins(pairs, options) - 1 / (2 * options.beta)).square()


def exo_pair(pairs: PairLogps, options: LossOptions) -> Tensor:
    """KL of (s, 1 - s), s = sigmoid(b d), from the smoothed label (1 - e, e); needs e > 0.

    Source: EXO, arXiv:2402.00856, equation 16.
    """
    logits = options.beta * _score_margins(pairs, options)
    smoothing = options.label_smoothing
    won = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-smoothing))
    return won + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(smoothing))


def nca_pair(pairs: PairLogps, options: LossOptions) -> Tensor:
    """-ls(b c) - ls(-b c) / 2 - ls(-b r) / 2.

    Source: NCA, arXiv:2402.05369.
    """
    chosen, rejected = (options.beta * pairs.logratios).unbind(dim=1)
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def robust(pairs: PairLogps, options: LossOptions) -> Tensor:
    """(-(1 - e) ls(b d) + e ls(-b d)) / (1 - 2 e): unbiased where labels flip with probability e.

    Source: Robust DPO, arXiv:2403.00409.
    """
    logits, smoothing = options.beta * _score_margins(pairs, options), options.label_smoothing
    loss = -(1 - smoothing) * F.logsigmoid(logits) + smoothing * F.logsigmoid(-logits)
    return loss / (1 - 2 * smoothing)


def bco_pair(pairs: PairLogps, options: LossOptions) -> Tensor:
    """-ls(b c) - ls(-b r), without the paper's running shift of the rewards, as in TRL 1.16.

    Source: BCO, arXiv:2404.04656.
    """
    chosen, rejected = (options.beta * pairs.logratios).unbind(dim=1)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard(pairs: PairLogps, options: LossOptions) -> Tensor:
    """(c - 1 / (2 b))^2 + (r + 1 / (2 b))^2: chosen wins with probability 1.

    Source: SPPO, arXiv:2405.00675, equation 4.7.
    """
    chosen, rejected = pairs.logratios.unbind(dim=1)
    target = 0.5 / options.beta
    return (chosen - target).square() + (rejected + target).square()


def aot(pairs: PairLogps, options: LossOptions) -> Tensor:
    """Smoothed -ls(b D), D = sort(policy margins) - sort(reference margins) over the update.

    The k-th loss belongs to the k-th smallest margin, not to the k-th pair.

    Source: AOT, arXiv:2406.05882, the paired variant.
    """
    policy = pairs.logps[:, 0] - pairs.logps[:, 1]
    reference = pairs.ref_logps[:, 0] - pairs.ref_logps[:, 1]
    return _smoothed(options.beta * (policy.sort().values - reference.sort().values), options)


def aot_unpaired(pairs: PairLogps, options: LossOptions) -> Tensor:
    """Smoothed -ls(b D), D = sort(c) - sort(r) over the update; the k-th loss is of the k-th rank.

    Source: AOT, arXiv:2406.05882, the unpaired variant.
    """
    chosen, rejected = pairs.logratios.sort(dim=0).values.unbind(dim=1)
    return _smoothed(options.beta * (chosen - rejected), options)


def apo_zero(pairs: PairLogps, options: LossOptions) -> Tensor:
    """1 - sigmoid(b c) + sigmoid(b r): chosen up, rejected down.

    Source: APO, arXiv:2408.06266, equation 7.
    """
    chosen, rejected = (options.beta * pairs.logratios).unbind(dim=1)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(pairs: PairLogps, options: LossOptions) -> Tensor:
    """sigmoid(b c) + 1 - sigmoid(b (c - r)): both down, rejected further.

    Source: APO, arXiv:2408.06266, equation 8.
    """
    chosen = torch.sigmoid(options.beta * pairs.chosen_logratios)
    return chosen + torch.sigmoid(-options.beta * pairs.margins)


def discopop(pairs: PairLogps, options: LossOptions) -> Tensor:
    """(1 - m) (-ls(l)) + m exp(-l), l = b d, m = sigmoid(l / tau).

    m exp(-l) is computed as exp(ls(l / tau) - l), which is at most 1 for tau <= 1; the product
    itself is 0 x inf, hence NaN in TRL 1.16, for l below -88 in float32.

    Source: DiscoPOP, arXiv:2406.08414, equation 5.
    """
    logits = options.beta * _score_margins(pairs, options)
    modulation = logits / options.discopop_tau
    logistic = torch.sigmoid(-modulation) * -F.logsigmoid(logits)
    return logistic + torch.exp(F.logsigmoid(modulation) - logits)


def sft(pairs: PairLogps, options: LossOptions) -> Tensor:
    """-log pi(chosen) / (chosen tokens per pair of the update): their mean is that over tokens.

    The NLL term of RPO (arXiv:2404.19733) and MPO (arXiv:2411.10442); without a reference.
    """
    if pairs.mean_chosen_tokens is None:
        raise ValueError("the sft loss needs mean_chosen_tokens; pair_losses sets it.")
    sums = pairs.logps[:, 0] if pairs.chosen_sums is None else pairs.chosen_sums
    return -sums / pairs.mean_chosen_tokens


def sigmoid_norm(pairs: PairLogps, options: LossOptions) -> Tensor:
    """DPO per token: smoothed -ls(b (c / C - r / R)).

    Source: length-normalised DPO, Tulu 3, arXiv:2411.15124.
    """
    return _smoothed(options.beta * _mean_score_margins(pairs, options), options)


def simpo(pairs: PairLogps, options: LossOptions) -> Tensor:
    """Smoothed -ls(b (mean log pi(chosen) - mean log pi(rejected)) - gamma), without a reference.

    Source: SimPO, arXiv:2405.14734, equation 6.
    """
    chosen, rejected = pairs.mean_logps.unbind(dim=1)
    return _smoothed(options.beta * (chosen - rejected) - options.simpo_gamma, options)


def orpo(pairs: PairLogps, options: LossOptions) -> Tensor:
    """-ls(log odds(chosen) - log odds(rejected)), odds(p) = p / (1 - p), log p per token.

    The odds-ratio term alone, without a reference and without beta; ORPO is the sum of `sft` and
    lambda times this, lambda being a loss weight.

    Source: ORPO, arXiv:2403.07691, equation 7.
    """
    mean_logps = pairs.mean_logps
    log_complements = torch.log(-torch.expm1(mean_logps.clamp(max=_LARGEST_MEAN_LOGP)))
    chosen, rejected = (mean_logps - log_complements).unbind(dim=1)
    return -F.logsigmoid(chosen - rejected)


LOSSES: dict[str, Callable[[PairLogps, LossOptions], Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
    "sigmoid_norm": sigmoid_norm,
    "simpo": simpo,
    "orpo": orpo,
    "rso": hinge,
}
"""Every loss by the name that TRL, and for the last three LLaMA-Factory or torchtune, gives it."""
