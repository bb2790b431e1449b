"""The metrics of one evaluation: a set of pairs under the policy, beside its reference."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction

from fastdpo.batching import PromptGroup
from fastdpo.losses import (
    LossFunction,
    TokenLogps,
    completion_terms,
    pair_logps,
    pair_losses,
    token_outputs,
)
from fastdpo.modeling.layout import ExecutionLayout
from fastdpo.modeling.logprobs import METRIC_OUTPUTS
from fastdpo.modeling.packing import PackingMode
from fastdpo.modeling.scoring import score_pairs
from fastdpo.options import LossOptions
from fastdpo.trainer.metrics import MetricSums, PairsResult


def compute_eval_metrics(
    policy: nn.Module,
    groups: Sequence[PromptGroup],
    ref_logps: np.ndarray,
    options: LossOptions,
    *,
    layout: ExecutionLayout,
    mode: PackingMode,
    loss_function: LossFunction | None = None,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    description: str | None = None,
) -> dict[str, float]:
    """TRL's metrics over a set of pairs, every pair weighing the same.

    Args:
        policy: the model, with its adapters on or off as they are.
        groups: n pairs.
        ref_logps: (n, 2) float64 of chosen and rejected, nats, as the loss takes them.
        options: the loss; one that couples pairs sees the whole set.
        layout: bounds the micro-batches, and is lowered where memory runs out.
        mode: how pairs run through the model.
        loss_function: takes the place of the built losses.
        compute_metrics: gives further metrics; see `DPOTrainer`.
        description: label of a progress bar; None shows none.
    """
    outputs = (*METRIC_OUTPUTS, *token_outputs(options))
    scored = score_pairs(
        policy, groups, layout, outputs=outputs, mode=mode, description=description
    )
    tokens = torch.from_numpy(scored.tokens)
    lengths = tokens.flatten()
    terms = completion_terms(
        TokenLogps(
            torch.from_numpy(scored.logps).flatten(),
            scored.token_logps,
            lengths,
            tokens.repeat_interleave(2, dim=0),
            scored.extras,
        ),
        options,
    )
    pairs = pair_logps(terms, torch.from_numpy(ref_logps), tokens)
    losses = pair_losses(
        pairs,
        options,
        update_pairs=len(groups),
        update_chosen_tokens=int(tokens[:, 0].sum()),
        loss_function=loss_function,
    )
    result = PairsResult(
        loss=losses.sum() / len(groups),
        logps=pairs.logps,
        ref_logps=pairs.ref_logps,
        tokens=tokens,
        token_metrics={name: scored.extras[name] for name in METRIC_OUTPUTS},
        token_completions=torch.arange(len(lengths)).repeat_interleave(lengths),
    )
    sums = MetricSums()
    sums.add_pairs(result, options.beta)
    further: dict[str, float] = {}
    if compute_metrics is not None:
        logps: Any = (pairs.logps.detach().cpu().numpy(), pairs.ref_logps.cpu().numpy())
        chosen = np.zeros(len(groups), dtype=np.int64)
        further = compute_metrics(EvalPrediction(predictions=logps, label_ids=chosen))
    return sums.averages() | further
