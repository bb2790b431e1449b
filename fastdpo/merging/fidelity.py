"""How far a merge moves log-probs: the adapter on its base against the merged weights."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fastdpo.losses.pairs import preference_accuracy
from fastdpo.merging.plan import MergePlan
from fastdpo.merging.rounding import Rounding
from fastdpo.modeling.base_weights import writable_weights
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


KEPT = 0.9
"""A merge that keeps less than this share of the margin is warned of."""


@dataclass(frozen=True)
class Preference:
    """How a model orders pairs, against a reference."""

    margin: float  # nats: mean of the log-ratio of chosen minus that of rejected
    accuracy: float  # share of pairs whose margin is above 0, ties counted 0.5

    @property
    def cells(self) -> tuple[str, str]:
        """Both as they stand in a table."""
        return f"{self.margin:.4f}", f"{self.accuracy:.3f}"


@dataclass(frozen=True)
class Fidelity:
    """How a merge changes log-probs, and what it keeps of the preferences that were learned.

    A variant is a way to merge, "bf16 stochastic" for example: the base precision as `--onto` and
    the rounding as `--rounding` say. Margins and accuracies are what the adapter adds: each is
    against the base that it was added to, 4-bit or whole, without the adapter.

    Attributes:
        in_4bit: whether the adapter was measured on a 4-bit base.
        written: the variant in the folder.
        dtype: the dtype in which it was written.
        adapter: chosen and rejected logps of each pair with the adapter on its base, nats.
        learned: margin and accuracy of those.
        merged: the logps of each pair under the merged model, by variant.
        kept: margin and accuracy of those, by variant.
        shifts: how far the logps are from the adapter's, by variant.
        on_whole_base: margin and accuracy of the adapter of a 4-bit base, unmerged, on the base's
            whole weights: what the change of base alone does, before anything is rounded. None
            where no variant adds to those.
        roundings: what became of the weights' updates, by variant.
    """

    in_4bit: bool
    written: str
    dtype: str
    adapter: list[list[float]]
    learned: Preference
    merged: dict[str, list[list[float]]]
    kept: dict[str, Preference]
    shifts: dict[str, Shift]
    on_whole_base: Preference | None
    roundings: dict[str, Rounding]

    def as_json(self) -> dict[str, Any]:
        """The report as it stands in merge.json."""
        return asdict(self)

    def share_kept(self, variant: str) -> float | None:
        """The margin of a variant over that of the adapter; None where nothing was learned."""
        learned = self.learned.margin
        return self.kept[variant].margin / learned if learned > 0 else None

    def describe(self) -> str:
        """Tables of margins and of shifts, the variants side by side, and what to do."""
        base = "its 4-bit base" if self.in_4bit else "its base"
        variants = sorted(self.kept, key=lambda variant: variant != self.written)
        names = [v + (" (written)" if v == self.written else "") for v in variants]
        lines = [f"Preferences on {len(self.adapter)} pairs, against the base without the adapter:"]
        rows = [(f"adapter on {base}", *self.learned.cells, "")]
        if self.on_whole_base is not None:
            rows.append(("adapter on the whole base", *self.on_whole_base.cells, ""))
        for variant, name in zip(variants, names, strict=True):
            share = self.share_kept(variant)
            cells = self.kept[variant].cells
            rows.append((f"merged, {name}", *cells, "" if share is None else f"{share:.1%}"))
        lines.append(table(("", "margin (nats)", "accuracy", "margin kept"), rows))
        lines += [
            self._rounding(variant) for variant in variants if self.roundings[variant].weights
        ]
        lines += [*self._parts(), f"\nLog-probs, adapter on {base} against merged, in nats:"]
        shifts = [
            (name.replace("_", " "), *(f"{asdict(self.shifts[v])[name]:.2e}" for v in variants))
            for name in asdict(self.shifts[self.written])
        ]
        lines.append(table(("", *names), shifts))
        nearest = min(variants, key=lambda variant: self.shifts[variant].token_mean)
        if 2 * self.shifts[nearest].token_mean < self.shifts[self.written].token_mean:
            lines.append(f"Nearer to what was trained: {_remedy(nearest)}")
        return "\n".join([*lines, *self._warning()])

    def _rounding(self, variant: str) -> str:
        """One sentence on what rounding did to the weights of a variant."""
        counts = self.roundings[variant]
        unchanged = counts.unchanged_written / counts.weights
        return (
            f"{variant}: {unchanged:.1%} of the {counts.weights:,} updated weights are as they were"
            + (
                f" (to nearest {counts.unchanged_nearest / counts.weights:.1%}); "
                f"{counts.stochastic / counts.weights:.0%} were rounded stochastically."
                if counts.stochastic
                else "."
            )
        )

    def _parts(self) -> list[str]:
        """The loss of margin in its two parts, where there are two."""
        if self.on_whole_base is None or not self.written.startswith("bf16"):
            return []
        moved = self.on_whole_base.margin - self.learned.margin
        rounded = self.kept[self.written].margin - self.on_whole_base.margin
        return [
            f"Of the change in margin {moved:+.4f} is the change of base, {rounded:+.4f} rounding."
        ]

    def _warning(self) -> list[str]:
        """A warning where less is kept than should be, with what keeps more of it."""
        share = self.share_kept(self.written)
        if share is None or share >= KEPT:
            return []
        text = f"Warning: the merged model keeps {share:.1%} of the margin that was learned."
        best = max(self.kept, key=lambda variant: self.kept[variant].margin)
        if best != self.written and (self.share_kept(best) or 0.0) > share:
            text += f" More of it keeps {_remedy(best)}"
        if self.dtype != "float32" and self.roundings[self.written].weights:
            text += " --dtype float32 rounds nothing, in files of twice the size."
        return [text + " Or serve the adapter on its base."]


def _remedy(variant: str) -> str:
    onto, rounding = variant.split()
    return f"--onto {onto} --rounding {rounding} --overwrite."


def put_in_place(model: nn.Module, plan: MergePlan, written: MergePlan) -> None:
    """Give a loaded result of `written` the weights of another plan for the same merge."""
    weights = writable_weights(model)
    with torch.no_grad():
        for stored, name in {**written.names_in_memory, **plan.names_in_memory}.items():
            weights[name].copy_(plan.tensor(stored))


def compare(
    adapter: ScoredPairs,
    reference: ScoredPairs,
    merged: dict[str, ScoredPairs],
    *,
    whole_base: tuple[ScoredPairs, ScoredPairs] | None,
    plans: dict[str, MergePlan],
    dtype: str,
    in_4bit: bool,
) -> Fidelity:
    """The report from log-probs of the same pairs.

    Args:
        adapter: under the adapter on its base.
        reference: under that base without the adapter.
        merged: under the merged model, by variant, the written one first.
        whole_base: under the adapter on the base's whole weights, and under those without it,
            where the adapter's base is in 4 bits.
        plans: the plan of each variant, all of whose tensors were computed.
        dtype: in which the result was written.
        in_4bit: whether the adapter's base is in 4 bits.
    """
    whole_reference = reference if whole_base is None else whole_base[1]

    def preference(variant: str) -> Preference:
        onto_whole = plans[variant].base_precision == "bf16"
        return _preference(merged[variant], whole_reference if onto_whole else reference)

    return Fidelity(
        in_4bit=in_4bit,
        written=next(iter(merged)),
        dtype=dtype,
        adapter=adapter.logps.tolist(),
        learned=_preference(adapter, reference),
        merged={variant: scored.logps.tolist() for variant, scored in merged.items()},
        kept={variant: preference(variant) for variant in merged},
        shifts={variant: _shift(adapter, scored) for variant, scored in merged.items()},
        on_whole_base=None if whole_base is None else _preference(*whole_base),
        roundings={variant: plan.rounded for variant, plan in plans.items()},
    )


def _preference(policy: ScoredPairs, reference: ScoredPairs) -> Preference:
    margins = torch.from_numpy((policy.logps - reference.logps) @ np.array([1.0, -1.0]))
    return Preference(float(margins.mean()), preference_accuracy(margins))


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
