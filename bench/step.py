"""One update of B pairs against TRL's trainer: seconds, pairs/s, tokens/s and peak memory.

Contenders take turns, an update each, on the same pairs. `useful_tokens` counts a prompt once;
`run_tokens` are those that really went through the model: padding, repeated prompts and reference
passes too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench import roofline
from bench.contest import Result, contest
from bench.harness import MEASURED, Recorder, spread
from bench.inputs import story_model_or
from bench.real import content_name

WARM_UP = 2
TRAINER = "bench.trainers:contend"

CONTENDERS: dict[str, dict[str, Any]] = {
    "fastdpo": {"library": "fastdpo", "accumulation": 1},
    "fastdpo unshared": {"library": "fastdpo", "accumulation": 1, "shared_prefix": "off"},
    "fastdpo T=512": {"library": "fastdpo", "accumulation": 1, "micro_batch_tokens": 512},
    "trl": {"library": "trl", "accumulation": 1},
    "trl accumulation 2": {"library": "trl", "accumulation": 2},
    "trl accumulation 4": {"library": "trl", "accumulation": 4},
    "trl accumulation 4 precomputed": {"library": "trl", "accumulation": 4, "precomputed": True},
    "trl precomputed": {"library": "trl", "accumulation": 1, "precomputed": True},
    "unsloth": {"library": "unsloth", "accumulation": 4},
}
"""What each is; "precomputed" TRL makes its reference log-probs before it begins, as ours does."""

QUICK = ("fastdpo", "trl", "trl accumulation 4")
CUDA = ("fastdpo", "trl accumulation 4", "fastdpo unshared", "trl", "unsloth")
REAL = ("fastdpo", "trl", "trl precomputed")
FULL = tuple(name for name in CONTENDERS if name != "trl accumulation 2")


def cases(*, quick: bool) -> list[dict[str, Any]]:
    """What is asked on this machine, the most telling first."""
    if torch.cuda.is_available():
        common = {"model": "1b", "dtype": "bfloat16", "device": "cuda", "pairs": 16}
        settings = [("lora", True, None), ("lora", False, None), ("full", True, None)]
        common["longest_row_tokens"] = 1024
    else:
        common = {"model": story_model_or("tiny"), "dtype": "float32", "device": "cpu"}
        common["pairs"] = 16
        if common["model"] != "stories260K":
            common["longest_row_tokens"] = 256
        settings = [("lora", False, 1), ("full", False, 1), ("lora", True, 1)]
        if not quick:
            settings += [("full", True, 1), ("lora", False, 2), ("full", False, 2)]
            settings += [("lora", True, 2), ("full", True, 2)]
    return [
        {"tuning": tuning, "checkpointing": checkpointing, **common}
        | ({"threads": threads} if threads else {})
        for tuning, checkpointing, threads in settings
    ]


def real_cases(folder: Path) -> list[dict[str, Any]]:
    """What is asked of a real model, the most telling first; 8 real pairs an update."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    common = {"model": content_name(folder), "device": device, "pairs": 8}
    common |= {"dtype": "bfloat16" if device == "cuda" else "float32", "threads": 1}
    settings = [("lora", False), ("qlora", False), ("lora", True), ("full", False), ("qlora", True)]
    return [{"tuning": tuning, "checkpointing": on, **common} for tuning, on in settings]


def measure(
    recorder: Recorder,
    case: Mapping[str, Any],
    contenders: tuple[str, ...],
    *,
    rounds: int,
    warm_up: int = WARM_UP,
    folder: Path | None = None,
) -> None:
    """All contenders of one case, in turns, and their rows; of the model in `folder`, if given."""
    contenders = tuple(name for name in contenders if not recorder.has(case, name, "update_s"))
    if not contenders:
        return
    updates = warm_up + rounds + 1
    run: dict[str, Any] = {"updates": updates, "rows": updates * case["pairs"]}
    if folder is not None:
        run["folder"] = str(folder)
    # The roofline first, then ours: what they say is needed for everyone's rows.
    functions = dict.fromkeys(contenders, TRAINER)
    given: dict[str, Mapping[str, Any]] = {}
    if folder is None:
        functions = {roofline.CONTENDER: roofline.FUNCTION} | functions
        given[roofline.CONTENDER] = case
    given |= {name: {**case, **run, **CONTENDERS[name]} for name in contenders}
    alone = case["device"] == "cuda"
    rate: float | None = None
    ours: Result | None = None
    for name, result in contest(functions, given, warm_up=warm_up, rounds=rounds, alone=alone):
        if name == roofline.CONTENDER:
            roofline.record(recorder, case, result)
            rate = roofline.gemm_rate(result)
            continue
        ours = ours or result
        _record(recorder, case, name, result, ours, rate, warm_up)


def _record(
    recorder: Recorder,
    case: Mapping[str, Any],
    contender: str,
    result: Result,
    ours: Result,
    gemm_flops_per_s: float | None,
    warm_up: int,
) -> None:
    if result.outcome != MEASURED:
        recorder.add(case, contender, "update_s", outcome=result.outcome, note=result.note)
        return
    facts = ours.facts
    update_s = result.column("wall_s")
    counted = slice(warm_up, warm_up + len(update_s))
    useful = facts.get("useful_tokens", [])[counted]
    reached = None
    if gemm_flops_per_s and useful:
        floor_s = spread(facts["floor_flops"][counted])[1] / gemm_flops_per_s
        reached = floor_s / spread(update_s)[1]
    recorder.add(case, contender, "update_s", update_s, of_roofline=reached)
    recorder.add(case, contender, "update_cpu_s", result.column("cpu_s"))
    recorder.add(case, contender, "pairs_per_s", [case["pairs"] / each for each in update_s])
    recorder.add(case, contender, "run_tokens", result.column("run_tokens"))
    if result is not ours and ours.outcome == MEASURED:
        norms = zip(result.column("gradient_norm"), ours.column("gradient_norm"), strict=True)
        differences = [abs(theirs / own - 1) for theirs, own in norms]
        recorder.add(case, contender, "gradient_norm_relative", differences)
    if useful:
        rates = [tokens / each for tokens, each in zip(useful, update_s, strict=True)]
        recorder.add(case, contender, "useful_tokens_per_s", rates)
        recorder.add(case, contender, "useful_tokens", useful)
    if (reference := result.facts.get("reference_pass")) is not None:
        updates = len(facts["useful_tokens"])
        recorder.add(case, contender, "reference_pass_cpu_s", [reference["cpu_s"] / updates])
    for metric in ("peak_mib", "peak_reserved_mib"):
        if metric in result.turns[-1]:
            recorder.add(case, contender, metric, [result.turns[-1][metric]])


def main(recorder: Recorder, *, quick: bool, model: Path | None = None) -> None:
    """Every case in turn; with `model`, the cases of the real model in that folder instead.

    `reference_pass_cpu_s` is what our reference pass, made once, costs for the pairs of an update;
    `gradient_norm_relative` how far a peer's gradient norm is from ours, as a share of ours.
    """
    if model is not None:
        for case in real_cases(model)[: 2 if quick else None]:
            measure(recorder, case, REAL, rounds=2 if quick else 3, warm_up=1, folder=model)
        return
    for number, case in enumerate(cases(quick=quick)):
        contenders = FULL if number < 2 and not quick else QUICK
        if case["device"] == "cuda":
            contenders = CUDA
        if quick and case["checkpointing"]:
            contenders = QUICK[::2]
        measure(recorder, case, contenders, rounds=7)


if __name__ == "__main__":
    from bench.command import run

    run("step")
