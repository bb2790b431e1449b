"""The learning curve on real pairs, held-out pairs included: ours and TRL's, update by update.

Both trainers get the same rows in the same order and the same first adapter. Held-out pairs are
scored by one and the same function for both, with the adapter off for the reference.
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from bench.contest import Turns, contest
from bench.harness import MEASURED, Recorder
from bench.real import content_name, held_out_rows
from bench.step import CONTENDERS

UPDATES = 25
HELD_OUT_AT = (13, 25)
SEEDS = (0, 1)
CURVES = {
    "loss_nat": "loss",
    "reward_margin_nat": "rewards/margins",
}
"""Metric of a row and name in the log, a sample an update."""


class Lesson(TrainerCallback):
    """Makes one update a turn; answers with its log, and at some updates with held-out metrics."""

    def __init__(self, turns: Turns, points: tuple[int, ...]) -> None:
        self.turns, self.points = turns, points
        self.trainer: Any = None

    def prepare(self, trainer: Any, tokenizer: Any) -> dict[str, Any]:
        """Score the held-out pairs under the reference."""
        from fastdpo.batching import PairGroups
        from fastdpo.data import Rows, prepare_pairs
        from fastdpo.modeling.adapters import adapters_disabled
        from fastdpo.modeling.scoring import score_pairs
        from fastdpo.options import TokenizationOptions

        self.trainer = trainer
        options = TokenizationOptions(truncation_mode="keep_start", max_length=None)
        self.groups = PairGroups(
            prepare_pairs(Rows("held out", held_out_rows()), tokenizer, options)
        )
        with adapters_disabled(trainer.model):
            self.reference = score_pairs(trainer.model, list(self.groups))
        logps = self.reference.logps
        return {"held_out_logp_accuracy": float((logps[:, 0] > logps[:, 1]).mean())}

    def held_out(self) -> dict[str, float]:
        """Metrics of the policy beside its reference on the held-out pairs."""
        from fastdpo.losses import preference_accuracy
        from fastdpo.modeling.scoring import score_pairs

        scored = score_pairs(self.trainer.model, list(self.groups))
        ratios = scored.logps - self.reference.logps
        margins = ratios[:, 0] - ratios[:, 1]
        per_token = (ratios / scored.tokens).mean(axis=0)
        return {
            "accuracy": preference_accuracy(torch.from_numpy(margins)),
            "logp_accuracy": float((scored.logps[:, 0] > scored.logps[:, 1]).mean()),
            "margin_nat": float(margins.mean()),
            "margin_standard_error_nat": float(margins.std(ddof=1) / np.sqrt(len(margins))),
            "chosen_per_token_nat": float(per_token[0]),
            "rejected_per_token_nat": float(per_token[1]),
        }

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        figures = {metric: float(logs[name]) for metric, name in CURVES.items()}
        if state.global_step in self.points:
            figures |= self.held_out()
        self.turns.answer(figures)
        if not self.turns.wait():
            control.should_training_stop = True


def contend(case: Mapping[str, Any], turns: Turns) -> None:
    """Train, an update a turn."""
    from bench.trainers import build

    lesson = Lesson(turns, tuple(case["held_out_at"]))
    with TemporaryDirectory() as folder:
        trainer = build(case, Path(folder), [lesson])
        facts = lesson.prepare(trainer, trainer.processing_class)
        turns.ready(facts)
        if turns.wait():
            trainer.train()


def learn(recorder: Recorder, folder: Path, *, quick: bool) -> None:
    """Both trainers with each seed.

    Samples of held-out metrics: before the first update, then after those of `held_out_at`.
    """
    updates = 5 if quick else UPDATES
    points = (updates,) if quick else HELD_OUT_AT
    for seed in SEEDS[: 1 if quick else None]:
        case = {
            "tuning": "lora", "model": content_name(folder), "dtype": "float32", "device": "cpu",
            "pairs": 8, "updates": updates, "learning_rate": 1e-4, "threads": 1, "seed": seed,
            "held_out_pairs": len(held_out_rows()), "held_out_at": list(points),
        }  # fmt: skip
        run = {"rows": case["pairs"] * updates, "logging_steps": 1, "checkpointing": False}
        run["folder"] = str(folder)
        names = ("fastdpo", "trl")
        given = {name: {**case, **run, **CONTENDERS[name]} for name in names}
        functions = dict.fromkeys(names, "bench.learning:contend")
        for name, result in contest(functions, given, warm_up=0, rounds=updates):
            if result.outcome != MEASURED:
                recorder.add(case, name, "loss_nat", outcome=result.outcome, note=result.note)
                continue
            for metric in CURVES:
                recorder.add(case, name, metric, result.column(metric))
            last = [turn for turn in result.turns if "accuracy" in turn]
            before = result.facts["held_out_logp_accuracy"]
            for metric, unit in HELD_OUT_METRICS.items():
                start = before if metric == "logp_accuracy" else HELD_OUT_START[metric]
                samples = [start, *(turn[metric] for turn in last)]
                recorder.add(case, name, f"held_out_{metric}{unit}", samples)


HELD_OUT_METRICS = {
    "accuracy": "_relative",
    "logp_accuracy": "_relative",
    "margin_nat": "",
    "margin_standard_error_nat": "",
    "chosen_per_token_nat": "",
    "rejected_per_token_nat": "",
}
"""Held-out metrics and what their rows' names have more, so that they end in a unit."""

HELD_OUT_START = {"accuracy": 0.5} | dict.fromkeys(list(HELD_OUT_METRICS)[2:], 0.0)
"""Before the first update policy and reference are one: every pair is a tie."""
