"""progress/: the metrics in a file, and the sentences about curves."""

import json

import pytest

from fastdpo.trainer.callbacks import below_chance, displacement, loss_collapsed_early
from tests.tiny_trainer import tiny_base, tiny_trainer


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_log_is_in_the_file(base, tmp_path):
    trainer = tiny_trainer(base, tmp_path, ref_cache="off", eval_strategy="epoch")
    trainer.train()
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    assert lines[0]["rewards/margins"] == 0.0
    assert lines[0]["lengths/chosen"] > 1
    assert lines[-2]["eval_loss"] > 0
    assert {"logratios/chosen_per_token", "grad_norm", "learning_rate"} <= lines[1].keys()


def test_a_resumed_run_repeats_no_line(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "ref_cache": "off"}
    tiny_trainer(tiny_base(), tmp_path, **options).train()
    whole = lines_of(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # cut by a kill
    resumed = tiny_trainer(tiny_base(), tmp_path, **options)
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    again = lines_of(tmp_path)
    assert [line["step"] for line in again] == [line["step"] for line in whole]
    assert [line.get("loss") for line in again] == [line.get("loss") for line in whole]


def history(chosen, margins, accuracies=0.9, loss=0.5):
    return [
        {"loss": loss, "rewards/chosen": c, "rewards/margins": m, "rewards/accuracies": accuracies}
        for c, m in zip(chosen, margins, strict=True)
    ]


def test_displacement_is_named_when_both_rewards_fall():
    falling = [-0.1, -0.3, -0.6, -0.9]
    assert "likelihood displacement" in displacement(history(falling, [0.1, 0.2, 0.3, 0.4]), 0.5)
    assert displacement(history(falling[:3], [0.1, 0.2, 0.3]), 0.5) is None
    assert displacement(history([-0.1, -0.3, -0.2, -0.9], [0.1] * 4), 0.5) is None
    assert displacement(history([0.9, 0.7, 0.4, 0.1], [0.1] * 4), 0.5) is None


def test_no_loss_at_once_and_chance_are_named():
    gone = history([1.0], [9.0], accuracies=1.0, loss=0.001)
    assert "something trivial" in loss_collapsed_early(gone, 0.05)
    assert loss_collapsed_early(gone, 0.5) is None
    worse = history([0.0] * 4, [-0.1] * 4, accuracies=0.4)
    assert "exchanged" in below_chance(worse, 0.5)
    assert below_chance(worse, 0.01) is None


def test_a_note_is_said_once(tmp_path, caplog):
    trainer = tiny_trainer(tiny_base(), tmp_path, ref_cache="off")
    (notes,) = [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "CurveNotes"]
    trainer.state.max_steps, trainer.state.global_step = 10, 5
    with caplog.at_level("INFO"):
        for logs in history([-0.1, -0.3, -0.6, -0.9, -1.2], [0.1] * 5):
            notes.on_log(trainer.args, trainer.state, trainer.control, logs=logs)
    assert sum("likelihood displacement" in line for line in caplog.messages) == 1
