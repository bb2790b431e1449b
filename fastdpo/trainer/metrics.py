"""The metrics of updates and evaluations under TRL's names, as sums that any split adds up to."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastdpo.batching import PromptGroup
from fastdpo.losses import pair_accuracies
from fastdpo.system.device import peak_bytes


@dataclass(frozen=True, eq=False, kw_only=True)
class PairsResult:
    """Results of an update, or of an evaluation of a whole set, for B pairs; without gradient."""

    loss: Tensor  # () float64, the mean over the pairs
    logps: Tensor  # (B, 2) float64 of chosen and rejected, as the loss took them; nats
    ref_logps: Tensor  # (B, 2) float64
    tokens: Tensor  # (B, 2) int64: scored tokens
    token_metrics: dict[str, Tensor]  # (M,) each of `METRIC_OUTPUTS`, or none
    token_completions: Tensor  # (M,) int64: 2 x pair + (0 chosen, 1 rejected) of each token


@dataclass(frozen=True, eq=False, kw_only=True)
class UpdateResult(PairsResult):
    """Results of one update; the loss includes the weighted auxiliary loss."""

    computed_tokens: int  # every shared token once
    aux_loss: Tensor | None  # () float64, of the routers of a mixture of experts


@dataclass
class MetricSums:
    """Sums over pairs and tokens since they were last read; they stay on their device till then."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, float | Tensor] = field(default_factory=dict)

    def add(
        self,
        name: str,
        values: Tensor,
        count: float | None = None,
        where: Tensor | None = None,
    ) -> None:
        """Add values to a metric; they count as many, or as `count`.

        Args:
            name: of the metric.
            values: of any shape.
            count: how many they count as.
            where: bool of that shape, which of them to add: selecting those instead would make
                the host wait for their number.
        """
        values = values.detach().double()
        counted: float | Tensor = values.numel() if count is None else count
        if where is not None:
            values, counted = torch.where(where, values, 0.0), where.sum()
        total = values.sum()
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0.0) + counted

    def add_pairs(self, result: PairsResult, beta: float) -> None:
        """Add everything that is logged of the pairs of an update or of an evaluation.

        Args:
            result: the pairs; those per-token metrics that it brings are added too.
            beta: reward per nat of log-ratio.
        """
        self.add("loss", result.loss, count=1)
        logps, tokens = result.logps, result.tokens
        logratios = (logps - result.ref_logps).detach()
        rewards = beta * logratios
        margins = rewards[:, 0] - rewards[:, 1]
        self.add("rewards/chosen", rewards[:, 0])
        self.add("rewards/rejected", rewards[:, 1])
        self.add("rewards/accuracies", pair_accuracies(margins))
        self.add("rewards/margins", margins)
        self.add("logps/chosen", logps[:, 0])
        self.add("logps/rejected", logps[:, 1])
        self.add("logratios/chosen_per_token", logratios[:, 0] / tokens[:, 0])
        self.add("logratios/rejected_per_token", logratios[:, 1] / tokens[:, 1])
        self.add("lengths/chosen", tokens[:, 0])
        self.add("lengths/rejected", tokens[:, 1])
        if result.token_metrics:
            self._add_tokens(result.token_completions, **result.token_metrics)

    def _add_tokens(
        self,
        completions: Tensor,  # (M,) int64
        entropy: Tensor,  # (M,) nats
        mean_logits: Tensor,  # (M,)
        is_top1: Tensor,  # (M,) bool
    ) -> None:
        """Add the metrics that cost a look at the whole vocabulary."""
        rejected = (completions % 2).bool()
        self.add("entropy", entropy)
        self.add("logits/chosen", mean_logits, where=~rejected)
        self.add("logits/rejected", mean_logits, where=rejected)
        self.add("mean_token_accuracy", is_top1, where=~rejected)

    def averages(self) -> dict[str, float]:
        """Mean of each metric that has values; the host waits for the device once."""
        if not self.sums:
            return {}
        like = next(iter(self.sums.values()))
        counts = [
            count.double() if isinstance(count, Tensor) else like.new_full((), count)
            for count in (self.counts[name] for name in self.sums)
        ]
        read = torch.stack([*self.sums.values(), *counts]).view(2, -1).tolist()
        return {
            name: total / count
            for name, total, count in zip(self.sums, *read, strict=True)
            if count
        }


class Throughput:
    """Pairs and tokens a second between two log lines."""

    def __init__(self) -> None:
        self.start_s: float | None = None
        self.pairs = 0
        self.tokens = 0

    def start(self) -> None:
        """Start the clock, unless it runs: with the first update after a log line."""
        if self.start_s is None:
            self.start_s = time.perf_counter()

    def add(self, pairs: int, tokens: int) -> None:
        """Count one update."""
        self.pairs += pairs
        self.tokens += tokens

    def metrics(self) -> dict[str, float]:
        """Rates under their logged names; empty before the first update."""
        if self.start_s is None:
            return {}
        elapsed_s = time.perf_counter() - self.start_s
        return {
            "perf/pairs_per_second": self.pairs / elapsed_s,
            "perf/tokens_per_second": self.tokens / elapsed_s,
        }


def num_input_tokens(groups: Sequence[PromptGroup]) -> int:
    """Tokens as TRL counts them: the prompt once for every completion."""
    return sum(
        len(group.completions) * len(group.prompt_ids) + sum(map(len, group.completions))
        for group in groups
    )


class TrainingMetrics:
    """Adds up the updates of a run, for its training logs.

    Attributes:
        tokens_seen: tokens of the whole run, as TRL counts them.
        skipped_updates: updates of the whole run whose loss or gradient was not finite.
        first_update_margin: largest absolute margin of the run's first update, nats.
    """

    def __init__(self) -> None:
        self.tokens_seen = 0
        self.skipped_updates = 0
        self.first_update_margin: float | None = None
        self._sums, self._throughput = MetricSums(), Throughput()

    @property
    def holds_updates(self) -> bool:
        """True where an update was added since the last `flush`."""
        return bool(self._sums.sums)

    def start(self) -> None:
        """Note that an update begins."""
        self._throughput.start()

    def add(self, groups: Sequence[PromptGroup], result: UpdateResult, beta: float) -> None:
        """Count an update that is done."""
        if self.first_update_margin is None:
            margins = (result.logps - result.ref_logps).diff(dim=1)
            self.first_update_margin = float(margins.abs().max())
        self.tokens_seen += num_input_tokens(groups)
        self._throughput.add(len(groups), result.computed_tokens)
        self._sums.add_pairs(result, beta)
        if result.aux_loss is not None:
            self._sums.add("aux_loss", result.aux_loss, count=1)

    def flush(self) -> dict[str, float]:
        """The metrics of the updates since the last call, under their logged names."""
        metrics = self._sums.averages() | self._throughput.metrics()
        metrics["num_tokens"] = self.tokens_seen
        if self.skipped_updates:
            metrics["skipped_updates"] = self.skipped_updates
        if peak := peak_bytes():
            metrics["memory/peak_gib"] = peak / 2**30
        self._sums, self._throughput = MetricSums(), Throughput()
        return metrics
