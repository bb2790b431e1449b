"""How a bench is run from the command line: `python -m bench.step [--quick] [--results FILE]`."""

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.harness import RESULTS, Recorder

QUESTIONS = {
    "roofline": "copy bandwidth and matrix rate of this machine, what all else is a ratio of",
    "step": "one update against TRL's trainer: seconds, pairs/s, tokens/s, peak memory",
    "layers": "a layer's operations, counted; a stack of layers, packed and shared against padding",
    "hybrids": "a stack with states (linear attention, Mamba-2, convolutions) packed and padded",
    "kernel": "the head op against TRL, torch, Liger and cut-cross-entropy: time, memory, error",
    "memory": "peak memory against the length of a pair, and the longest pair that fits",
    "base_weights": "a base in host memory: what fits by plan, seconds beside one on the GPU",
    "reference": "reference log-probs: build, hit, and look-up among a million rows",
    "startup": "before the first update: rows a second, a second start, peaks over the rows",
    "packing": "how full packed rows are, and tokens a pair against padding, on real lengths",
    "lists": "all pairs of k rated completions: each completion once, against once a pair",
    "ranks": "an update shared by several processes: time, bytes sent, part of the time in talk",
    "quality": "the learning curve beside TRL's, update by update",
    "merged": "the margin that a merge keeps: bf16, fp16, fp32, to nearest and stochastic",
}
"""In order of value."""

OF_A_MODEL = ("step", "quality", "merged", "startup")
"""What can be asked of a real model, `--model FOLDER`."""


def run(question: str, arguments: list[str] | None = None, *, parts: tuple[str, ...] = ()) -> None:
    """Parse, and ask one question; `parts` names those of it that can be asked alone."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{question}")
    parser.description = QUESTIONS[question]
    parser.add_argument("--quick", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of rows to append to")
    if question in OF_A_MODEL:
        parser.add_argument("--model", type=Path, help="folder of a real model to ask it of")
    if question == "merged":
        parser.add_argument("--adapter", type=Path, help="folder of an adapter of that model")
    if parts:
        parser.add_argument("--part", choices=parts, default="all", help="of the contenders")
    chosen = parser.parse_args(arguments)
    part: dict[str, Any] = {"part": chosen.part} if parts else {}
    if question in OF_A_MODEL and chosen.model:
        part["model"] = chosen.model.resolve()
    if question == "merged" and chosen.adapter:
        part["adapter"] = chosen.adapter.resolve()
    ask(question, chosen.results, quick=chosen.quick, **part)


def ask(question: str, results: Path, *, quick: bool, **part: Any) -> None:
    """Run one bench; its rows are appended to `results`."""
    import_module(f"bench.{question}").main(Recorder(question, results), quick=quick, **part)
