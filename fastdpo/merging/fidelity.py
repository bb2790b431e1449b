"""How far a merge moves log-probs: the adapter on its base against the merged weights."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fastdpo.merging.plan import MergePlan
from fastdpo.modeling.scoring import ScoredPairs
from fastdpo.system.console import table


@dataclass(frozen=True)
class Shift:
    """How far log-probs moved; absolute differences in nats."""

    token_mean: float
    token_worst: float
    completion_mean: float
    completion_worst: float
    margin_mean: float  # of chosen - rejected logps
    margin_worst: float


@dataclass(frozen=True)
class Fidelity:
    """How a merge changes log-probs.

    Attributes:
        in_4bit: whether the adapter was measured on a 4-bit base.
        adapter: chosen and rejected logps of each pair with the adapter on its base, nats.
        merged: the logps of each pair under the merged model, by base precision.
        shifts: how far those are from the adapter's, by base precision.
    """

    in_4bit: bool
    adapter: list[list[float]]
    merged: dict[str, list[list[float]]]
    shifts: dict[str, Shift]

    def as_json(self) -> dict[str, Any]:
        """The report as it stands in merge.json."""
        return asdict(self)

    def describe(self, written: str) -> str:
        """A table of the shifts side by side; `written` is the base precision in the folder."""
        base = "its 4-bit base" if self.in_4bit else "its base"
        kinds = sorted(self.shifts, key=lambda kind: kind != written)
        columns = [f"onto {kind}" + (" (written)" if kind == written else "") for kind in kinds]
        rows = [
            (name.replace("_", " "), *(f"{asdict(self.shifts[kind])[name]:.2e}" for kind in kinds))
            for name in asdict(self.shifts[written])
        ]
        head = (
            f"Log-probs of {len(self.adapter)} pairs, adapter on {base} against merged, "
            "absolute differences in nats:"
        )
        text = f"{head}\n{table(('', *columns), rows)}"
        nearest = min(kinds, key=lambda kind: self.shifts[kind].token_mean)
        if 2 * self.shifts[nearest].token_mean < self.shifts[written].token_mean:
            text += f"\nNearer to what was trained: --onto {nearest} --overwrite"
        return text


def put_in_place(model: nn.Module, plan: MergePlan, written: MergePlan) -> None:
    """Give a loaded result of `written` the weights of another plan for the same merge."""
    with torch.no_grad():
        for stored, name in {**written.names_in_memory, **plan.names_in_memory}.items():
            model.get_parameter(name).copy_(plan.tensor(stored))


def compare(adapter: ScoredPairs, merged: dict[str, ScoredPairs], *, in_4bit: bool) -> Fidelity:
    """The report from log-probs of the same pairs."""
    return Fidelity(
        in_4bit,
        adapter.logps.tolist(),
        {kind: scored.logps.tolist() for kind, scored in merged.items()},
        {kind: _shift(adapter, scored) for kind, scored in merged.items()},
    )


def _shift(before: ScoredPairs, after: ScoredPairs) -> Shift:
    tokens = (after.token_logps.double() - before.token_logps).abs()
    moved = after.logps - before.logps
    margins = np.abs(moved[:, 0] - moved[:, 1])
    return Shift(
        float(tokens.mean()),
        float(tokens.max()),
        float(np.abs(moved).mean()),
        float(np.abs(moved).max()),
        float(margins.mean()),
        float(margins.max()),
    )
