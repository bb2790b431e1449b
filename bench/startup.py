"""What a run does before its first update: rows to pairs, and both of them found again.

The rows are real conversational pairs, repeated with a number in each turn so that no two are
alike, in a file of JSON lines; the tokenizer and the chat template are a real model's
(`--model FOLDER`), the model itself a Llama of one layer with that vocabulary. Rows a second are
compared with TRL's own preparation, its map of one and of two processes and an empty cache of
`datasets`. A second start is a new process: its store of reference log-probs is filled beforehand,
with random ones but for those that the spot check scores again.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import bench.contest
from bench.contest import Turns, contest, solo
from bench.harness import MEASURED, SEED, Recorder
from bench.inputs import SHARED_DATA
from bench.measuring import PeakMemory
from bench.real import content_name, instruction_rows

CONVERSATIONS = SHARED_DATA / "prefs" / "norm" / "llamafactory_dpo_en_demo_conv.jsonl"
SPOT_CHECKED = 8
"""Pairs of the lowest keys, which the spot check looks at; the first run computes them."""
SHARD_PAIRS = 2048
TURN_LIMIT_S = 1200.0
"""A million rows take longer than what other benches ask of a turn."""


def varied_rows(count: int, words: int | None = None) -> Iterator[dict[str, Any]]:
    """So many conversational pairs that differ.

    Args:
        count: how many.
        words: most words of a turn; None leaves turns as long as they are.
    """
    with CONVERSATIONS.open(encoding="utf-8") as lines:
        real = [*map(json.loads, lines), *instruction_rows()]
    draw = np.random.default_rng(SEED)
    for number in range(count):
        row: dict[str, Any] = {}
        for name in ("prompt", "chosen", "rejected"):
            turns = [dict(turn) for turn in real[number % len(real)][name]]
            said = turns[-1]["content"].split(" ")[:words]
            said.insert(int(draw.integers(len(said) + 1)), str(number))
            turns[-1]["content"] = " ".join(said)
            row[name] = turns
        yield row


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def _cpu_s() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def _tokenizer(case: Mapping[str, Any]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(case["folder"])


def prepare_fastdpo(case: Mapping[str, Any], turns: Turns) -> None:
    """Prepare the rows, read from their file, each turn."""
    from fastdpo.data import prepare_pairs, read_rows, workers
    from fastdpo.options import TokenizationOptions

    tokenizer = _tokenizer(case)
    options = TokenizationOptions(
        truncation_mode="keep_start", dataset_num_proc=case["processes"], data_cache="off"
    )
    workers.STARTED_FOR_SECONDS = 0.0
    turns.ready()
    for _ in turns:
        began, cpu = time.perf_counter(), _cpu_s()
        prepare_pairs(read_rows(case["file"]), tokenizer, options, progress=False)
        turns.answer(_rates(case, began, cpu))


def prepare_trl(case: Mapping[str, Any], turns: Turns) -> None:
    """The same of TRL, as its trainer does it in `__init__`."""
    from datasets import disable_caching, load_dataset
    from trl import DPOConfig, DPOTrainer

    disable_caching()
    tokenizer = _tokenizer(case)
    processes = case["processes"] if case["processes"] > 1 else None
    turns.ready()
    for _ in turns:
        with TemporaryDirectory() as folder:
            args = DPOConfig(
                folder, truncation_mode="keep_start", dataset_num_proc=processes, report_to="none",
                max_length=1024, bf16=False,
            )  # fmt: skip
            began, cpu = time.perf_counter(), _cpu_s()
            rows = load_dataset("json", data_files=case["file"], split="train", cache_dir=folder)
            trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
            DPOTrainer._prepare_dataset(trainer, rows, tokenizer, args, "train")
            turns.answer(_rates(case, began, cpu))


def _rates(case: Mapping[str, Any], began: float, cpu: float) -> dict[str, float]:
    wall_s, cpu_s = time.perf_counter() - began, _cpu_s() - cpu
    return {"rows_per_s": case["rows"] / wall_s, "rows_per_cpu_s": case["rows"] / cpu_s}


def _trainer(case: Mapping[str, Any], folder: Path) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastdpo import DPOConfig, DPOTrainer
    from fastdpo.data import read_rows
    from fastdpo.modeling.adapters import lora_config
    from fastdpo.system.start_up import start_up

    tokenizer = _tokenizer(case)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=2048,
        )
    )  # fmt: skip
    args = DPOConfig(
        str(folder / "out"), ref_cache=str(Path(case["kept"]) / "reference"),
        data_cache=str(Path(case["kept"]) / "data"), report_to="none", use_cpu=True,
        dataset_num_proc=1, disable_tqdm=True, ref_spot_check=0 if case.get("fill") else 4,
    )  # fmt: skip
    start_up.trainer_began()
    with start_up.part("data"):
        rows = read_rows(case["file"])
    parts = dict(start_up.parts)
    trainer = DPOTrainer(
        model, args=args, train_dataset=rows, processing_class=tokenizer,
        peft_config=lora_config(8, 16, 0.0, None),
    )  # fmt: skip
    for name, seconds in parts.items():
        start_up.parts[name] += seconds
    return trainer


def start(case: Mapping[str, Any], turns: Turns) -> None:
    """Build a trainer with its reference, as a run does before its first update."""
    from fastdpo.system.start_up import start_up

    memory = PeakMemory(torch.device("cpu"))
    turns.ready()
    for _ in turns:
        with TemporaryDirectory() as folder:
            memory.start()
            began = time.perf_counter()
            trainer = _trainer(case, Path(folder))
            if case.get("fill"):
                _fill(trainer)
            trainer.compute_references()
            next(iter(trainer.get_train_dataloader()))
            wall_s = time.perf_counter() - began
            parts = start_up.parts
            turns.answer(
                {
                    "data_s": parts["data"],
                    "reference_s": parts["reference"],
                    "ready_s": wall_s - parts["model"],
                    "pairs": len(trainer.train_groups),
                }
                | memory.over_start()
            )


def _fill(trainer: Any) -> None:
    """Fill the store with random log-probs, but for the pairs that the spot check looks at."""
    from fastdpo.ref_cache.store import ScoredCompletion, group_keys

    groups = trainer.train_groups
    store = trainer.reference.store(trainer.reference.folder)
    draw = np.random.default_rng(SEED)
    order = np.argsort(groups.row_keys[:, 0])[SPOT_CHECKED:].tolist()
    for first in range(0, len(order), SHARD_PAIRS):
        scored: dict[bytes, ScoredCompletion] = {}
        for index in order[first : first + SHARD_PAIRS]:
            group = groups[index]
            for key, ids in zip(group_keys(group), group.completions, strict=True):
                logps = -draw.random(len(ids), dtype=np.float32)
                scored[key] = ScoredCompletion(key, float(logps.astype(np.float64).sum()), logps)
        store.append(list(scored.values()))


def prepare_only(case: Mapping[str, Any], turns: Turns) -> None:
    """Prepare the rows of a file, or find their pairs: the peak of a process that does no more."""
    from fastdpo.data import cached_pairs, read_rows
    from fastdpo.options import TokenizationOptions

    tokenizer = _tokenizer(case)
    options = TokenizationOptions(
        data_cache=str(Path(case["kept"]) / "data"), dataset_num_proc=case["processes"]
    )
    memory = PeakMemory(torch.device("cpu"))
    turns.ready()
    for _ in turns:
        memory.start()
        began = time.perf_counter()
        pairs = cached_pairs(read_rows(case["file"]), tokenizer, options, progress=False)
        pairs.content_hash  # noqa: B018 (every run asks for it)
        wall_s = time.perf_counter() - began
        arrays = sum(array.nbytes for array in pairs.arrays.values())
        turns.answer(
            {"wall_s": wall_s, "arrays_mib": arrays / 2**20, "pairs": len(pairs)}
            | memory.over_start()
        )


def main(recorder: Recorder, *, quick: bool, model: Path | None = None) -> None:
    """Rows a second beside TRL, a second start, and peaks over the number of rows."""
    bench.contest.TURN_LIMIT_S = TURN_LIMIT_S
    folder = model or SHARED_DATA / "tokenizers" / "minimind_chatml"
    case = {
        "tokenizer": content_name(folder) if model else folder.name,
        "data": "real conversational pairs, repeated with numbers",
    }
    with TemporaryDirectory() as place:
        here = Path(place)
        _rows_a_second(recorder, case, str(folder), here, 500 if quick else 40_000)
        _second_start(recorder, case, str(folder), here, 1_000 if quick else 60_000)
        _peaks(recorder, case, str(folder), here, (1_000,) if quick else (10_000, 100_000))
        if not quick:
            _peaks(recorder, case | {"words_a_turn": 8}, str(folder), here, (1_000_000,), words=8)


def _rows_a_second(
    recorder: Recorder, case: dict[str, Any], folder: str, here: Path, rows: int
) -> None:
    file = str(write_rows(here / "few.jsonl", varied_rows(rows)))
    contenders = {"fastdpo": "bench.startup:prepare_fastdpo", "trl": "bench.startup:prepare_trl"}
    for processes in (1, 2):
        size = case | {"rows": rows, "processes": processes}
        given = {name: size | {"folder": folder, "file": file, "threads": 1} for name in contenders}
        found = contest(contenders, given, warm_up=0, rounds=1)
        for name, result in found:
            for metric in ("rows_per_s", "rows_per_cpu_s"):
                _add(recorder, size, name, metric, result)


def _second_start(
    recorder: Recorder, case: dict[str, Any], folder: str, here: Path, rows: int
) -> None:
    file = str(write_rows(here / "many.jsonl", varied_rows(rows)))
    size = case | {"rows": rows}
    given = size | {"folder": folder, "file": file, "kept": str(here / "start"), "threads": 1}
    first = solo("bench.startup:start", given | {"fill": True}, turns=1)
    if first.outcome != MEASURED:
        _add(recorder, size | {"start": "first"}, "fastdpo", "data_s", first)
        return
    again = solo("bench.startup:start", given, turns=1)
    _add(recorder, size | {"start": "first"}, "fastdpo", "data_s", first)
    for metric in ("data_s", "reference_s", "ready_s", "peak_mib"):
        _add(recorder, size | {"start": "second"}, "fastdpo", metric, again)


def _peaks(
    recorder: Recorder, case: dict[str, Any], folder: str, here: Path, sizes: Sequence[int],
    words: int | None = None,
) -> None:  # fmt: skip
    for rows in sizes:
        file = write_rows(here / "rows.jsonl", varied_rows(rows, words))
        given = {
            "folder": folder, "file": str(file), "kept": str(here / f"peak-{rows}"),
            "processes": 1 if words is None else 2, "rows": rows,
        }  # fmt: skip
        for name in ("first", "second"):
            size = case | {"rows": rows, "start": name, "processes": given["processes"]}
            found = solo("bench.startup:prepare_only", given, turns=1)
            for metric in ("wall_s", "peak_mib", "arrays_mib"):
                _add(recorder, size, "fastdpo", metric, found)


def _add(recorder: Recorder, case: Mapping[str, Any], name: str, metric: str, result: Any) -> None:
    samples = result.column(metric) if result.outcome == MEASURED else ()
    recorder.add(case, name, metric, samples, outcome=result.outcome, note=result.note)


if __name__ == "__main__":
    from bench.command import run

    run("startup")
