"""What the machine can do at best: copy bandwidth and matrix rate, to measure everything against.

Bandwidth is of a large copy, bytes read plus bytes written; the rate is of a large square product
of random numbers in the dtype at hand. Both are measured, never taken from a data sheet.
"""

from collections.abc import Mapping
from typing import Any

import torch

from bench.contest import Result, Turns, solo
from bench.harness import MEASURED, Recorder, spread
from bench.measuring import Stopwatch

COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
CONTENDER = "roofline"
FUNCTION = "bench.roofline:contend"


def contend(case: Mapping[str, Any], turns: Turns) -> None:
    """Measure both rates at every turn."""
    device, dtype = torch.device(case["device"]), getattr(torch, case["dtype"])
    size, count = GEMM_SIZE[device.type], COPY_BYTES[device.type] // 4
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    read = torch.empty(count, dtype=torch.float32, device=device).fill_(1.0)
    written = torch.empty_like(read)
    watch = Stopwatch(device)
    turns.ready()
    for _ in turns:
        gemm = watch.measure(lambda: torch.mm(left, right, out=product))
        copy = watch.measure(lambda: written.copy_(read))
        turns.answer(
            {
                "gemm_flops_per_s": 2 * size**3 / gemm["wall_s"],
                "copy_bytes_per_s": 2 * 4 * count / copy["wall_s"],
            }
        )


def gemm_rate(result: Result) -> float | None:
    """Median FLOP a second that a contest's roofline reached, None where it failed."""
    if result.outcome != MEASURED:
        return None
    return spread(result.column("gemm_flops_per_s"))[1]


def record(recorder: Recorder, case: Mapping[str, Any], result: Result) -> None:
    """Rows of one roofline, under the settings that change it."""
    settings = {name: case[name] for name in ("device", "dtype", "threads") if name in case}
    for metric in ("gemm_flops_per_s", "copy_bytes_per_s"):
        recorder.add(
            settings,
            CONTENDER,
            metric,
            result.column(metric) if result.outcome == MEASURED else (),
            outcome=result.outcome,
            note=result.note,
        )


def main(recorder: Recorder, *, quick: bool) -> None:
    """Both rates for each dtype and number of threads."""
    if torch.cuda.is_available():
        cases = [{"device": "cuda", "dtype": name} for name in ("bfloat16", "float32")]
    else:
        cases = [{"device": "cpu", "dtype": "float32", "threads": n} for n in (1, 2)]
    for case in cases[:1] if quick else cases:
        record(recorder, case, solo(FUNCTION, case, warm_up=3, turns=15))


if __name__ == "__main__":
    from bench.command import run

    run("roofline")
