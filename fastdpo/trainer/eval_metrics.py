"""The metrics of one set of pairs under the policy and its reference: an evaluation's, by name."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastdpo.batching import PromptGroup
from fastdpo.losses import (
    LossFunction,
    PairLogps,
    ld_logps,
    pair_losses,
    token_outputs,
    wpo_alignment,
    wpo_weights,
)
from fastdpo.modeling.logprobs import METRIC_OUTPUTS
from fastdpo.modeling.packing import PackingMode
from fastdpo.modeling.scoring import ScoredPairs, score_pairs
from fastdpo.options import LossOptions
from fastdpo.trainer.metrics import MetricSums


def compute_eval_metrics(
    policy: nn.Module,
    groups: Sequence[PromptGroup],
    ref_logps: np.ndarray,
    options: LossOptions,
    *,
    micro_batch_tokens: int,
    mode: PackingMode,
    loss_function: LossFunction | None = None,
    description: str | None = None,
) -> dict[str, float]:
    """TRL's metrics over a set of pairs, every pair weighing the same.

    Args:
        policy: as it is.
        groups: n pairs.
        ref_logps: (n, 2) float64 of chosen and rejected, nats, as the loss takes them.
        options: of the loss; one that couples pairs sees the whole set.
        micro_batch_tokens: T of the pass.
        mode: how pairs run through the model.
        loss_function: in place of the built losses.
        description: beside a progress bar; None shows none.
    """
    outputs = (*METRIC_OUTPUTS, *token_outputs(options))
    layout = {"micro_batch_tokens": micro_batch_tokens, "mode": mode}
    scored = score_pairs(policy, groups, outputs=outputs, description=description, **layout)
    pairs = _pair_logps(scored, torch.from_numpy(ref_logps), options)
    losses = pair_losses(
        pairs,
        options,
        update_pairs=len(groups),
        update_chosen_tokens=int(scored.tokens[:, 0].sum()),
        loss_function=loss_function,
    )
    sums = MetricSums()
    sums.add("loss", losses)
    sums.add_rewards(pairs.logps, pairs.ref_logps, pairs.tokens, options.beta)
    lengths = pairs.tokens.reshape(-1)
    token_rows = torch.arange(len(lengths)).repeat_interleave(lengths)
    sums.add_tokens(token_rows, **{name: scored.extras[name] for name in METRIC_OUTPUTS})
    return sums.averages()


def _pair_logps(scored: ScoredPairs, ref_logps: Tensor, options: LossOptions) -> PairLogps:
    """What the loss looks at."""
    logps, tokens = torch.from_numpy(scored.logps), torch.from_numpy(scored.tokens)
    lengths = tokens.reshape(-1)
    sums = weights = None
    if options.ld_alpha is not None:
        shared = tokens.amin(dim=1).repeat_interleave(2)
        sums = logps[:, 0]
        logps = ld_logps(scored.token_logps, lengths, shared, options.ld_alpha).view(-1, 2)
    for name in token_outputs(options):
        alignment = wpo_alignment(scored.token_logps, scored.extras[name], lengths)
        weights = wpo_weights(alignment.view(-1, 2))
    return PairLogps(logps, ref_logps, tokens, chosen_sums=sums, weights=weights)
