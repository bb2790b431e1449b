"""Compares policy and reference on held-out pairs, by metrics and by what both generate."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastdpo import losses
from fastdpo.batching import PromptGroup
from fastdpo.losses.pairs import preference_accuracy
from fastdpo.modeling.adapters import adapters_disabled
from fastdpo.modeling.head import unwrap_model
from fastdpo.modeling.layout import ExecutionLayout
from fastdpo.modeling.loading import eval_mode
from fastdpo.modeling.positions import position_limit
from fastdpo.modeling.scoring import ScoredPairs, score_pairs
from fastdpo.options import LossOptions
from fastdpo.system.console import table


@dataclass(frozen=True)
class LogprobMetrics:
    """Metrics of one model alone on a set of pairs; log-probs in nats, per completion."""

    logps_chosen: float
    logps_rejected: float
    logp_accuracy: float  # share of pairs with logps chosen > rejected
    perplexity_chosen: float  # per token
    perplexity_rejected: float


@dataclass(frozen=True)
class PreferenceMetrics:
    """Metrics of the policy against its reference."""

    loss: float
    preference_accuracy: float  # margin > 0, ties counted 0.5
    margin: float  # nats
    rewards_margin: float  # beta x margin
    rewards_chosen: float
    rewards_rejected: float


@dataclass(frozen=True)
class MetricSlice:
    """Metrics of the policy on a part of the pairs."""

    name: str
    pairs: int
    preference_accuracy: float
    rewards_margin: float


@dataclass(frozen=True)
class Completion:
    """One prompt and what both models generate after it."""

    prompt: str
    reference: str
    policy: str


@dataclass(frozen=True)
class Evaluation:
    """The metrics of `python -m fastdpo.evaluate`."""

    pairs: int
    beta: float
    loss_type: str
    reference: LogprobMetrics
    policy: LogprobMetrics
    preference: PreferenceMetrics
    shares: tuple[MetricSlice, ...] = ()
    completions: tuple[Completion, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The metrics as `--output_file` stores them."""
        return asdict(self)

    def describe(self) -> str:
        """A table of the metrics of both models side by side, then the completions."""
        rows = [
            (name.replace("_", " "), f"{reference:.4f}", f"{policy:.4f}")
            for (name, reference), policy in zip(
                asdict(self.reference).items(), asdict(self.policy).values(), strict=True
            )
        ]
        rows += [
            ("margin, nats" if name == "margin" else name.replace("_", " "), "-", f"{value:.4f}")
            for name, value in asdict(self.preference).items()
        ]
        text = table((f"{self.pairs:,} pairs, beta {self.beta:g}", "reference", "policy"), rows)
        if self.shares:
            parts = [
                (s.name, f"{s.pairs:,}", f"{s.preference_accuracy:.4f}", f"{s.rewards_margin:.4f}")
                for s in self.shares
            ]
            columns = ("of these", "pairs", "preference accuracy", "rewards margin")
            text += "\n\n" + table(columns, parts)
        for completion in self.completions:
            text += (
                f"\n\nprompt:    {completion.prompt!r}\nreference: {completion.reference!r}"
                f"\npolicy:    {completion.policy!r}"
            )
        return text


def evaluate_scored(
    policy: ScoredPairs,
    reference: ScoredPairs,
    *,
    beta: float,
    loss_type: str = "sigmoid",
    completions: Sequence[Completion] = (),
    sources: Sequence[Any] = (),
) -> Evaluation:
    """Metrics from the log-probs of the same n pairs under both models.

    Args:
        policy: log-probs and scored tokens under the policy.
        reference: log-probs and scored tokens under the reference.
        beta: reward per nat.
        loss_type: one of `fastdpo.losses.LOSSES`.
        completions: texts that both models generated.
        sources: the source of each pair, n values or none; None for a pair that has no source.
    """
    logratios = torch.from_numpy(policy.logps - reference.logps)
    margins = logratios[:, 0] - logratios[:, 1]
    rewards = beta * logratios.mean(dim=0)
    tokens = torch.from_numpy(policy.tokens)
    loss = losses.pair_losses(
        losses.PairLogps(torch.from_numpy(policy.logps), torch.from_numpy(reference.logps), tokens),
        LossOptions(beta=beta, loss_type=[loss_type]),
        update_pairs=len(tokens),
        update_chosen_tokens=int(tokens[:, 0].sum()),
    ).mean()
    return Evaluation(
        pairs=len(margins),
        beta=beta,
        loss_type=loss_type,
        reference=_logprob_metrics(reference),
        policy=_logprob_metrics(policy),
        preference=PreferenceMetrics(
            loss=float(loss),
            preference_accuracy=preference_accuracy(margins),
            margin=float(margins.mean()),
            rewards_margin=float(beta * margins.mean()),
            rewards_chosen=float(rewards[0]),
            rewards_rejected=float(rewards[1]),
        ),
        shares=_metrics_by_slice(margins, policy.tokens, sources, beta),
        completions=tuple(completions),
    )


def score_both(
    model: nn.Module, groups: Sequence[PromptGroup], *, micro_batch_tokens: int
) -> tuple[ScoredPairs, ScoredPairs]:
    """Log-probs of pairs under one model with its adapters on (policy), then off (reference).

    Args:
        model: a PeftModel.
        groups: n pairs.
        micro_batch_tokens: T of both passes.
    """
    layout = ExecutionLayout(micro_batch_tokens)
    policy = score_pairs(model, groups, layout, description="Scoring with the policy")
    with adapters_disabled(model):
        reference = score_pairs(model, groups, layout, description="Scoring with the reference")
    return policy, reference


def generate_completions(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    reference: bool = False,
) -> list[str]:
    """Generate one greedy completion for each prompt, without special tokens.

    Args:
        model: a causal LM or a PeftModel on it.
        tokenizer: decodes the completions, and knows the token that ends one.
        prompts: token ids of each prompt, (P,).
        max_new_tokens: most tokens to generate; fewer where the model's positions end.
        reference: generate with the adapters off.
    """
    causal_lm = unwrap_model(model)
    off: AbstractContextManager[None] = adapters_disabled(model) if reference else nullcontext()
    limit = position_limit(model)
    texts = []
    with off, eval_mode(model), torch.no_grad():
        for prompt in prompts:
            ids = torch.from_numpy(prompt.astype(np.int64))[None].to(causal_lm.device)
            room = limit.tokens - len(prompt) if limit and limit.is_hard else max_new_tokens
            if room < 1:
                texts.append("")
                continue
            written = model.generate(  # pyrefly: ignore[not-callable]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(max_new_tokens, room),
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
            text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
            texts.append(str(text))
    return texts


def _metrics_by_slice(
    margins: Tensor,  # (n,) nats
    tokens: np.ndarray,  # (n, 2)
    sources: Sequence[Any],
    beta: float,
) -> tuple[MetricSlice, ...]:
    """Metrics of the pairs whose chosen side is shorter, as long, longer; then of each source.

    A policy that has learned length alone is right where chosen is longer and wrong elsewhere.
    """
    difference = tokens[:, 0] - tokens[:, 1]
    parts = {
        "chosen is shorter": difference < 0,
        "both are as long": difference == 0,
        "chosen is longer": difference > 0,
    }
    named = np.array([None if source is None else str(source) for source in sources], dtype=object)
    for name in sorted({name for name in named if name is not None}):
        parts[f"source {name}"] = named == name
    return tuple(
        MetricSlice(
            name,
            int(part.sum()),
            preference_accuracy(margins[torch.from_numpy(part)]),
            float(beta * margins[torch.from_numpy(part)].mean()),
        )
        for name, part in parts.items()
        if part.any()
    )


def _logprob_metrics(scored: ScoredPairs) -> LogprobMetrics:
    logps, tokens = scored.logps, scored.tokens
    perplexities = [math.exp(min(-logps[:, s].sum() / tokens[:, s].sum(), 700.0)) for s in (0, 1)]
    return LogprobMetrics(
        logps_chosen=float(logps[:, 0].mean()),
        logps_rejected=float(logps[:, 1].mean()),
        logp_accuracy=float((logps[:, 0] > logps[:, 1]).mean()),
        perplexity_chosen=perplexities[0],
        perplexity_rejected=perplexities[1],
    )
