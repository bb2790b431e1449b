"""The head op against its peers, the bare matrix products and the roofline.

Works: `score` (log-probs, no gradient, 2NHV FLOPs), `frozen` (log-probs and the gradient of the
states, 4NHV), `trained` (that of the head too, 6NHV). Every contender has a process of its own on
the same inputs; peak memory is of its first run after a small one, above the inputs.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from fastdpo_kernels.oracle import linear_logprobs_oracle

from bench import roofline
from bench.contest import Result, Turns, contest
from bench.harness import MEASURED, MISSING, Recorder, spread
from bench.heads import BARE_GEMMS, HEADS, QUICK_HEADS, bare_gemms, reason_missing
from bench.inputs import HeadInputs, head_inputs, peakedness
from bench.measuring import PeakMemory, Stopwatch

GEMMS = {"score": 1, "frozen": 2, "trained": 3}
"""Matrix products of N x H x V that each work cannot do without."""

SIZES_CPU = {"quick": ((512, 256, 8192),), "full": ((1024, 512, 32000), (512, 1024, 32000))}
HEADS_CUDA = ((4096, 128256), (4096, 32000), (2560, 262144), (4096, 151936))
"""(H, V) of Llama-3.1-8B, Llama-2-7B, Gemma-3-4B and Qwen3-8B."""

TOKENS_CUDA = (8192, 2048, 32768)
SIZES_CUDA = tuple((n, h, v) for n in TOKENS_CUDA for h, v in HEADS_CUDA)
"""(N, H, V)."""


def contend(case: Mapping[str, Any], turns: Turns) -> None:
    """One contender of one case; each turn is the whole work once."""
    device = torch.device(case["device"])
    inputs = head_inputs(
        case["kind"],
        case["tokens"],
        case["hidden"],
        case["vocabulary"],
        dtype=getattr(torch, case["dtype"]),
        device=case["device"],
    )
    if case["contender"] == BARE_GEMMS:

        def work(chosen: HeadInputs) -> Any:
            bare_gemms(chosen.hidden_states, chosen.weight, GEMMS[case["work"]])
    else:
        work = _head_work(case)
    work(_first(inputs, 8))
    memory = PeakMemory(device)
    memory.start()
    logps = work(inputs)
    facts = memory.over_start() | peakedness(inputs)
    if logps is not None and logps.ndim:
        facts["worst_error_nat"] = _worst_error(logps, inputs)
    del logps
    turns.ready(facts)
    watch = Stopwatch(device)
    for _ in turns:
        turns.answer(watch.measure(lambda: work(inputs)))


def _head_work(case: Mapping[str, Any]) -> Any:
    op, name = HEADS[case["contender"]](), case["work"]

    def work(inputs: HeadInputs) -> torch.Tensor:
        states = inputs.hidden_states.detach().requires_grad_(name != "score")
        weight = inputs.weight.detach().requires_grad_(name == "trained")
        with torch.set_grad_enabled(name != "score"):
            logps = op(states, weight, inputs.target_ids)
        if name != "score":
            logps.backward(torch.ones_like(logps))
        return logps.detach()

    return work


def _first(inputs: HeadInputs, rows: int) -> HeadInputs:
    return HeadInputs(inputs.hidden_states[:rows], inputs.weight, inputs.target_ids[:rows])


def _worst_error(logps: torch.Tensor, inputs: HeadInputs) -> float:
    """Largest error of a log-prob against fp64, in nats, over the first 256 tokens."""
    some = _first(inputs, 256)
    truth = linear_logprobs_oracle(some.hidden_states, some.weight, some.target_ids)
    return float((logps[:256].double() - truth["token_logps"]).abs().max())


def cases(*, quick: bool) -> list[dict[str, Any]]:
    """What is asked, quick or in full, on this machine.

    On CUDA the most telling first, since a time limit cuts the tail: every head at the first N and
    every work before the next N, and inputs as a trained model's before random ones.
    """
    if torch.cuda.is_available():
        sizes, common = SIZES_CUDA, {"device": "cuda", "dtype": "bfloat16"}
        works = ("frozen", "score", "trained")
    else:
        sizes = SIZES_CPU["quick" if quick else "full"]
        common = {"device": "cpu", "dtype": "float32", "threads": 1}
        works = ("frozen",) if quick else ("frozen", "score", "trained")
    found = [
        {"work": work, "kind": kind, "tokens": n, "hidden": h, "vocabulary": v, **common}
        for work in works
        for n, h, v in sizes
        for kind in (("peaked",) if quick or work != "frozen" else ("peaked", "random"))
    ]
    if common["device"] == "cuda":
        found.sort(key=lambda case: (case["kind"] != "peaked", TOKENS_CUDA.index(case["tokens"])))
    return found


def measure(
    recorder: Recorder, case: Mapping[str, Any], contenders: Iterable[str], *, rounds: int
) -> None:
    """The contenders of one case, in turns, and their rows; with `BARE_GEMMS` also the roofline."""
    names = [name for name in contenders if not recorder.has(case, name, "time_ms")]
    if not names:
        return
    missing = {name: reason for name in names if (reason := reason_missing(name))}
    for name, reason in missing.items():
        recorder.add(case, name, "time_ms", outcome=MISSING, note=reason)
        names.remove(name)
    functions = {roofline.CONTENDER: roofline.FUNCTION} if BARE_GEMMS in names else {}
    functions |= dict.fromkeys(names, "bench.kernel:contend")
    given = {name: {**case, "contender": name} for name in functions}
    flops = 2 * case["tokens"] * case["hidden"] * case["vocabulary"] * GEMMS[case["work"]]
    alone = case["device"] == "cuda"
    floor_s = None
    for name, result in contest(functions, given, warm_up=2, rounds=rounds, alone=alone):
        if name == roofline.CONTENDER:
            rate = roofline.gemm_rate(result)
            floor_s = flops / rate if rate else None
        else:
            _record(recorder, case, name, result, floor_s)


def _record(
    recorder: Recorder,
    case: Mapping[str, Any],
    contender: str,
    result: Result,
    floor_s: float | None,
) -> None:
    if result.outcome != MEASURED:
        recorder.add(case, contender, "time_ms", outcome=result.outcome, note=result.note)
        return
    facts = result.facts
    state = f"top-1 {facts['mean_top1_probability']}, entropy {facts['entropy_nat']} nat"
    times_ms = [1e3 * second for second in result.column("wall_s")]
    reached = 1e3 * floor_s / spread(times_ms)[1] if floor_s else None
    recorder.add(case, contender, "time_ms", times_ms, note=state, of_roofline=reached)
    if case["device"] == "cpu":
        recorder.add(case, contender, "cpu_ms", [1e3 * second for second in result.column("cpu_s")])
    for metric in ("peak_mib", "peak_reserved_mib", "worst_error_nat"):
        if metric in facts and contender != BARE_GEMMS:
            recorder.add(case, contender, metric, [facts[metric]])


PARTS: dict[str, tuple[str, ...]] = {
    "ours": ("fastdpo", "trl"),
    "rest": (BARE_GEMMS, "fastdpo", *(name for name in HEADS if name not in ("fastdpo", "trl"))),
    "all": (BARE_GEMMS, *HEADS),
}
"""Contenders of a part of the question. Ours is among the rest again: ratios are of one run."""


def main(recorder: Recorder, *, quick: bool, part: str = "all") -> None:
    """Every case in turn; `part` is one of `PARTS`, for a host whose time is short."""
    rounds = 50 if torch.cuda.is_available() else 9
    for case in cases(quick=quick):
        chosen = PARTS[part]
        if quick:
            chosen = tuple(name for name in chosen if name in (BARE_GEMMS, *QUICK_HEADS))
        measure(recorder, case, chosen, rounds=rounds)


if __name__ == "__main__":
    from bench.command import run

    run("kernel", parts=tuple(PARTS))
