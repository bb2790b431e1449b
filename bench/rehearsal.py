"""The machinery of `make gpu` on the CPU: its schedule with stand-ins, and its steps' ends.

A stand-in sleeps as long as its step would take at most; for steps that compile, as long as that
takes by CPU seconds measured here over the cores of the host that is meant. Benches go on until
they are stopped, so theirs is the whole limit. All is `speed` times as fast as in earnest.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.gpu import LIMIT_S, Outcome, Progress, Step, carry_out, plan, short_table
from bench.harness import read

CORES = 16
"""Of the host that is meant."""


@dataclass(frozen=True)
class Compiling:
    """CPU seconds of a step that compiles: of a process until it begins, and of all compilation."""

    start_s: float
    compile_s: float

    @property
    def seconds(self) -> float:
        """Its processes start side by side, and share the cores."""
        return self.start_s + self.compile_s / CORES


COMPILING = {
    "compile": Compiling(1.6, 87.3),
    "kernel tests": Compiling(3.0, 87.3),
    "other tests": Compiling(9.0, 0.0),
}
"""Measured 2026-11-26 on two cores of an AMD EPYC, torch 2.13 and triton 3.9: `bench.compile_ahead
--capability 9.0` into an empty cache (170 kernels), and `pytest --collect-only` of the tests. The
kernel tests are counted as if nothing had been compiled ahead. What FlexAttention compiles in the
other tests cannot be measured without a GPU."""


def schedule(steps: Sequence[Step], *, speed: float, stuck: bool) -> list[Outcome]:
    """Run stand-ins of the steps; `stuck`: every one goes on until it is stopped.

    Returns:
        Their ends, in seconds as they would be in earnest.
    """
    stand_ins = []
    for step in steps:
        takes_s = LIMIT_S
        if step.name in COMPILING and not stuck:
            takes_s = COMPILING[step.name].seconds
        command = ("sleep", f"{takes_s / speed:.3f}")
        stand_ins.append(replace(step, command=command, limit_s=step.limit_s / speed))
    with TemporaryDirectory() as folder:
        found = carry_out(stand_ins, Path(folder), limit_s=LIMIT_S / speed, prints=False)
    return [
        replace(
            one,
            seconds=one.seconds * speed,
            started_s=None if one.started_s is None else one.started_s * speed,
        )
        for one in found
    ]


def rehearse(steps: Sequence[Step], *, speed: float = 20.0) -> None:
    """Both schedules, each printed and checked, then the machinery."""
    for stuck in (False, True):
        found = schedule(steps, speed=speed, stuck=stuck)
        print(f"\nrehearsal, {'every step stuck' if stuck else f'compilation on {CORES} cores'}:")
        print(short_table(found, []))
        check(found, stuck=stuck)
    self_test()


def check(found: Sequence[Outcome], *, stuck: bool) -> None:
    """What a schedule must show.

    Raises:
        AssertionError: a step does not start in time, or compilation does not fit its step.
    """
    late = [one.name for one in found if one.started_s is None or one.started_s >= LIMIT_S]
    assert not late, f"never reached within {LIMIT_S:.0f} s: {late}"
    cut = [one for one in found if one.name in COMPILING and one.ended != "passed"]
    assert stuck or not cut, f"compilation does not fit: {cut}"


def self_test() -> None:
    """Ends of steps: a real bench, one that fails, one that hangs, and the report; then resumed."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        python = sys.executable
        quick = next(step for step in plan(rows) if step.name == "bench.roofline")
        steps = [
            Step("fails", (python, "-c", "raise SystemExit(3)"), 60),
            Step("hangs", (python, "-c", "import time; time.sleep(60)"), 1.5),
            Step("bench.roofline", (*quick.command, "--quick"), 120),
            Step("report", plan(rows)[-1].command, 60),
        ]
        limit_s = sum(step.limit_s for step in steps)
        done = folder / "done" / "steps.json"
        outcomes = carry_out(steps, folder, limit_s=limit_s, progress=Progress(done))
        print(short_table(outcomes, read(rows)))
        ended = [outcome.ended for outcome in outcomes]
        files = sorted(path.name for path in folder.iterdir())
        assert ended[0] == "failed (3)", ended
        assert ended[1].startswith("timed out"), ended
        assert ended[2:] == ["passed", "passed"], (folder / "bench.log").read_text()
        assert files == ["RESULTS.md", "bench.log", "done", "rows.jsonl"], files
        again = Progress(done, resumes=True)
        (resumed,) = carry_out(steps[2:3], folder, limit_s=limit_s, progress=again)
        assert resumed.ended.startswith("done before"), resumed
    print("self-test passed")
