"""The head op's compiled code, read without a GPU: `python -m bench.static`.

For every compute capability the kernels that `linear_logprobs` would launch are compiled, and each
one's main loop is counted: instructions by kind and per matrix instruction (MMA), width of loads,
asynchronous copies and MMAs under way; registers, stack, shared memory, CTAs an SM. For calls of
given sizes come the waves of CTAs that they fill, and an estimate of their time on two cards; how
it is made says `bench/estimate.py`. Nothing here is a measurement.

Rows go to results/static.jsonl, and STATIC.md beside it shows the latest of them; case `kernels`
names the commit that the kernels are of. Other kernels come first on PYTHONPATH, as does another
Triton.
"""

import argparse
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock

import fastdpo_kernels
import torch
import triton
from fastdpo_kernels import linear_logprobs

from bench.estimate import (
    CARDS,
    Card,
    ctas_per_sm,
    launch_seconds,
    operation_seconds,
    tensor_share,
    waves_of,
)
from bench.harness import FAILED, RESULTS, Recorder, Row, latest, read
from bench.launches import Capability, Compiled, Launch, Work, pretended

STATIC = RESULTS.with_name("static.jsonl")
MACHINE = {"name": "compiled code, no GPU"}

HEADS = ((4096, 128256), (4096, 32000), (2560, 262144), (4096, 151936))
"""(H, V) of Llama-3.1-8B, Llama-2-7B, Gemma-3-4B and Qwen3-8B."""

TOKENS = (8192, 2048, 32768)

WORKS: dict[str, dict[str, Any]] = {
    "train": {},
    "score": {},
    "train skipping": {"skip_mass": 1e-3},
    "train fp16": {"dtype": torch.float16},
    "train capped, with figures": {
        "softcap": 30.0,
        "outputs": ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs"),
    },
    "train low memory": {"max_buffer_mib": 64},
    "train in Triton": {"in_triton": True},
}
"""What is asked of the op, beside its sizes; "train" makes the gradient of the states too, "in
Triton" by our own second product where the launch table takes cuBLAS'."""

RAGGED_HIDDEN = 1000
"""An H whose rows do not all begin on 32 bytes: its kernels load what they can, and may spill."""

ODD_SIZES = (
    (1001, 64, 130),
    (1001, 4096, 32003),
    (2048, 2560, 262144),
    (1001, RAGGED_HIDDEN, 32003),
)
"""(N, H, V): an H shorter than a tile, N and V that are no multiples of 16, Gemma's, all of it."""

SIZED_WORKS = ("train", "score", "train in Triton")
"""Of which waves and times are told."""

DEPTHS: dict[str, tuple[tuple[str, ...], bool, tuple[tuple[int, int, int], ...]]] = {
    "quick": (SIZED_WORKS[:1], False, ()),
    "usual": (SIZED_WORKS, True, ()),
    "every": (tuple(WORKS), True, ODD_SIZES),
}
"""Works whose kernels are told, whether calls of all sizes are, and more sizes to compile for."""


def work_of(
    capability: Capability, work: str, tokens: int, hidden: int, vocabulary: int, **more: Any
) -> Work:
    """What one call launches on the card of this capability.

    Args:
        capability: a key of `CARDS`.
        work: a key of `WORKS`.
        tokens: rows N of the hidden states.
        hidden: their size H.
        vocabulary: rows V of the head.
        more: further options of `linear_logprobs`, or `dtype` of the operands.
    """
    options = {**WORKS[work], **more}
    dtype = options.pop("dtype", torch.bfloat16)
    chosen = nullcontext()
    if options.pop("in_triton", False):
        from fastdpo_kernels._configs import CONFIGS

        table = {key: replace(each, gradient_in_triton=True) for key, each in CONFIGS.items()}
        chosen = mock.patch.dict(CONFIGS, table)
    with torch.device("meta"):
        states = torch.empty(tokens, hidden, dtype=dtype, requires_grad=work != "score")
        weight = torch.empty(vocabulary, hidden, dtype=dtype)
        targets = torch.empty(tokens, dtype=torch.int64)
    with chosen, pretended(capability, CARDS[capability].properties) as done:
        linear_logprobs(states, weight, targets, ignore_index=None, backend="triton", **options)
    return done


def named(one: Launch) -> str:
    """The kernel and what it was compiled for."""
    return f"{one.kernel} {one.variant}".strip()


def kernels_of(works: Iterable[Work]) -> dict[str, Launch]:
    """The first launch of every kernel and variant."""
    found: dict[str, Launch] = {}
    for work in works:
        for one in work.launches:
            found.setdefault(named(one), one)
    return found


def kernel_figures(compiled: Compiled, card: Card) -> dict[str, float]:
    """What is told of one compiled kernel, by metric."""
    code, loop = compiled.code, compiled.code.main
    figures = {
        "registers_count": float(code.registers),
        "stack_bytes": float(code.stack_bytes),
        "shared_bytes": float(compiled.shared_bytes),
        "ctas_per_sm_count": float(ctas_per_sm(compiled, card)),
    }
    if loop is None:
        return figures
    figures |= {
        "loop_per_mma_count": len(loop.instructions) / len(loop.mmas),
        "mma_count": float(len(loop.mmas)),
        "narrow_loads_count": float(loop.narrow_loads),
        "copies_count": float(loop.copies),
        "copy_groups_in_flight_count": float(loop.copy_groups_in_flight),
    }
    if loop.mma_waits:
        figures["mma_in_flight_count"] = float(min(loop.mma_waits))
        figures["mma_waits_count"] = float(len(loop.mma_waits))
    share = tensor_share(compiled, card)
    return figures | ({} if share is None else {"tensor_peak_relative": share})


def described(compiled: Compiled) -> str:
    """The kernel's loop in words."""
    loop = compiled.code.main
    if loop is None:
        sizes = [len(each.instructions) for each in compiled.code.loops]
        return f"no MMA; loops of {sizes} instructions" if sizes else "no MMA, no loop"
    kinds = ", ".join(f"{count} {kind}" for kind, count in loop.by_kind().items())
    return f"{compiled.warps} warps, {compiled.stages} stages: {kinds}"


def call_seconds(
    work: Work, card: Card, tokens: int, hidden: int, vocabulary: int
) -> dict[str, float]:
    """Estimated seconds of every kernel and operation of a call, by name."""
    seconds: dict[str, float] = {}
    launches = {name: sum(named(o) == name for o in work.launches) for name in kernels_of([work])}
    for one in work.launches:
        rows = one.sizes.get("rows", tokens / launches[named(one)])
        flops = 2.0 * rows * hidden * vocabulary
        seconds[one.kernel] = seconds.get(one.kernel, 0.0) + launch_seconds(one, flops, card)
    for each in work.operations:
        name = "torch.mm" if each.flops else "other of torch"
        seconds[name] = seconds.get(name, 0.0) + operation_seconds(each, card)
    return seconds


def kernels_commit() -> str:
    """The last commit of the kernels that were imported, with a + where files differ from it."""
    folder = Path(fastdpo_kernels.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments, "--", "."]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    return (git("log", "-1", "--format=%h") or "unknown") + ("+" if git("status", "-s") else "")


def record_kernels(recorder: Recorder, case: Mapping[str, Any], works: Iterable[Work]) -> None:
    """Rows of every kernel that was compiled for one capability."""
    card = CARDS[_capability(case)]
    for name, one in kernels_of(works).items():
        if one.compiled is None:
            _add(recorder, case, name, "stack_bytes", outcome=FAILED, note=one.failure)
            continue
        note = described(one.compiled)
        for metric, figure in kernel_figures(one.compiled, card).items():
            _add(recorder, case, name, metric, [figure], note=note)
            note = ""


def record_call(
    recorder: Recorder, case: Mapping[str, Any], work: Work, sizes: tuple[int, int, int]
) -> None:
    """Waves of a call's kernels, and its time on cards whose rates are assumed."""
    card = CARDS[_capability(case)]
    if any(one.compiled is None for one in work.launches):
        return
    for name in kernels_of([work]):
        launches = [one for one in work.launches if named(one) == name]
        found = waves_of(launches, card)
        if launches[0].compiled.code.main is None:
            continue
        note = f"{found.launches} launches, {found.ctas} CTAs, {found.slots} at once"
        _add(recorder, case, launches[0].kernel, "waves_count", [found.waves], note=note)
        _add(recorder, case, launches[0].kernel, "wave_use_relative", [found.use])
    if card.cublas_flops_per_s is None:
        return
    seconds = call_seconds(work, card, *sizes)
    for name, taken in seconds.items():
        _add(recorder, case, name, "estimated_ms", [1e3 * taken])
    _add(recorder, case, "fastdpo", "estimated_ms", [1e3 * sum(seconds.values())])
    products = 1 if case["work"] == "score" else 2
    tokens, hidden, vocabulary = sizes
    bare = products * 2 * tokens * hidden * vocabulary / card.cublas_flops_per_s
    _add(recorder, case, "bare products", "estimated_ms", [1e3 * bare])


def _add(recorder: Recorder, case: Mapping[str, Any], contender: str, metric: str, *figures: Any,
         **more: Any) -> None:  # fmt: skip
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    recorder.add(case, contender, metric, *figures, machine=MACHINE, versions=versions, **more)


def _capability(case: Mapping[str, Any]) -> Capability:
    major, _, minor = case["capability"].partition(".")
    return int(major), int(minor)


def ask(recorder: Recorder, capabilities: Sequence[Capability], *, depth: str) -> None:
    """Compile and write; `depth` is one of `DEPTHS`."""
    names, every_size, odd_sizes = DEPTHS[depth]
    versions = {"kernels": kernels_commit(), "triton": triton.__version__}
    first = (TOKENS[0], *HEADS[0])
    for capability in capabilities:
        case = {"capability": "{}.{}".format(*capability), "gpu": CARDS[capability].name}
        case |= versions
        works = {work: work_of(capability, work, *first) for work in names}
        record_kernels(recorder, case, works.values())
        for sizes in odd_sizes:
            odd = {"sizes": "N={} H={} V={}".format(*sizes)}
            done = [work_of(capability, work, *sizes) for work in names]
            record_kernels(recorder, {**case, **odd}, done)
        calls = [(work, first) for work in SIZED_WORKS if work in names]
        if every_size:
            others = [(tokens, *head) for tokens in TOKENS for head in HEADS]
            calls += [("train", sizes) for sizes in others if sizes != first]
        for work, sizes in calls:
            done = works[work] if sizes == first else work_of(capability, work, *sizes)
            asked = dict(zip(("tokens", "hidden", "vocabulary"), sizes, strict=True))
            record_call(recorder, {**case, "work": work, **asked}, done, sizes)


COLUMNS = {
    "loop_per_mma_count": "instr / MMA", "narrow_loads_count": "2-byte loads",
    "copies_count": "async copies", "copy_groups_in_flight_count": "copies in flight",
    "mma_in_flight_count": "MMAs in flight", "registers_count": "registers",
    "stack_bytes": "stack", "shared_bytes": "shared", "ctas_per_sm_count": "CTAs / SM",
    "tensor_peak_relative": "of peak",
}  # fmt: skip


def tables(rows: Sequence[Row]) -> str:
    """STATIC.md: kernels by capability, and calls by size, of every commit and Triton."""
    lines = ["# Compiled code, read without a GPU", ""]
    lines += ["Generated by `python -m bench.static` from its rows; do not edit. No time here is"]
    lines += ["measured: `bench/estimate.py` says how `estimated ms` and `of peak` are made.", ""]
    rows = sorted(latest(rows), key=_version)
    for (kernels, version), group in groupby(rows, key=_version):
        own = list(group)
        lines += [f"## kernels of {kernels}, triton {version}", ""]
        lines += ["| GPU | kernel | " + " | ".join(COLUMNS.values()) + " |"]
        lines += ["|---" * (2 + len(COLUMNS)) + "|"]
        lines += _kernel_lines([row for row in own if "work" not in row.case])
        calls = [row for row in own if "work" in row.case]
        if calls:
            lines += [
                "",
                "| GPU | call | waves (use) of each kernel | estimated ms |",
                "|---|---|---|---|",
            ]
            lines += _call_lines(calls)
        lines.append("")
    return "\n".join(lines)


def _version(row: Row) -> tuple[str, str]:
    return row.case["kernels"], row.case["triton"]


def _gpu(row: Row) -> str:
    return f"{row.case['capability']} {row.case['gpu']}"


def _kernel_lines(rows: Sequence[Row]) -> list[str]:
    lines = []
    by_kernel: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        kernel = f"{row.contender} {row.case.get('sizes', '')}".strip()
        by_kernel.setdefault((_gpu(row), kernel), {})[row.metric] = row
    for (gpu, kernel), found in by_kernel.items():
        failed = next((row.note for row in found.values() if not row.samples), "")
        cells = [f"{found[m].p50:.4g}" if m in found and found[m].samples else "" for m in COLUMNS]
        lines.append(f"| {gpu} | {kernel} {failed}| " + " | ".join(cells) + " |")
    return lines


def _call_lines(rows: Sequence[Row]) -> list[str]:
    lines = []
    by_call: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        call = "{work} N={tokens} H={hidden} V={vocabulary}".format(**row.case)
        by_call.setdefault((_gpu(row), call), []).append(row)
    for (gpu, call), own in by_call.items():
        use = {row.contender: row.p50 for row in own if row.metric == "wave_use_relative"}
        waves = [
            f"{row.contender} {row.p50:.0f} ({use[row.contender]:.0%})"
            for row in own
            if row.metric == "waves_count"
        ]
        taken = [f"{row.contender} {row.p50:.1f}" for row in own if row.metric == "estimated_ms"]
        lines.append(f"| {gpu} | {call} | {', '.join(waves)} | {', '.join(taken)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the compiled code of all capabilities, or of those that are named."""
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__)
    parser.add_argument("--depth", choices=DEPTHS, default="usual", help="how much is compiled")
    parser.add_argument("--results", type=Path, default=STATIC, help="file of rows to append to")
    known = {"{}.{}".format(*capability): capability for capability in CARDS}
    parser.add_argument("--capability", nargs="+", choices=known, default=list(known))
    chosen = parser.parse_args(arguments)
    recorder = Recorder("static", chosen.results, prints=False)
    ask(recorder, [known[name] for name in chosen.capability], depth=chosen.depth)
    print(tables(recorder.rows))
    chosen.results.with_name("STATIC.md").write_text(tables(read(chosen.results)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
