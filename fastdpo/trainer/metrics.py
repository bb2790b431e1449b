"""The metrics of training and evaluation under TRL's names, as sums that any split adds up to."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdpo.batching import PromptGroup
from fastdpo.trainer.update import UpdateResult


@dataclass
class MetricSums:
    """Sums over pairs and tokens since they were last read; they stay on their device till then."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, values: Tensor, count: float | None = None) -> None:
        """Take in the values, weighted by their number or by `count`."""
        total = values.detach().double().sum()
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0.0) + (
            values.numel() if count is None else count
        )

    def add_rewards(
        self,
        logps: Tensor,  # (B, 2) chosen, rejected; nats
        ref_logps: Tensor,  # (B, 2)
        tokens: Tensor,  # (B, 2) scored tokens
        beta: float,
    ) -> None:
        """Rewards, accuracies, log-probs and lengths of B pairs."""
        logratios = (logps - ref_logps).detach()
        rewards = beta * logratios
        margins = rewards[:, 0] - rewards[:, 1]
        self.add("rewards/chosen", rewards[:, 0])
        self.add("rewards/rejected", rewards[:, 1])
        self.add("rewards/accuracies", (margins > 0).double() + 0.5 * (margins == 0).double())
        self.add("rewards/margins", margins)
        self.add("logps/chosen", logps[:, 0])
        self.add("logps/rejected", logps[:, 1])
        self.add("logratios/chosen_per_token", logratios[:, 0] / tokens[:, 0])
        self.add("logratios/rejected_per_token", logratios[:, 1] / tokens[:, 1])
        self.add("lengths/chosen", tokens[:, 0])
        self.add("lengths/rejected", tokens[:, 1])

    def add_tokens(
        self,
        token_rows: Tensor,  # (M,) int64: 2 x pair + (0 chosen, 1 rejected) of each token
        entropy: Tensor,  # (M,)
        mean_logits: Tensor,  # (M,)
        is_top1: Tensor,  # (M,) bool
    ) -> None:
        """The metrics that cost a look at the whole vocabulary."""
        rejected = (token_rows % 2).bool()
        self.add("entropy", entropy)
        self.add("logits/chosen", mean_logits[~rejected])
        self.add("logits/rejected", mean_logits[rejected])
        self.add("mean_token_accuracy", is_top1[~rejected])

    def averages(self) -> dict[str, float]:
        """Mean of each metric; empty metrics are left out."""
        return {
            name: total.item() / self.counts[name]
            for name, total in self.sums.items()
            if self.counts[name] > 0
        }

    def clear(self) -> None:
        """Start anew."""
        self.sums.clear()
        self.counts.clear()


class Throughput:
    """Pairs and tokens a second between two log lines."""

    def __init__(self) -> None:
        self.began_s: float | None = None
        self.pairs = 0
        self.tokens = 0

    def start(self) -> None:
        """The clock runs from the first update after a log line."""
        if self.began_s is None:
            self.began_s = time.perf_counter()

    def add(self, pairs: int, tokens: int) -> None:
        """Count one update."""
        self.pairs += pairs
        self.tokens += tokens

    def metrics(self) -> dict[str, float]:
        """Rates under their logged names; nothing before the first update."""
        if self.began_s is None:
            return {}
        elapsed_s = time.perf_counter() - self.began_s
        return {
            "perf/pairs_per_second": self.pairs / elapsed_s,
            "perf/tokens_per_second": self.tokens / elapsed_s,
        }


def num_input_tokens(groups: Sequence[PromptGroup]) -> int:
    """Tokens as TRL counts them: of both rows of every pair, the prompt twice."""
    return sum(
        len(group.completions) * len(group.prompt_ids) + sum(map(len, group.completions))
        for group in groups
    )


class TrainingMetrics:
    """Adds up the updates of a run.

    Attributes:
        tokens_seen: in all, as TRL counts them.
        skipped_updates: in all, for a loss or gradient that was not finite.
        first_update_margin: largest absolute margin of the run's first update, nats.
    """

    def __init__(self) -> None:
        self.tokens_seen = 0
        self.skipped_updates = 0
        self.first_update_margin: float | None = None
        self._sums, self._throughput = MetricSums(), Throughput()

    def start(self) -> None:
        """An update begins."""
        self._throughput.start()

    def add(self, groups: Sequence[PromptGroup], result: UpdateResult, beta: float) -> None:
        """An update is done."""
        if self.first_update_margin is None:
            margins = (result.logps - result.ref_logps).diff(dim=1)
            self.first_update_margin = float(margins.abs().max())
        self.tokens_seen += num_input_tokens(groups)
        self._throughput.add(len(groups), result.computed_tokens)
        self._sums.add("loss", result.loss, count=1)
        self._sums.add_rewards(result.logps, result.ref_logps, result.tokens, beta)
        if result.aux_loss is not None:
            self._sums.add("aux_loss", result.aux_loss, count=1)
        if result.token_metrics:
            self._sums.add_tokens(result.token_rows, **result.token_metrics)

    def take(self) -> dict[str, float]:
        """The metrics since they were last taken, under their logged names."""
        metrics = self._sums.averages() | self._throughput.metrics()
        metrics["num_tokens"] = self.tokens_seen
        if self.skipped_updates:
            metrics["skipped_updates"] = self.skipped_updates
        if torch.cuda.is_available():
            metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._sums.clear()
        self._throughput = Throughput()
        return metrics
