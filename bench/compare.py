"""`python -m bench.compare OLD NEW`: what changed beyond noise between two files of rows.

Rows of one machine, case, contender and metric are compared by their medians, the latest of each
file. Noise is three standard errors of the difference of two medians, from the spread between p20
and p80, and never less than a floor. Floors are what two runs of the same code showed on a machine
of two busy cores: 6 % for repeated figures, 10 % or 16 MiB for a peak, and half for a lone time,
which knows no spread.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.harness import MEASURED, Row, latest, read

FLOOR_RELATIVE = 0.06
PEAK_FLOOR_RELATIVE, PEAK_FLOOR_MIB = 0.10, 16.0
LONE_TIME_FLOOR_RELATIVE = 0.5
ERRORS = 3.0
P80_MINUS_P20_SIGMAS = 1.683
"""Of a normal distribution; the standard error of its median is 1.253 sigma / sqrt(n)."""

HIGHER_IS_BETTER = ("_per_s",)
HIGHER_METRICS = ("longest_pair_tokens",)
INFORMATIVE = ("worst_error_nat", "reward_margin_nat", "curve_difference_relative", "_tokens")
"""Metrics that are no cost: shown by the report, not judged here."""


@dataclass(frozen=True)
class Change:
    """How one figure moved."""

    old: Row
    new: Row
    noise_relative: float

    @property
    def relative(self) -> float:
        """New over old, less one."""
        return self.new.p50 / self.old.p50 - 1.0 if self.old.p50 else 0.0

    @property
    def verdict(self) -> str:
        """One of worse, better and noise."""
        if abs(self.relative) <= self.noise_relative:
            return "noise"
        metric = self.new.metric
        higher_is_better = metric.endswith(HIGHER_IS_BETTER) or metric in HIGHER_METRICS
        return "better" if (self.relative > 0) == higher_is_better else "worse"


def noise_relative(old: Row, new: Row) -> float:
    """How far two medians may be apart by chance, relative to the old one."""
    errors = []
    for row in (old, new):
        p20, p50, p80 = row.quantiles
        sigma = (p80 - p20) / P80_MINUS_P20_SIGMAS
        errors.append(1.253 * sigma / math.sqrt(len(row.samples)) / abs(p50) if p50 else 0.0)
    return max(_floor_relative(old, new), ERRORS * math.hypot(*errors))


def _floor_relative(old: Row, new: Row) -> float:
    if old.metric.endswith("_mib"):
        return max(PEAK_FLOOR_RELATIVE, PEAK_FLOOR_MIB / max(old.p50, 1.0))
    lone = min(len(old.samples), len(new.samples)) == 1
    if lone and old.metric.endswith(("_s", "_ms")):
        return LONE_TIME_FLOOR_RELATIVE
    return FLOOR_RELATIVE


def changes(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """Every figure that both have measured and that is a cost, in the order of the new."""
    before = {row.key: row for row in latest(old) if row.outcome == MEASURED}
    found = []
    for row in latest(new):
        judged = row.metric in HIGHER_METRICS or not row.metric.endswith(INFORMATIVE)
        if row.outcome == MEASURED and judged and row.key in before:
            old_row = before[row.key]
            found.append(Change(old_row, row, noise_relative(old_row, row)))
    return found


def described(change: Change) -> str:
    """One line: verdict, figure, how far, against what noise."""
    case = json.dumps(dict(change.new.case), sort_keys=True)
    return (
        f"{change.verdict:6} {change.relative:+7.1%} (noise {change.noise_relative:.1%}) "
        f"{change.new.question} {change.new.contender} {change.new.metric} "
        f"{change.old.p50:.4g} -> {change.new.p50:.4g} {case}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what changed; 1 if anything got worse, 2 if nothing could be compared."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--all", action="store_true", help="show what stayed within noise too")
    chosen = parser.parse_args(arguments)
    found = changes(read(chosen.old), read(chosen.new))
    for change in sorted(found, key=lambda change: change.verdict == "noise"):
        if chosen.all or change.verdict != "noise":
            print(described(change))
    counts = {name: sum(c.verdict == name for c in found) for name in ("worse", "better", "noise")}
    print(f"{len(found)} figures compared: {counts}")
    if not found:
        print("no figure is in both files: same machine, case, contender and metric are needed.")
        return 2
    return 1 if counts["worse"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
