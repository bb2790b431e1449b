"""`make gpu`: on a CUDA host, with what is installed: compile, test the kernels, then measure.

Most valuable first, each step under its own limit, `LIMIT_S` in all, going on past failures; one
table comes last, also when it is cut off: what ran, what failed, what was never reached. BENCH_OUT
names the folder of rows.jsonl, bench.log and RESULTS.md; plots are drawn from the rows later
(`python -m bench.report --results FILE`). What has passed is noted in the ignored folder
`gpu-done`; with --resume it is not run again, and cases that have rows are not measured again.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from bench.harness import MEASURED, RESULTS, ROOT, Row, read, source

LIMIT_S = 540.0
GRACE_S = 5.0
"""What a step has before its limit to say how far it came."""

DONE = ROOT / "gpu-done" / "steps.json"
KERNEL_TESTS = ("test_kernels.py", "test_layer_ops.py")
MOST_WORKERS = 12
"""Of pytest: each holds a CUDA context of its own, about half a GiB."""

NEVER = "never reached"


@dataclass(frozen=True)
class Step:
    """One command and the most time it may take."""

    name: str
    command: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True)
class Outcome:
    """How a step ended.

    Attributes:
        ended: passed, "failed (exit code)", timed out, cut off, done before, or never reached.
        started_s: after the first step's start; None where it did not start.
        rows: that it wrote.
    """

    name: str
    ended: str
    seconds: float = 0.0
    started_s: float | None = None
    rows: int = 0


def plan(rows: Path) -> list[Step]:
    """What is run, in order."""
    python = sys.executable

    def bench(name: str, limit_s: float, *options: str) -> Step:
        question = name.partition(" ")[0]
        command = (python, "-m", f"bench.{question}", "--results", str(rows), *options)
        return Step(f"bench.{name}", command, limit_s)

    def tests(name: str, limit_s: float, files: Sequence[str]) -> Step:
        # Processes that compile side by side leave each other cores.
        command = ("env", "TORCHINDUCTOR_COMPILE_THREADS=2", python, "-m", "pytest", "-m", "gpu")
        return Step(name, (*command, *in_parallel(), *files), limit_s)

    kernel_tests, other_tests = gpu_tests()
    return [
        Step("compile", (python, "-m", "bench.compile_ahead"), 30),
        tests("kernel tests", 75, kernel_tests),
        bench("kernel ours", 75, "--part", "ours"),
        bench("kernel rest", 50, "--part", "rest"),
        bench("step", 75),
        bench("memory", 50),
        tests("other tests", 60, other_tests),
        bench("layers", 20),
        bench("hybrids", 25),
        bench("base_weights", 30),
        bench("roofline", 10),
        bench("reference", 15),
        bench("quality", 15),
        Step("report", (*bench("report", 0).command, "--no_plots"), 10),
    ]


def in_parallel() -> tuple[str, ...]:
    """Options of pytest: several processes where pytest-xdist is installed, for compilations."""
    if find_spec("xdist") is None:
        return ()
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    return ("--numprocesses", str(workers), "--dist", "worksteal")


def gpu_tests() -> tuple[list[str], list[str]]:
    """Files with a test for CUDA, the kernels' and the others.

    Of files without one a host may lack what they import, which would stop all.
    """
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    files = [path for path in files if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]
    kernels = [path for path in files if path.name in KERNEL_TESTS]
    others = [path for path in files if path not in kernels]
    return [str(p.relative_to(ROOT)) for p in kernels], [str(p.relative_to(ROOT)) for p in others]


def only(steps: Sequence[Step], names: Sequence[str]) -> list[Step]:
    """The steps that are named, and the report; `carry_out` gives them the whole limit.

    `kernel` names both of its parts.

    Raises:
        ValueError: a name that no step has.
    """
    known = {step.name.removeprefix("bench.").replace(" ", "_"): step for step in steps}
    asked = set(names)
    if "kernel" in asked:
        asked = asked - {"kernel"} | {"kernel_ours", "kernel_rest"}
    if unknown := sorted(asked - set(known)):
        raise ValueError(f"no step {', '.join(unknown)}: there are {', '.join(known)}.")
    return [step for name, step in known.items() if name in {*asked, "report"}]


class Progress:
    """The steps that have passed, kept in a file outside of git from one run to the next.

    Args:
        path: of the file; None keeps nothing.
        resumes: whether steps that it names are passed over.
    """

    def __init__(self, path: Path | None, *, resumes: bool = False) -> None:
        self.path = path
        self.done: dict[str, str] = {}
        if path is not None and resumes and path.exists():
            self.done = json.loads(path.read_text(encoding="utf-8"))

    def passed_before(self, step: Step) -> str | None:
        """When and with which code the step passed; None if it is to run."""
        return None if step.name == "report" else self.done.get(step.name)

    def note(self, step: Step) -> None:
        """The step has passed."""
        self.done[step.name] = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {source()['git_sha']}"
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.done, indent=1), encoding="utf-8")


def carry_out(
    steps: Sequence[Step],
    folder: Path,
    *,
    limit_s: float = LIMIT_S,
    progress: Progress | None = None,
    prints: bool = True,
) -> list[Outcome]:
    """Run every step, sharing `limit_s` in proportion to their own limits.

    What a step leaves is shared by all that follow, so that the last one starts in time too.
    Ctrl-C and SIGTERM end the step at hand; the outcomes tell it and those never reached.
    """
    progress = progress or Progress(None)
    folder.mkdir(parents=True, exist_ok=True)
    log_path, rows_path = folder / "bench.log", folder / "rows.jsonl"
    began = time.monotonic()
    outcomes: list[Outcome] = []
    cut_off = False
    for number, step in enumerate(steps):
        if (before := progress.passed_before(step)) is not None:
            outcomes.append(Outcome(step.name, f"done before ({before})"))
            continue
        started_s, rows = time.monotonic() - began, _lines(rows_path)
        waiting_s = sum(one.limit_s for one in steps[number:] if not progress.passed_before(one))
        left_s = step.limit_s * (limit_s - started_s) / waiting_s
        if cut_off or left_s <= 0.0:
            outcomes.append(Outcome(step.name, NEVER))
            continue
        try:
            ended = _run(step, log_path, left_s)
        except KeyboardInterrupt:
            ended, cut_off = "cut off", True
        if ended == "passed":
            progress.note(step)
        taken_s = time.monotonic() - began - started_s
        made = _lines(rows_path) - rows
        outcomes.append(Outcome(step.name, ended, taken_s, started_s, made))
        if prints:
            print(f"{step.name}: {ended} after {taken_s:.0f} s, {made} rows", flush=True)
    return outcomes


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _run(step: Step, log_path: Path, limit_s: float) -> str:
    """Run one step in a process group of its own, so that its contenders end with it."""
    grace_s = min(GRACE_S, limit_s / 10)
    environment = os.environ | {
        "BENCH_LOG": str(log_path),
        "BENCH_ENDS_AT": f"{time.time() + limit_s - grace_s:.1f}",
        "PYTHONUNBUFFERED": "1",
    }
    with log_path.open("a", encoding="utf-8") as log:
        log.write(f"\n== {step.name}: {' '.join(step.command)}\n")
        log.flush()
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=limit_s - grace_s)
        except subprocess.TimeoutExpired:
            _end(process, grace_s)
            return f"timed out at {limit_s:.0f} s"
        except KeyboardInterrupt:
            _end(process, grace_s)
            raise
    return "passed" if code == 0 else f"failed ({code})"


def _end(process: subprocess.Popen, grace_s: float) -> None:
    """As Ctrl-C does, on which pytest says what has failed so far; then all of the group."""
    with suppress(ProcessLookupError):  # all of it have ended
        os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=grace_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def short_table(outcomes: Sequence[Outcome], rows: Sequence[Row]) -> str:
    """What ran, failed and was never reached; then the figures that matter most."""
    lines = [f"{'step':18} {'ended':34} starts  seconds  rows"]
    for one in outcomes:
        start = "" if one.started_s is None else f"{one.started_s:.0f}"
        lines.append(f"{one.name:18} {one.ended:34} {start:>6} {one.seconds:8.0f} {one.rows:5}")
    shown = ("update_s", "step_s", "of_bound_relative", "peak_mib", "time_ms")
    shown += ("longest_pair_tokens", "gemm_flops_per_s")
    for row in rows:
        if row.metric in shown:
            figure = f"{row.p50:12.4g}" if row.outcome == MEASURED else row.outcome
            sizes = " ".join(str(value) for value in row.case.values())
            lines.append(f"{row.question:9} {row.metric:20} {figure} {row.contender} | {sizes}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plan, or with --dry list it, rehearse it and test the machinery on the CPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="list the plan, run it with stand-ins")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="such as step memory kernel")
    parser.add_argument("--resume", action="store_true", help="pass over what has passed before")
    options = parser.parse_args(arguments)
    folder = Path(os.environ.get("BENCH_OUT") or RESULTS.parent).resolve()
    rows = folder / "rows.jsonl"
    steps = only(plan(rows), options.only) if options.only else plan(rows)
    if options.dry:
        from bench.rehearsal import rehearse

        for step in steps:
            print(f"{step.limit_s:4.0f} s  {step.name:18} {' '.join(step.command)}")
        print(f"{LIMIT_S:4.0f} s  in all; rows, log and RESULTS.md in {folder}")
        rehearse(steps)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if options.resume:
        os.environ["BENCH_RESUME"] = "1"
    before = len(read(rows)) if rows.exists() else 0
    outcomes = carry_out(steps, folder, progress=Progress(DONE, resumes=options.resume))
    print(short_table(outcomes, read(rows)[before:] if rows.exists() else []))
    good = all(one.ended.startswith(("passed", "done before")) for one in outcomes)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
