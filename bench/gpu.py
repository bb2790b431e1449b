"""`make gpu`: on a CUDA host, with what is installed: the gpu tests, then the benches.

Most valuable first, each under its own limit, `LIMIT_S` in all, going on past failures; a short
table comes last. BENCH_OUT names the folder of rows.jsonl, bench.log and RESULTS.md; plots are
drawn from the rows later (`python -m bench.report --results FILE`).
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.harness import MEASURED, RESULTS, ROOT, Row, read

LIMIT_S = 540.0
GRACE_S = 5.0
"""What a step has at its limit to say how far it came."""


@dataclass(frozen=True)
class Step:
    """One command and the most time it may take."""

    name: str
    command: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True)
class Outcome:
    """How a step ended: passed, "failed (exit code)", timed out or no time left."""

    name: str
    ended: str
    seconds: float


def plan(rows: Path) -> list[Step]:
    """What is run, in order."""
    python = sys.executable

    def bench(question: str, limit_s: float) -> Step:
        command = (python, "-m", f"bench.{question}", "--results", str(rows))
        return Step(f"bench.{question}", command, limit_s)

    return [
        Step("gpu tests", (python, "-m", "pytest", "-m", "gpu", *gpu_tests()), 115),
        bench("roofline", 25),
        bench("step", 120),
        bench("layers", 60),
        bench("kernel", 75),
        bench("memory", 75),
        bench("reference", 25),
        bench("quality", 30),
        Step("report", (*bench("report", 0).command, "--no_plots"), 15),
    ]


def gpu_tests() -> list[str]:
    """Files with a test for CUDA: of others a host may lack what they import, which stops all."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "pytest.mark.gpu" in path.read_text()]


def only(steps: Sequence[Step], names: Sequence[str]) -> list[Step]:
    """The steps that are named, and the report, sharing the whole limit in the same proportion.

    Raises:
        ValueError: a name that no step has.
    """
    known = {step.name.removeprefix("bench.").replace(" ", "_"): step for step in steps}
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"no step {', '.join(unknown)}: there are {', '.join(known)}.")
    chosen = [step for name, step in known.items() if name in {*names, "report"}]
    stretch = LIMIT_S / sum(step.limit_s for step in chosen)
    return [replace(step, limit_s=step.limit_s * stretch) for step in chosen]


def carry_out(steps: Sequence[Step], folder: Path, *, limit_s: float = LIMIT_S) -> list[Outcome]:
    """Run every step, each within its own limit and all within `limit_s`."""
    folder.mkdir(parents=True, exist_ok=True)
    log_path = folder / "bench.log"
    ends = time.monotonic() + limit_s
    outcomes = []
    for step in steps:
        began = time.monotonic()
        left_s = min(step.limit_s, ends - began)
        ended = _run(step, log_path, left_s) if left_s > 1.0 else "no time left"
        outcomes.append(Outcome(step.name, ended, time.monotonic() - began))
        print(f"{step.name}: {ended} after {outcomes[-1].seconds:.0f} s", flush=True)
    return outcomes


def _run(step: Step, log_path: Path, limit_s: float) -> str:
    """Run one step in a process group of its own, so that its contenders end with it."""
    environment = os.environ | {"BENCH_LOG": str(log_path), "PYTHONUNBUFFERED": "1"}
    with log_path.open("a", encoding="utf-8") as log:
        log.write(f"\n== {step.name}: {' '.join(step.command)}\n")
        log.flush()
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            _end(process)
            return f"timed out at {limit_s:.0f} s"
    return "passed" if code == 0 else f"failed ({code})"


def _end(process: subprocess.Popen) -> None:
    """As Ctrl-C does, on which pytest says what has failed so far; then for good."""
    for number, grace_s in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):  # all of the group have ended
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace_s)


def short_table(outcomes: Sequence[Outcome], rows: Sequence[Row]) -> str:
    """Steps, then the figures that matter most: updates, the head op, the longest pairs."""
    lines = [f"{'step':16} {'outcome':22} seconds"]
    lines += [f"{o.name:16} {o.ended:22} {o.seconds:7.0f}" for o in outcomes]
    shown = ("update_s", "step_s", "of_bound_relative", "peak_mib", "time_ms")
    shown += ("longest_pair_tokens", "gemm_flops_per_s")
    for row in rows:
        if row.metric in shown:
            figure = f"{row.p50:12.4g}" if row.outcome == MEASURED else row.outcome
            sizes = " ".join(str(value) for value in row.case.values())
            lines.append(f"{row.question:9} {row.metric:20} {figure} {row.contender} | {sizes}")
    return "\n".join(lines)


def self_test() -> None:
    """The machinery on the CPU: a real bench, a failing step, one that hangs, and the report."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows.jsonl"
        python = sys.executable
        quick = next(step for step in plan(rows) if step.name == "bench.roofline")
        report = plan(rows)[-1]
        steps = [
            Step("fails", (python, "-c", "raise SystemExit(3)"), 60),
            Step("hangs", (python, "-c", "import time; time.sleep(60)"), 1.5),
            Step("bench.roofline", (*quick.command, "--quick"), 120),
            Step("report", report.command, 60),
        ]
        outcomes = carry_out(steps, folder, limit_s=240.0)
        print(short_table(outcomes, read(rows)))
        ended = [outcome.ended for outcome in outcomes]
        files = sorted(path.name for path in folder.iterdir())
        assert ended[0] == "failed (3)", ended
        assert ended[1].startswith("timed out"), ended
        assert ended[2:] == ["passed", "passed"], (folder / "bench.log").read_text()
        assert files == ["RESULTS.md", "bench.log", "rows.jsonl"], files
    print("self-test passed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plan, or with --dry list it and test the machinery on the CPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="list the plan, run the self-test")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="such as step memory gpu_tests")
    options = parser.parse_args(arguments)
    folder = Path(os.environ.get("BENCH_OUT") or RESULTS.parent).resolve()
    rows = folder / "rows.jsonl"
    steps = only(plan(rows), options.only) if options.only else plan(rows)
    if options.dry:
        for step in steps:
            print(f"{step.limit_s:4.0f} s  {step.name:16} {' '.join(step.command)}")
        print(f"{LIMIT_S:4.0f} s  in all; rows, log and RESULTS.md in {folder}")
        self_test()
        return 0
    before = len(read(rows)) if rows.exists() else 0
    outcomes = carry_out(steps, folder)
    print(short_table(outcomes, read(rows)[before:] if rows.exists() else []))
    return 0 if all(outcome.ended == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
