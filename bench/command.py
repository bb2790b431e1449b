"""How a bench is run from the command line: `python -m bench.step [--quick] [--results FILE]`."""

import argparse
from importlib import import_module
from pathlib import Path

from bench.harness import RESULTS, Recorder

QUESTIONS = {
    "roofline": "copy bandwidth and matrix rate of this machine, what all else is a ratio of",
    "step": "one update against TRL's trainer: seconds, pairs/s, tokens/s, peak memory",
    "layers": "a layer's operations, counted; a stack of layers, packed and shared against padding",
    "kernel": "the head op against TRL, torch, Liger and cut-cross-entropy: time, memory, error",
    "memory": "peak memory against the length of a pair, and the longest pair that fits",
    "reference": "reference log-probs: build, hit, and look-up among a million rows",
    "packing": "how full packed rows are, and tokens a pair against padding, on real lengths",
    "ranks": "an update shared by several processes: time, bytes sent, part of the time in talk",
    "quality": "the learning curve beside TRL's, update by update",
}
"""In order of value."""


def run(question: str, arguments: list[str] | None = None, *, parts: tuple[str, ...] = ()) -> None:
    """Parse, and ask one question; `parts` names those of it that can be asked alone."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{question}")
    parser.description = QUESTIONS[question]
    parser.add_argument("--quick", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of rows to append to")
    if parts:
        parser.add_argument("--part", choices=parts, default="all", help="of the contenders")
    chosen = parser.parse_args(arguments)
    part = {"part": chosen.part} if parts else {}
    ask(question, chosen.results, quick=chosen.quick, **part)


def ask(question: str, results: Path, *, quick: bool, **part: str) -> None:
    """Run one bench; its rows are appended to `results`."""
    import_module(f"bench.{question}").main(Recorder(question, results), quick=quick, **part)
