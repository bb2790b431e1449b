"""Contenders in processes of their own, taking turns.

Some peers patch what others use, and a memory figure wants a fresh process. All contenders of a
case are started, warmed up, and then told in turn to do one piece of work each, so that whatever
else the machine does falls on all of them alike; only one works at a time.

A contender is a function `(case, turns)` named "module:function". It builds what it needs, calls
`turns.ready(facts)`, and answers each of `turns` with its figures.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from bench.harness import FAILED, MEASURED, MISSING, OUT_OF_MEMORY, RESULTS, ROOT

START_LIMIT_S = 300.0
TURN_LIMIT_S = 300.0
SHARE_OF_REST = 0.5
"""A contender that does not answer may take so much of what BENCH_ENDS_AT leaves, not all of it."""


class MissingPeer(Exception):
    """A contender cannot run here; the message says why."""


class Turns:
    """The contender's end of the line to the bench.

    Args:
        orders: a line for every turn; its end is the end of the contest.
        answers: where facts and figures go.
    """

    def __init__(self, orders: IO[str], answers: IO[str]) -> None:
        self.orders, self.answers = orders, answers

    def ready(self, facts: Mapping[str, Any] | None = None) -> None:
        """The contender is built; `facts` are what is worth noting about it."""
        self.answer({"outcome": MEASURED} | dict(facts or {}))

    def wait(self) -> bool:
        """Wait for the next turn; False when there is none."""
        return bool(self.orders.readline())

    def answer(self, figures: Mapping[str, Any]) -> None:
        """Hand over the figures of this turn."""
        self.answers.write(json.dumps(dict(figures)) + "\n")
        self.answers.flush()

    def __iter__(self) -> Iterator[None]:
        while self.wait():
            yield


@dataclass
class Result:
    """What one contender showed."""

    outcome: str
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)

    def column(self, name: str) -> list[float]:
        """One figure of every turn."""
        return [figures[name] for figures in self.turns]


class Contender:
    """A contender's process, seen from the bench. What it prints goes to BENCH_LOG.

    Args:
        function: "module:function".
        case: JSON-ready; its `threads`, if any, is how many CPU threads the process may use.
    """

    def __init__(self, function: str, case: Mapping[str, Any]) -> None:
        log = Path(os.environ.get("BENCH_LOG", RESULTS.with_name("bench.log")))
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log.open("a", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.contest", function, json.dumps(dict(case))],
            cwd=ROOT,
            env=os.environ | _environment(case),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            bufsize=0,
        )
        self.result: Result | None = None

    def close(self) -> None:
        """End the process and its pipes."""
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self.log.close()

    def started(self) -> Result:
        """Wait until it is built, or has failed to be."""
        facts = self._answer(START_LIMIT_S)
        outcome, note = facts.pop("outcome"), facts.pop("note", "")
        self.result = Result(outcome, note, facts)
        return self.result

    def turn(self, *, counts: bool) -> None:
        """Let it do one piece of work; one that has failed is passed over."""
        assert self.result is not None, "started() comes first"
        if self.result.outcome != MEASURED:
            return
        assert self.process.stdin is not None, "opened as a pipe"
        with contextlib.suppress(BrokenPipeError):  # it has ended: the answer says how
            self.process.stdin.write(b"go\n")
        figures = self._answer(TURN_LIMIT_S)
        if "outcome" in figures:
            self.result.outcome, self.result.note = figures["outcome"], figures["note"]
        elif counts:
            self.result.turns.append(figures)

    def _answer(self, limit_s: float) -> dict[str, Any]:
        assert self.process.stdout is not None, "opened as a pipe"
        limit_s = min(limit_s, SHARE_OF_REST * left_s())
        readable, _, _ = select.select([self.process.stdout], [], [], limit_s)
        if not readable:
            self.process.kill()
            return {"outcome": FAILED, "note": f"no answer within {limit_s:.0f} s"}
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        if code == -9:
            return {"outcome": OUT_OF_MEMORY, "note": "killed by the system (signal 9)"}
        return {"outcome": FAILED, "note": f"ended without an answer, exit code {code}"}


def left_s() -> float:
    """Seconds until BENCH_ENDS_AT, a time of the epoch at which this bench is stopped."""
    ends_at = os.environ.get("BENCH_ENDS_AT")
    return max(1.0, float(ends_at) - time.time()) if ends_at else float("inf")


def contest(
    functions: Mapping[str, str],
    cases: Mapping[str, Mapping[str, Any]],
    *,
    warm_up: int,
    rounds: int,
    alone: bool = False,
) -> Iterator[tuple[str, Result]]:
    """Let contenders take turns.

    Args:
        functions: of each contender, by its name.
        cases: what each is given, by its name.
        warm_up: rounds that are not counted.
        rounds: rounds that are.
        alone: one contender after another instead, each with the machine to itself: on a GPU, whose
            memory they would share, and whose speed nobody else takes.

    Yields:
        Every name with its result, as soon as it is there; one that failed has the reason and the
        turns before it.
    """
    groups = [[name] for name in functions] if alone else [list(functions)]
    for names in groups:
        running: dict[str, Contender] = {}
        try:
            for name in names:
                running[name] = Contender(functions[name], cases[name])
            results = {name: contender.started() for name, contender in running.items()}
            for number in range(warm_up + rounds):
                for contender in running.values():
                    contender.turn(counts=number >= warm_up)
        finally:
            for contender in running.values():
                contender.close()
        yield from results.items()


def solo(function: str, case: Mapping[str, Any], *, turns: int, warm_up: int = 0) -> Result:
    """Let one contender work for so many turns, or until it fails."""
    contender = Contender(function, case)
    try:
        result = contender.started()
        for number in range(warm_up + turns):
            contender.turn(counts=number >= warm_up)
    finally:
        contender.close()
    return result


def _environment(case: Mapping[str, Any]) -> dict[str, str]:
    """Threads, quiet libraries, and the import path.

    A library that wants other versions than its peers has a site of its own: the folder that
    BENCH_SITE_<LIBRARY> names comes first on its path.
    """
    site = os.environ.get(f"BENCH_SITE_{case.get('library', '')}".upper())
    path = [site, str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]
    return {
        "OMP_NUM_THREADS": str(case.get("threads") or 1),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
    }


def failure(error: BaseException) -> dict[str, str]:
    """How an exception is told: which outcome it is, and its last words."""
    text = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    if isinstance(error, MissingPeer | ImportError):
        return {"outcome": MISSING, "note": str(error)[:200]}
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate" in text:
        return {"outcome": OUT_OF_MEMORY, "note": text[:200]}
    return {"outcome": FAILED, "note": text[:200]}


def run_contender(function: str, case: Mapping[str, Any]) -> None:
    """In the contender's process: whatever libraries print goes to stderr, answers to stdout."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    turns = Turns(sys.stdin, answers)
    module, _, name = function.partition(":")
    try:
        found: Callable[..., None] = getattr(import_module(module), name)
        found(case, turns)
    except Exception as error:
        traceback.print_exc()
        turns.answer(failure(error))


if __name__ == "__main__":
    # By its own name, or MissingPeer would be another class than the contenders raise.
    from bench.contest import run_contender

    run_contender(sys.argv[1], json.loads(sys.argv[2]))
