"""Reference log-probs: how long to build, how long to find again, and the store at a million rows.

TRL's peer is `precompute_ref_log_probs`: what it adds to building a trainer, the first time and,
from its cache file, the second.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bench.contest import Turns, contest, solo
from bench.harness import MEASURED, Recorder
from bench.inputs import story_model_or
from bench.measuring import Stopwatch

CONTENDERS = {"fastdpo": "bench.reference:fill_fastdpo", "trl": "bench.reference:fill_trl"}
ROWS_PER_SHARD = 4096
HITS = 5


def fill_fastdpo(case: Mapping[str, Any], turns: Turns) -> None:
    """Fill a new trainer's reference each turn; after the first one the store has it all."""
    from bench.trainers import build
    from fastdpo.ref_cache import RefLogpsProvider

    with TemporaryDirectory() as folder:
        trainer: Any = build(case, Path(folder), [])
        given = trainer.reference
        turns.ready()
        for _ in turns:
            source = RefLogpsProvider(
                given.reference, given.folder, compute_dtype=given.compute_dtype, **given.options
            )
            trainer.train_groups.ref_logps = None
            watch = Stopwatch(trainer.args.device)
            turns.answer(watch.measure(lambda s=source: s.attach(trainer.train_groups, "train")))


def fill_trl(case: Mapping[str, Any], turns: Turns) -> None:
    """The same of TRL: the hash of the model that names its cache file, and the pass."""
    from trl.trainer.utils import hash_module

    from bench.trainers import build

    with TemporaryDirectory() as folder:
        trainer: Any = build(case, Path(folder), [])
        batch = case["pairs"] // case["accumulation"]

        def fill() -> None:
            trainer._precompute_model_hash = hash_module(trainer.model)
            trainer._precompute_ref_logps(trainer.train_dataset, "train", batch)

        turns.ready()
        for _ in turns:
            turns.answer(Stopwatch(trainer.args.device).measure(fill))


def look_up(case: Mapping[str, Any], turns: Turns) -> None:
    """Write a store of `rows` rows, then look all of them up, cold and warm."""
    from fastdpo.ref_cache.store import KEY_BYTES, ReferenceStore, ScoredCompletion

    draw = np.random.default_rng(0)
    count, token_logps = case["rows"], np.full(case["tokens_each"], -0.5, dtype=np.float32)
    keys = [draw.bytes(KEY_BYTES) for _ in range(count)]
    with TemporaryDirectory() as folder:
        turns.ready()
        for _ in turns:
            figures: dict[str, float] = {}
            root = Path(folder) / str(time.monotonic_ns())
            store = ReferenceStore(root, {})
            began = time.perf_counter()
            for start in range(0, count, ROWS_PER_SHARD):
                shard = keys[start : start + ROWS_PER_SHARD]
                store.append([ScoredCompletion(key, -1.0, token_logps) for key in shard])
            figures["append_s"] = time.perf_counter() - began
            store = ReferenceStore(root, {})
            for name in ("cold_look_up_s", "warm_look_up_s"):
                began = time.perf_counter()
                found = store.lookup(keys)
                figures[name] = time.perf_counter() - began
            assert np.isfinite(found).all(), "every key was written"
            files = store.folder.iterdir()
            figures["store_bytes"] = sum(path.stat().st_size for path in files)
            turns.answer(figures)


def main(recorder: Recorder, *, quick: bool) -> None:
    """Build and hit beside TRL, then the large store."""
    case: dict[str, Any] = {"tuning": "lora", "rows": 128 if quick else 512}
    if torch.cuda.is_available():
        case |= {"model": "1b", "dtype": "bfloat16", "device": "cuda", "longest_row_tokens": 1024}
    else:
        case |= {"model": story_model_or("tiny"), "dtype": "float32", "device": "cpu", "threads": 1}
    run = {"pairs": 32, "accumulation": 2, "checkpointing": False, "updates": 1}
    given = {name: {**case, **run, "library": name} for name in CONTENDERS}
    for name, result in contest(CONTENDERS, given, warm_up=0, rounds=1 + HITS):
        if result.outcome != MEASURED:
            recorder.add(case, name, "build_s", outcome=result.outcome, note=result.note)
            continue
        build_s, *hits_s = result.column("wall_s")
        recorder.add(case, name, "build_s", [build_s])
        recorder.add(case, name, "build_cpu_s", [result.turns[0]["cpu_s"]])
        recorder.add(case, name, "hit_s", hits_s)
    size = {"rows": 100_000 if quick else 1_000_000, "tokens_each": 100}
    found = solo("bench.reference:look_up", size, turns=3 if quick else 1)
    for metric in ("append_s", "cold_look_up_s", "warm_look_up_s", "store_bytes"):
        samples = found.column(metric) if found.outcome == MEASURED else ()
        recorder.add(size, "fastdpo", metric, samples, outcome=found.outcome, note=found.note)


if __name__ == "__main__":
    from bench.command import run

    run("reference")
