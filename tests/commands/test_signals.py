"""SIGTERM and Ctrl-C: the update is finished, saved once, and the exit code says what happened."""

import os
import signal
import threading
import time

import pytest
from transformers import TrainerCallback

from fastdpo.cli.parser import command
from fastdpo.ref_cache import compute
from fastdpo.system import files, signals
from fastdpo.trainer import checkpoint
from tests.ref_cache.test_faults import exit_code, in_a_child
from tests.tiny_trainer import preference_rows
from tests.trainer.small_runs import adapter_of, build, checkpoint_names, whole  # noqa: F401

SIGNALS = {signal.SIGTERM: (SystemExit, 143), signal.SIGINT: (KeyboardInterrupt, 130)}


def send(number, times=1):
    for _ in range(times):
        os.kill(os.getpid(), number)


def test_the_first_signal_waits_and_the_second_does_not(capfd):
    before = [signal.getsignal(number) for number in SIGNALS]
    for number, (kind, _) in SIGNALS.items():
        with signals.graceful_shutdown() as stop:
            stop.raise_if_requested()
            send(number)
            assert stop.signal == number
            with signals.graceful_shutdown() as inner:
                assert inner is stop
            with pytest.raises(kind):
                stop.raise_if_requested()
            with pytest.raises(kind):
                send(number)
            assert stop.signals == 2
        assert "again stops at once" in capfd.readouterr().err
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_what_a_launcher_passes_on_is_no_second_signal(monkeypatch, capfd):
    monkeypatch.setattr(signals.ranks, "count", lambda: 2)
    monkeypatch.setattr(signals.ranks, "index", lambda: 0)
    monkeypatch.setattr(signals.ranks, "highest", lambda number: max(number, signal.SIGTERM))
    now = iter((100.0, 101.0, 120.0))
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(now))
    with signals.graceful_shutdown() as stop, stop.interruptible():
        send(signal.SIGINT, times=2)  # the terminal's, and the launcher's
        assert (stop.signals, stop.signal) == (1, None)
        assert signals.hurries()
        with pytest.raises(SystemExit, match="143"):
            signals.meet()  # where the ranks agree; one of them has had another signal
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_what_is_worth_nothing_stops_at_the_first_signal():
    for number, (kind, _) in SIGNALS.items():
        with signals.graceful_shutdown() as stop:
            with pytest.raises(kind), stop.interruptible():
                send(number)
            assert stop.signals == 1
            with pytest.raises(kind), stop.interruptible():
                pytest.fail("a signal had come before")
        with signals.graceful_shutdown() as stop, stop.interruptible(), signals.graceful_shutdown():
            send(number)  # who is inside and cannot be cut is not
            assert stop.signal == number


def test_ignored_signals_stay_ignored_and_threads_change_nothing():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with signals.graceful_shutdown() as stop:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            send(signal.SIGTERM)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGTERM, before)
    found = []

    def work():
        with signals.graceful_shutdown() as stop, stop.interruptible():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


class At(TrainerCallback):
    """Calls `what` at an event of one update."""

    def __init__(self, event, update, what):
        def call(args, state, control, **_):
            if state.global_step == update:
                what()

        setattr(self, event, call)


def saves_of(trainer):
    """The updates at which the trainer saves, noted as it does."""
    saved, real = [], trainer._write_checkpoint

    def noted(model, trial):
        saved.append(trainer.state.global_step)
        real(model, trial)

    trainer._write_checkpoint = noted
    return saved


@pytest.mark.parametrize(
    ("number", "event", "step", "options"),
    [
        (signal.SIGINT, "on_step_begin", 2, {"save_strategy": "no"}),
        (signal.SIGTERM, "on_optimizer_step", 2, {"save_steps": 3}),
        (
            signal.SIGTERM,
            "on_step_end",
            3,
            {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 3},
        ),
        (signal.SIGINT, "on_step_end", 3, {"save_strategy": "epoch", "eval_strategy": "epoch"}),
        (signal.SIGTERM, "on_log", 3, {"save_steps": 3}),
    ],
)
def test_the_update_is_finished_and_saved_once(
    tmp_path, whole, monkeypatch, caplog, number, event, step, options  # noqa: F811
):  # fmt: skip
    kind, _ = SIGNALS[number]
    options |= {"eval_rows": preference_rows(3, seed=1)}
    trainer = build(tmp_path / "out", [At(event, step, lambda: send(number))], **options)
    saved = saves_of(trainer)
    monkeypatch.setattr(type(trainer), "evaluate", lambda *_, **__: pytest.fail("it evaluated"))
    with caplog.at_level("INFO", "fastdpo"), pytest.raises(kind):
        trainer.train()
    monkeypatch.undo()
    assert "update 3 of 6, and checkpoint-3 holds all of it" in caplog.text
    assert saved == ([2, 3] if options.get("save_steps") == 2 else [3])
    newest = checkpoint.newest_verified(tmp_path / "out")
    assert newest.name == "checkpoint-3"
    trainer = build(tmp_path / "out", **options | {"save_strategy": "steps", "save_steps": 6})
    trainer.train(resume_from_checkpoint=True)
    assert adapter_of(tmp_path / "out/checkpoint-6") == adapter_of(whole / "checkpoint-6")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_it_at_once(tmp_path, number):
    kind, _ = SIGNALS[number]
    begun = []
    send_two = At("on_step_begin", 3, lambda: send(number, 2))
    trainer = build(tmp_path / "out", [send_two, At("on_step_end", 4, lambda: begun.append(4))])
    saved = saves_of(trainer)
    with pytest.raises(kind):
        trainer.train()
    assert saved == [2]
    assert not begun
    assert checkpoint.newest_verified(tmp_path / "out").name == "checkpoint-2"


@pytest.mark.parametrize("times", [1, 2])
def test_a_save_under_way_is_not_corrupted(tmp_path, monkeypatch, times):
    """A signal at each operation of a save: one lets it finish, two leave the older checkpoint."""
    for at in (1, 11, 28):
        output_dir = tmp_path / f"{at}"
        trainer = build(output_dir, max_steps=3, save_steps=1)
        saved, left = saves_of(trainer), [at]
        with monkeypatch.context() as patch:
            for name in files.OPERATIONS:
                patch.setattr(files, name, signalling(getattr(files, name), trainer, left, times))
            with pytest.raises(SystemExit) as stopped:
                trainer.train()
        assert stopped.value.code == 143
        assert saved == [1, 2]
        newest = checkpoint.newest_verified(output_dir).name
        assert newest == "checkpoint-2" or (times == 2 and newest == "checkpoint-1")
        assert not [path for path in output_dir.iterdir() if files.is_temporary(path)]


def signalling(real, trainer, left, times):
    def call(*args, **options):
        if trainer.state.global_step == 2 and trainer._saving_into is not None:
            left[0] -= 1
            if left[0] == 0:
                send(signal.SIGTERM, times)
        return real(*args, **options)

    return call


@pytest.mark.parametrize(
    ("where", "number"),
    [("evaluation", signal.SIGINT), ("its reference pass", signal.SIGTERM)],
)
def test_an_evaluation_gives_way(tmp_path, whole, monkeypatch, where, number):  # noqa: F811
    """The update before it is saved, and nothing of the evaluation is waited for."""
    kind, _ = SIGNALS[number]
    options = {
        "eval_rows": preference_rows(3, seed=1),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 6,
        "ref_cache": str(tmp_path / "store"),
    }
    trainer = build(tmp_path / "out", **options)
    saved, score_groups = saves_of(trainer), compute.score_groups

    def interrupted(*args, **others):
        if trainer.state.global_step == 2:
            send(number)
            if where == "evaluation":
                pytest.fail("it went on")
        return score_groups(*args, **others)

    if where == "evaluation":
        trainer.evaluation_loop = interrupted
    else:
        monkeypatch.setattr(compute, "score_groups", interrupted)
    with pytest.raises(kind):
        trainer.train()
    monkeypatch.undo()
    assert saved == [2]
    assert trainer.model.training
    trainer = build(tmp_path / "out", **options)
    trainer.train(resume_from_checkpoint=True)
    assert adapter_of(tmp_path / "out/checkpoint-6") == adapter_of(whole / "checkpoint-6")


def test_a_second_signal_in_an_evaluation_saves_nothing(tmp_path):
    options = {"eval_rows": preference_rows(3), "eval_strategy": "steps", "eval_steps": 2}
    trainer = build(tmp_path / "out", save_steps=6, **options)
    saved = saves_of(trainer)

    def twice(*_, **__):
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGTERM)

    trainer.evaluation_loop = twice
    with pytest.raises(SystemExit):
        trainer.train()
    assert saved == []


@pytest.mark.parametrize("number", SIGNALS)
def test_the_exit_code_of_a_real_process(tmp_path, whole, number):  # noqa: F811
    """A child that is signalled from outside, at any moment; resumed, it ends where it should."""
    output_dir, reached = tmp_path / "out", tmp_path / "reached"

    def main(_argv):
        trainer = build(output_dir, [At("on_step_end", 2, reached.touch), Slow()], save_steps=6)
        trainer.train()

    def run():
        raise SystemExit(command(main))

    child = in_a_child(run)
    while not reached.exists():
        time.sleep(0.002)
    os.kill(child, number)
    assert exit_code(child) == SIGNALS[number][1]
    (folder,) = checkpoint_names(output_dir)
    assert folder in ("checkpoint-2", "checkpoint-3")
    build(output_dir, save_steps=6).train(resume_from_checkpoint=True)
    assert adapter_of(output_dir / "checkpoint-6") == adapter_of(whole / "checkpoint-6")


class Slow(TrainerCallback):
    def on_step_end(self, *_, **__):
        time.sleep(0.05)
