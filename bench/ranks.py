"""An update shared by several processes: its time, the bytes it sends, and the time it talks.

torch's launcher starts the processes. On a CPU they share its cores and talk over gloo, so the
times say what an update costs beside its work, not how much faster GPUs are. `waiting_relative` is
the part of an update that the first process spends in collectives, waiting for slower ones
included.
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import TrainerCallback

from bench.harness import FAILED, ROOT, Recorder
from fastdpo.system import ranks

WARM_UP = 2
METRICS = ("update_s", "sent_bytes", "collectives_count", "waiting_relative")


class EachUpdate(TrainerCallback):
    """Notes what an update took, from one optimizer step's end to the next."""

    def __init__(self) -> None:
        self.updates: list[dict[str, float]] = []
        self._before = (0.0, 0, 0, 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done = ranks.traffic
        now = (time.perf_counter(), done.tensor_bytes, done.collectives, done.seconds)
        took, sent, collectives, waited = (
            after - before for after, before in zip(now, self._before, strict=True)
        )
        self._before = now
        if state.global_step > WARM_UP:
            values = (took, sent, collectives, waited / took)
            self.updates.append(dict(zip(METRICS, values, strict=True)))


def work(case: Mapping[str, Any], result: Path) -> None:
    """Train as one of the processes; the first writes what each update took."""
    from bench.trainers import build

    torch.set_num_threads(1)
    noted = EachUpdate()
    build({**case, "library": "fastdpo"}, result.parent, [noted]).train()
    if ranks.is_first():
        result.write_text(json.dumps(noted.updates))
    ranks.leave()


def main(recorder: Recorder, *, quick: bool) -> None:
    """One to four processes, an adapter and all weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    most = torch.cuda.device_count() if device == "cuda" else 2 if quick else 3
    for tuning in ("lora", "full"):
        case = {
            "tuning": tuning, "model": "1b" if device == "cuda" else "tiny" if quick else "small",
            "dtype": "bfloat16" if device == "cuda" and tuning == "lora" else "float32",
            "device": device, "pairs": 16, "accumulation": 1, "checkpointing": False,
            "rows": 64, "updates": WARM_UP + (3 if quick else 8), "longest_row_tokens": 256,
            "logging_steps": 1000,
        }  # fmt: skip
        for count in range(1, most + 1):
            _record(recorder, {**case, "processes": count})


def _record(recorder: Recorder, case: Mapping[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        result = Path(folder) / "updates.json"
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(case["processes"])]
        words = ["-m", "bench.ranks", "--work", json.dumps(case), str(result)]
        done = subprocess.run(
            [sys.executable, *launcher, *words], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode or not result.exists():
            note = done.stderr.strip()[-500:]
            recorder.add(case, "fastdpo", "update_s", outcome=FAILED, note=note)
            return
        updates = json.loads(result.read_text())
    for metric in METRICS:
        recorder.add(case, "fastdpo", metric, [each[metric] for each in updates])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(sys.argv[2]), Path(sys.argv[3]))
    else:
        from bench.command import run

        run("ranks")
