"""The run as people watch it: aligned lines, no bar in a file, and a time left that is right."""

import io

import pytest
from transformers import TrainerControl, TrainerState

from fastdpo.system import console
from fastdpo.trainer import progress
from fastdpo.trainer.progress import ProgressLines, TimeLeft, evaluations_left, log_line
from tests.tiny_trainer import tiny_base, tiny_trainer


def test_a_file_holds_whole_lines_and_no_bar(tmp_path, capsys):
    trainer = tiny_trainer(
        tiny_base(), tmp_path, eval_strategy="epoch", disable_tqdm=False, ref_cache="off"
    )
    capsys.readouterr()
    trainer.train()
    out, err = capsys.readouterr()
    assert "\r" not in out + err
    assert "Training:" not in out + err
    lines = out.splitlines()
    updates = [line for line in lines if line.startswith("update")]
    assert [line.split()[1] for line in updates] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert len([line for line in lines if line.startswith("eval ")]) == 1
    for label in ("loss", "reward margin", "accuracy", "chosen/token", "rejected/token",
                  "tokens/s", "GiB"):  # fmt: skip
        assert len({line.index(label) for line in updates}) == 1, label
    assert all(line.endswith(" left") for line in updates[:-1])


def test_disable_tqdm_keeps_the_lines(tmp_path, capsys):
    tiny_trainer(tiny_base(), tmp_path, disable_tqdm=True, ref_cache="off").train()
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if line.startswith("update")]) == 5
    assert "{'loss'" not in out


def test_the_time_left_counts_updates_and_evaluations_apart():
    left = TimeLeft()
    assert left.seconds(10, 2) is None
    left.add_update(1.0)
    left.add_update(3.0)
    assert left.seconds(10, 2) == 20.0  # of evaluations nothing is known yet
    left.add_evaluation(100.0)
    assert left.seconds(10, 2) == 220.0


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run_updates(lines, clock, state, args, updates, *, evaluates_at=()):
    """A stand-in for the training loop: 2 s an update, 50 s an evaluation."""
    said = []
    for _ in range(updates):
        lines.on_step_begin(args, state, TrainerControl())
        clock[0] += 2.0
        state.global_step += 1
        lines.on_step_end(args, state, TrainerControl())
        if state.global_step in evaluates_at:
            clock[0] += 50.0
            lines.on_evaluate(args, state, TrainerControl())
        said.append(lines._left(args, state))
    return said


class Args:
    eval_strategy = "no"


def test_the_time_left_is_right_after_an_evaluation_and_after_a_resume(clock):
    state = TrainerState(max_steps=100)
    lines = ProgressLines(shows_bar=False)
    lines.on_train_begin(Args, state, TrainerControl())
    said = run_updates(lines, clock, state, Args, 20, evaluates_at=(10,))
    assert said[8:11] == ["3:02 left", "3:00 left", "2:58 left"]
    resumed = TrainerState(max_steps=100)
    resumed.global_step = 90
    lines.on_train_begin(Args, resumed, TrainerControl())
    assert run_updates(lines, clock, resumed, Args, 10) == [
        *(f"0:{2 * n:02} left" for n in range(9, 0, -1)), "",
    ]  # fmt: skip


def test_evaluations_that_are_to_come_count(clock):
    class EveryTen:
        eval_strategy = "steps"

    state = TrainerState(max_steps=40)
    state.eval_steps = 10
    lines = ProgressLines(shows_bar=False)
    lines.on_train_begin(EveryTen, state, TrainerControl())
    said = run_updates(lines, clock, state, EveryTen, 11, evaluates_at=(10,))
    assert said[-1] == "3:28 left"  # 29 updates of 2 s and 3 evaluations of 50 s
    assert evaluations_left(EveryTen, state) == 3

    class Epochs:
        eval_strategy = "epoch"

    state.epoch = 0.55  # of two
    assert evaluations_left(Epochs, state) == 2


def test_columns_stay_where_they_are():
    logs = {"loss": 0.5, "rewards/margins": 0.1, "logratios/chosen_per_token": -0.01}
    wide = {"loss": 12.5, "rewards/margins": -10.1, "logratios/chosen_per_token": 0.1}
    short, long = log_line(5, 1000, logs), log_line(995, 1000, wide)
    assert len(short) == len(long)
    assert log_line(5, 10, {"train_loss": 0.5}) == ""


def test_a_long_pass_writes_a_line_now_and_then(monkeypatch):
    now, written = [0.0], io.StringIO()
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console.sys, "stderr", written)
    with console.progress_bar(100, "Scoring", "pair") as bar:
        for _ in range(100):
            now[0] += 1.0
            bar.update()
    assert written.getvalue().splitlines() == [
        "Scoring: 30 of 100 pairs, 1.0 a second, 1:10 left",
        "Scoring: 60 of 100 pairs, 1.0 a second, 0:40 left",
        "Scoring: 90 of 100 pairs, 1.0 a second, 0:10 left",
    ]
