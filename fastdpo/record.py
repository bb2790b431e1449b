"""What a run has done so far, in figures: since its last log, and in all."""

from collections.abc import Sequence

import torch

from fastdpo.batching import Group
from fastdpo.metrics import MetricSums, Throughput
from fastdpo.update import UpdateResult


def both_rows_tokens(groups: Sequence[Group]) -> int:
    """Tokens as TRL counts them: of both rows of every pair, the prompt twice."""
    return sum(
        len(group.completions) * len(group.prompt_ids) + sum(map(len, group.completions))
        for group in groups
    )


class RunRecord:
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

    def add(self, groups: Sequence[Group], result: UpdateResult, beta: float) -> None:
        """An update is done."""
        if self.first_update_margin is None:
            margins = (result.logps - result.ref_logps).diff(dim=1)
            self.first_update_margin = float(margins.abs().max())
        self.tokens_seen += both_rows_tokens(groups)
        self._throughput.add(len(groups), result.computed_tokens)
        self._sums.add("loss", result.loss, count=1)
        self._sums.add_rewards(result.logps, result.ref_logps, result.tokens, beta)
        if result.aux_loss is not None:
            self._sums.add("aux_loss", result.aux_loss, count=1)
        if result.token_figures:
            self._sums.add_tokens(result.token_rows, **result.token_figures)

    def take(self) -> dict[str, float]:
        """The figures since they were last taken, under their logged names."""
        figures = self._sums.averages() | self._throughput.figures()
        figures["num_tokens"] = self.tokens_seen
        if self.skipped_updates:
            figures["skipped_updates"] = self.skipped_updates
        if torch.cuda.is_available():
            figures["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._sums.clear()
        self._throughput = Throughput()
        return figures
