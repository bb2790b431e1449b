"""Completions during a run, an early end, and the curves of a run."""

import json
import sys

import pytest
from transformers import TrainerControl, TrainerState

from fastdpo.trainer.curves import CURVES_FILE, draw_curves, read_history
from fastdpo.trainer.watching import EarlyEnd, evaluations_since_best
from tests.tiny_trainer import tiny_base, tiny_trainer


def test_it_counts_from_the_best():
    losses = [0.7, 0.5, 0.6, 0.5, 0.8]
    assert evaluations_since_best(losses, greater_is_better=False) == 3
    assert evaluations_since_best(losses, greater_is_better=True) == 0
    assert evaluations_since_best([], greater_is_better=True) == 0


class Args:
    greater_is_better = None


@pytest.mark.parametrize(("losses", "stops"), [((0.5, 0.6, 0.7), True), ((0.5, 0.6, 0.4), False)])
def test_patience_is_counted_in_the_history(losses, stops):
    state = TrainerState(global_step=3)
    state.log_history = [{"eval_loss": loss, "step": i} for i, loss in enumerate(losses)]
    control = TrainerControl()
    EarlyEnd(2, "eval_loss").on_evaluate(Args, state, control)
    assert control.should_training_stop is stops


def test_a_run_ends_early(tmp_path):
    """At a learning rate that makes everything worse."""
    trainer = tiny_trainer(
        tiny_base(), tmp_path, learning_rate=3.0, eval_strategy="steps", eval_steps=1,
        early_stopping_patience=1, num_train_epochs=3, ref_cache="off", nonfinite="skip",
    )  # fmt: skip
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert trainer.state.global_step < trainer.state.max_steps
    assert losses[-1] >= min(losses[:-1])


@pytest.mark.parametrize("option", [{"early_stopping_patience": 1}, {"log_completions": 1}])
def test_without_evaluations_it_is_refused(tmp_path, option):
    with pytest.raises(ValueError, match="--eval_strategy"):
        tiny_trainer(tiny_base(), tmp_path, **option)


def completions_of(folder):
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_policy_and_reference_write_beside_each_other(tmp_path, capsys, tuning):
    trainer = tiny_trainer(
        tiny_base(), tmp_path, tuning=tuning, eval_strategy="steps", eval_steps=1,
        log_completions=2, learning_rate=0.05, ref_cache="off" if tuning == "lora" else None,
    )  # fmt: skip
    before = [p.requires_grad for p in trainer.policy.parameters()]
    trainer.train()
    assert [p.requires_grad for p in trainer.policy.parameters()] == before
    lines = completions_of(tmp_path)
    later = [line for line in lines if line["step"]]
    assert [line["step"] for line in later] == [2, 2, 2, 4, 4, 4]
    first, second = later[:3], later[3:]
    assert [line["reference"] for line in first] == [line["reference"] for line in second]
    assert any(line["reference"] != line["policy"] for line in second)
    assert first[0]["prompt"].startswith("The day was")
    assert "after update 4, prompt 'The day was" in capsys.readouterr().out


LOGS = [
    {"step": step, "loss": 0.7 - step / 50, "rewards/margins": step / 9,
     "rewards/accuracies": 0.5 + step / 20, "logratios/chosen_per_token": -step / 90,
     "logratios/rejected_per_token": -step / 50}
    for step in range(1, 6)
]  # fmt: skip
EVALUATION = {"step": 5, **{f"eval_{name}": value for name, value in LOGS[-1].items()}}


def test_curves_are_drawn_and_in_the_card(tmp_path):
    pytest.importorskip("matplotlib", reason="curves are drawn where matplotlib is installed")
    trainer = tiny_trainer(tiny_base(), tmp_path, eval_strategy="epoch", ref_cache="off")
    trainer.train()
    trainer.save_model()
    assert (tmp_path / CURVES_FILE).read_bytes()[:4] == b"\x89PNG"
    assert f"]({CURVES_FILE})" in (tmp_path / "README.md").read_text()
    assert len(read_history(tmp_path)) == len(trainer.state.log_history)


def test_the_same_history_gives_the_same_image(tmp_path):
    pytest.importorskip("matplotlib", reason="curves are drawn where matplotlib is installed")
    for name in ("a.png", "b.png"):
        assert draw_curves([*LOGS, EVALUATION], tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert draw_curves(LOGS, tmp_path / "c.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_without_matplotlib_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw_curves(LOGS, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
