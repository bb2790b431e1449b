"""The learning curve beside TRL's: the same pairs in the same order, update by update.

Samples of `loss_nat` are the losses of the updates in order; `curve_difference_relative` is how far
ours is from TRL's at each, relative. On the real tiny model where it lies beside the checkout.
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.contest import Turns, contest
from bench.harness import MEASURED, Recorder
from bench.inputs import story_model_or
from bench.learning import learn
from bench.step import CONTENDERS

FIGURES = {"loss_nat": "loss", "reward_margin_nat": "rewards/margins"}


def contend(case: Mapping[str, Any], turns: Turns) -> None:
    """Train to the end, then hand over the curve."""
    from bench.trainers import build

    with TemporaryDirectory() as folder:
        trainer = build(case, Path(folder), [])
        turns.ready()
        for _ in turns:
            trainer.train()
            log = [line for line in trainer.state.log_history if "loss" in line]
            turns.answer({metric: [line[name] for line in log] for metric, name in FIGURES.items()})


def main(recorder: Recorder, *, quick: bool, model: Path | None = None) -> None:
    """LoRA and full, each beside TRL; with `model`, the real model in that folder on real pairs."""
    if model is not None:
        learn(recorder, model, quick=quick)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for tuning in ("lora", "full"):
        case = {
            "tuning": tuning, "model": story_model_or("tiny"), "dtype": "float32",
            "device": device, "pairs": 16, "updates": 5 if quick else 60, "learning_rate": 5e-4,
            "threads": 1,
        }  # fmt: skip
        run = {"rows": case["pairs"] * case["updates"], "logging_steps": 1, "checkpointing": False}
        names = ("fastdpo", "trl precomputed" if tuning == "full" else "trl")
        functions = dict.fromkeys(names, "bench.quality:contend")
        given = {name: {**case, **run, **CONTENDERS[name]} for name in names}
        results = dict(contest(functions, given, warm_up=0, rounds=1))
        for name, result in results.items():
            for metric in FIGURES:
                samples = result.turns[0][metric] if result.outcome == MEASURED else ()
                recorder.add(case, name, metric, samples, outcome=result.outcome, note=result.note)
        if all(result.outcome == MEASURED for result in results.values()):
            ours, theirs = (results[name].turns[0]["loss_nat"] for name in names)
            apart = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
            recorder.add(case, "fastdpo", "curve_difference_relative", apart)


if __name__ == "__main__":
    from bench.command import run

    run("quality")
