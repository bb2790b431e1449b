"""Compiles the head's kernels on all cores, before tests and benches want them one at a time.

`make gpu` runs it first. A process compiles what one call would (`bench/launches.py`) into Triton's
cache, which all processes share. Kernels that the JIT makes otherwise after all, an unaligned
tensor's for instance, are compiled when they are wanted.
"""

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch

from bench.launches import Capability
from bench.static import CARDS, HEADS, work_of

FIGURES = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
LOGGED = ("entropy", "mean_logits", "is_top1")
TESTED = ((300, 1000, 3001), (257, 512, 32003), (1, 64, 130))
"""(N, H, V) of tests/gpu/test_kernels.py."""


def jobs() -> list[tuple[str, tuple[int, int, int], dict[str, Any]]]:
    """Work, sizes and options of every call, those of bench.kernel first."""
    bench: list[tuple[str, tuple[int, int, int], dict[str, Any]]] = [
        (work, (8192, *HEADS[0]), {})
        for work in ("train", "score", "train skipping", "train low memory")
    ]
    bench += [("train", (8192, *HEADS[0]), {"outputs": LOGGED})]
    bench += [("train", (8192, *head), {}) for head in HEADS[1:]]
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    tests = [
        (work, sizes, {"dtype": dtype, **capped, **asked})
        for sizes, dtype, capped in product(TESTED, dtypes, ({}, {"softcap": 30.0}))
        for work, asked in (("train", {"outputs": FIGURES}), ("train", {}), ("score", {}))
    ]
    return bench + tests


def compile_one(capability: Capability, number: int) -> tuple[int, int, float]:
    """Kernels made, those that failed, and CPU seconds, of one job."""
    work, sizes, options = jobs()[number]
    began = os.times()
    done = work_of(capability, work, *sizes, **options)
    ended = os.times()
    made = {id(one.compiled) for one in done.launches if one.compiled is not None}
    failed = {one.kernel for one in done.launches if one.compiled is None}
    taken = sum(ended[:4]) - sum(began[:4])  # of this process and its children: ptxas is one
    return len(made), len(failed), taken


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile for this machine's GPU, or for the capability that is named."""
    parser = argparse.ArgumentParser(prog="python -m bench.compile_ahead", description=__doc__)
    known = {"{}.{}".format(*capability): capability for capability in CARDS}
    parser.add_argument("--capability", choices=known, help="of a GPU that is not there")
    chosen = parser.parse_args(arguments)
    capability = known[chosen.capability] if chosen.capability else present()
    began = time.perf_counter()
    numbers = range(len(jobs()))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = list(pool.map(compile_one, [capability] * len(numbers), numbers))
    made, failed, cpu_s = (sum(column) for column in zip(*found, strict=True))
    print(f"{len(numbers)} calls, {made} kernels, {failed} failed: {cpu_s:.1f} CPU s in", end=" ")
    print(f"{time.perf_counter() - began:.1f} s on {os.cpu_count()} cores")
    return 1 if failed else 0


def present() -> Capability:
    """The entry of this machine's GPU: its own, or the newest that is not newer.

    Raises:
        RuntimeError: there is no GPU, or none that the kernels know.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device: name one with --capability 9.0.")
    found = torch.cuda.get_device_capability()
    return max(capability for capability in CARDS if capability <= found)


if __name__ == "__main__":
    raise SystemExit(main())
