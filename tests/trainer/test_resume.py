"""Interrupted anywhere and resumed, a run ends in the very bytes of one that nobody disturbed."""

import json
import logging
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from fastdpo.trainer import checkpoint
from fastdpo.trainer.boundary import update_seed
from fastdpo.trainer.checkpoint import CheckpointError
from tests.tiny_trainer import preference_rows
from tests.trainer.small_runs import ADAPTER, adapter_of, build, checkpoint_names

UPDATES = 12
STATE = (ADAPTER, "optimizer.safetensors", "optimizer.json", "rng_state.safetensors")


class Stop(TrainerCallback):
    def __init__(self, update):
        self.update = update

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop |= state.global_step == self.update


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Build and train: 3 epochs of 11 pairs, 3 an update (the last one of 2), evaluation, dropout.

    Gives the trainer and the order in which it saw the pairs.
    """
    store = tmp_path_factory.mktemp("store")

    def train(output_dir, resume=None, callbacks=(), **options):
        arguments = {
            "rows": preference_rows(11),
            "eval_rows": preference_rows(5, seed=1),
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 3,
            "num_train_epochs": 3,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_steps": UPDATES,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "ref_cache": str(store),
        }
        trainer = build(output_dir, callbacks, **arguments | options)
        order, step = [], trainer.training_step

        def noted(model, inputs, *others):
            order.append([group.prompt_ids.tobytes() for group in inputs])
            return step(model, inputs, *others)

        trainer.training_step = noted
        trainer.train(resume_from_checkpoint=resume)
        return trainer, order

    return train


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """The undisturbed run: folder with a checkpoint at each update, losses, order."""
    output_dir = tmp_path_factory.mktemp("whole")
    trainer, order = run(output_dir, save_steps=1)
    assert trainer.state.global_step == UPDATES
    assert [len(update) for update in order] == [3, 3, 3, 2] * 3
    return output_dir, losses(trainer), order


def losses(trainer):
    return [
        {name: line[name] for name in ("loss", "grad_norm", "learning_rate", "rewards/margins")}
        for line in trainer.state.log_history
        if "loss" in line
    ]


def assert_same_end(output_dir, whole_dir, names=STATE):
    for name in names:
        found = (output_dir / f"checkpoint-{UPDATES}" / name).read_bytes()
        assert found == (whole_dir / f"checkpoint-{UPDATES}" / name).read_bytes(), name


@pytest.mark.parametrize("cut", range(1, UPDATES))
def test_resumed_at_every_boundary(run, whole, tmp_path, cut):
    """Adapter, moments, schedule, generators byte by byte; losses and order of what is left."""
    whole_dir, all_losses, order = whole
    torch.rand(cut)  # another process would be elsewhere in its generators
    random.random()
    np.random.rand()
    trainer, rest = run(tmp_path / "out", str(whole_dir / f"checkpoint-{cut}"))
    assert_same_end(tmp_path / "out", whole_dir)
    assert losses(trainer) == all_losses  # those before the cut come from the checkpoint
    assert rest == order[cut:]


@pytest.mark.parametrize(
    ("name", "value", "there"),
    [
        ("learning_rate", 4e-3, "0.01"),
        ("weight_decay", 0.1, "0.0"),
        ("lr_scheduler_type", "constant", "'cosine'"),
        ("warmup_steps", 4, "2"),
    ],
)
def test_a_changed_option_of_the_optimizer_is_refused_or_holds(
    run, whole, tmp_path, name, value, there
):
    whole_dir, all_losses, _ = whole
    cut = str(whole_dir / "checkpoint-6")
    said = rf"optimizer\.{name}: the checkpoint has {there}, this run {value!r}"
    with pytest.raises(CheckpointError, match=said):
        run(tmp_path / "out", cut, **{name: value})
    allowed = name if name == "weight_decay" else f"optimizer.{name}"
    trainer, _ = run(tmp_path / "out", cut, allow_config_change=[allowed], **{name: value})
    rates, before = (
        [line["learning_rate"] for line in log] for log in (losses(trainer), all_losses)
    )
    if name == "learning_rate":
        assert rates[6:] == pytest.approx([0.4 * rate for rate in before[6:]])
    elif name == "weight_decay":
        assert rates == before
        assert {g["weight_decay"] for g in trainer.optimizer.param_groups} >= {0.1}
    elif name == "lr_scheduler_type":
        assert rates[6:] == [0.01] * 6
    else:
        assert rates[6:] != before[6:]


def test_more_updates_go_on_with_the_rate_of_the_longer_schedule(run, tmp_path):
    """The first of them had the rate with which the shorter run ended: none."""
    run(tmp_path / "out", max_steps=4, save_steps=4, lr_scheduler_type="linear", warmup_steps=0)
    trainer, _ = run(
        tmp_path / "out", True, max_steps=8, save_steps=8, lr_scheduler_type="linear",
        warmup_steps=0,
    )  # fmt: skip
    rates = [line["learning_rate"] for line in losses(trainer)]
    assert rates[4:] == pytest.approx([0.01 * (8 - done) / 8 for done in (4, 5, 6, 7)])


def test_interrupted_thrice_and_moved_between(run, whole, tmp_path):
    """Within an epoch, at its end, and again; what is there by then lies elsewhere."""
    place = tmp_path / "0"
    for number, cut in enumerate((2, 4, 9), 1):
        run(place, number > 1, [Stop(cut)], save_steps=1, save_total_limit=1)
        assert checkpoint_names(place) == [f"checkpoint-{cut}"]
        place = place.rename(tmp_path / str(number))
    trainer, _ = run(place, True, save_steps=1)
    assert_same_end(place, whole[0])
    assert losses(trainer) == whole[1]


@pytest.mark.parametrize(
    "other",
    [
        {"save_steps": 5},
        {"logging_steps": 5, "eval_strategy": "no"},
        {"eval_steps": 1, "save_steps": 1},
        {"save_strategy": "epoch", "eval_strategy": "epoch"},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1},
    ],
    ids=lambda other: " ".join(other),
)
def test_saving_logging_and_evaluation_change_no_bit(run, whole, tmp_path, soak, other):
    trainer, order = run(tmp_path / "out", **other)
    assert order == whole[2]
    trainer.save_model()
    assert adapter_of(tmp_path / "out") == adapter_of(whole[0] / f"checkpoint-{UPDATES}")
    if soak or "logging_steps" in other:
        resumed, _ = run(tmp_path / "resumed", str(whole[0] / "checkpoint-5"), **other)
        resumed.save_model()
        assert adapter_of(tmp_path / "resumed") == adapter_of(tmp_path / "out")


def test_resumed_full_training(run, tmp_path):
    cut = 7
    options = {"tuning": "full", "save_steps": cut, "optim": "adamw_torch"}
    first, _ = run(tmp_path / "out", **options)
    shutil.rmtree(tmp_path / "out" / f"checkpoint-{UPDATES}")
    second, _ = run(tmp_path / "out", True, **options)
    for (name, one), other in zip(
        first.model.named_parameters(), second.model.parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_noise_is_a_function_of_seed_and_update():
    seeds = {update_seed(seed, update) for seed in (0, 1, 42) for update in range(1000)}
    assert len(seeds) == 3000
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.manual_seed(max(seeds))


def test_noise_between_updates_changes_nothing(run, whole, tmp_path):
    """Whatever draws between two updates: the same update follows."""

    class Draw(TrainerCallback):
        def on_step_begin(self, *_, **__):
            torch.rand(3)

        on_step_end = on_evaluate = on_log = on_save = on_epoch_begin = on_step_begin

    run(tmp_path / "out", callbacks=[Draw()], save_steps=4)
    assert_same_end(tmp_path / "out", whole[0], [ADAPTER])
    run(tmp_path / "again", seed=7)
    assert adapter_of(tmp_path / f"again/checkpoint-{UPDATES}") != adapter_of(
        tmp_path / f"out/checkpoint-{UPDATES}"
    )


def test_another_run_is_refused_with_its_differences_before_any_work(
    run, whole, tmp_path, monkeypatch, caplog
):
    cut = str(whole[0] / "checkpoint-5")
    rows = preference_rows(11)
    others = {
        "seed": {"seed": 3},
        "loss.beta": {"beta": 0.3},
        "data": {"rows": [*rows[:-1], rows[0]]},
        "pairs_per_update": {"gradient_accumulation_steps": 2},
    }
    for name, other in others.items():
        with pytest.raises(CheckpointError, match=rf"\n  {name}: the checkpoint has .*, this run"):
            run(tmp_path / "out", cut, **other)
    both = {"beta": 0.3, "seed": 3}
    with pytest.raises(CheckpointError, match=r"--allow_config_change seed loss\.beta\."):
        run(tmp_path / "out", cut, **both)
    with pytest.raises(CheckpointError, match=r"\n  seed: ") as refused:
        run(tmp_path / "out", cut, allow_config_change=["loss"], **both)
    assert "\n  loss" not in str(refused.value)
    with pytest.raises(CheckpointError, match="names 'bta'"):
        run(tmp_path / "out", cut, allow_config_change=["bta"], **both)
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "out", cut, allow_config_change=["loss.beta", "seed"], **both)
    assert "loss.beta: the checkpoint has 0.1, this run 0.3" in caplog.text


def test_another_base_is_refused_before_any_work(run, whole, tmp_path):
    cut = str(whole[0] / "checkpoint-5")
    with pytest.raises(CheckpointError, match=r"\n  base\.weights: the checkpoint has '\w+', this"):
        run(tmp_path / "out", cut, base_seed=1)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_moments_of_another_parameter_name_are_refused(run, whole, tmp_path):
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(whole[0] / "checkpoint-5", folder)
    path = folder / "optimizer.json"
    path.write_text(path.read_text().replace("q_proj.lora_A", "q_proy.lora_A"))
    sealed = checkpoint.verify(whole[0] / "checkpoint-5")
    checkpoint.write_manifest(folder, sealed.run)
    with pytest.raises(CheckpointError, match="is of other parameters"):
        run(tmp_path / "out", str(folder))


def test_the_plan_of_the_checkpoint_is_followed(tmp_path):
    trainer = build(tmp_path / "out")
    trainer.layout_state = lambda: {"micro_batch_tokens": 256}
    trainer.train()
    followed = []
    trainer = build(tmp_path / "out")
    trainer.load_layout_state = followed.append
    trainer.train(resume_from_checkpoint=True)
    assert followed[0] == {"micro_batch_tokens": 256}


def test_the_best_checkpoint_is_found_where_the_run_lies_now(run, tmp_path):
    options = {"load_best_model_at_end": True, "save_steps": 2, "metric_for_best_model": "loss"}
    run(tmp_path / "out", callbacks=[Stop(6)], **options)
    state = json.loads((tmp_path / "out/checkpoint-6/trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).parent == tmp_path / "out"
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    trainer, _ = run(moved, True, **options)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == moved
    trainer.save_model()
    assert adapter_of(moved) == adapter_of(best)


@pytest.mark.parametrize("updates", [UPDATES, 6])
def test_a_finished_run_trains_no_update_more(run, tmp_path, updates):
    """Ended with an epoch and within one; the adapter stays, and is evaluated once more at most."""
    options = {"max_steps": updates, "save_steps": updates, "eval_strategy": "epoch"}
    finished, order = run(tmp_path / "out", **options)
    resumed, rest = run(tmp_path / "out", True, **options)
    assert (len(order), rest, resumed.state.global_step) == (updates, [], updates)
    assert losses(resumed) == losses(finished)
    for name, tensor in finished.policy.state_dict().items():
        assert torch.equal(tensor, resumed.policy.state_dict()[name]), name
