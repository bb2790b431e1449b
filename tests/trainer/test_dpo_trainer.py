"""DPOTrainer: what an update is, what is logged, saved and resumed."""

import copy
import json
import logging
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.modeling.loading import load_model
from fastdpo.ref_cache import spot_check as spot_checking
from fastdpo.trainer.checkpoint import CheckpointError
from tests.tiny_trainer import ROWS, preference_rows, tiny_base, tiny_trainer


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture
def train_with(base, tmp_path, monkeypatch):
    """Build a trainer over a copy of the base; its reference store is private to the test."""
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))

    def build(*, model=None, output_dir=tmp_path / "out", **options):
        return tiny_trainer(copy.deepcopy(base) if model is None else model, output_dir, **options)

    return build


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), f"{name} differs"


def training_log(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def without_time(log):
    """The log without what each process has its own of."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("perf/", "memory/"))} for line in log
    ]


class SeenPairs(TrainerCallback):
    """Counts updates; the sampler is asked for the order."""

    def __init__(self):
        self.updates = 0

    def on_step_end(self, *_args, **_kwargs):
        self.updates += 1


def order_of(trainer, epochs=2):
    loader = trainer.get_train_dataloader()
    seen = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        seen += [[g.prompt_ids.tobytes() + g.completions[0].tobytes() for g in u] for u in loader]
    return seen


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (1, 8)])
def test_an_update_is_batch_times_accumulation_pairs(train_with, batch, accumulation):
    counted = SeenPairs()
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer = train_with(callbacks=[counted], num_train_epochs=2, **options)
    user_args = trainer.user_args
    trainer.train()
    assert counted.updates == trainer.state.global_step == 2 * 5  # 35 pairs: 4 of 8 and one of 3
    assert [len(update) for update in order_of(trainer, 1)] == [8, 8, 8, 8, 3]
    assert user_args.per_device_train_batch_size == batch
    assert user_args.gradient_accumulation_steps == accumulation
    learning_rates = [line["learning_rate"] for line in training_log(trainer)]
    assert learning_rates == pytest.approx([5e-3 * (1 - step / 10) for step in range(10)])


def test_the_split_of_the_batch_changes_no_bit(train_with):
    runs = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = train_with(
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        )
        trainer.train()
        runs.append((weights(trainer), without_time(training_log(trainer))))
    assert_same_weights(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_micro_batch_size_and_sharing_change_rounding_only(train_with):
    curves = []
    for options in ({}, {"micro_batch_tokens": 128}, {"shared_prefix": "off"}):
        trainer = train_with(learning_rate=1e-4, **options)
        trainer.train()
        curves.append([(line["loss"], line["grad_norm"]) for line in training_log(trainer)])
    assert np.allclose(curves[0], curves[1], rtol=2e-5)
    assert np.allclose(curves[0], curves[2], rtol=2e-5)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_first_update_has_no_margin(train_with, tuning):
    """The store's log-probs were computed among other neighbours: still not a bit differs."""
    trainer = train_with(tuning=tuning, max_steps=2)
    trainer.train()
    assert trainer.first_update_margin == 0.0
    first, second = training_log(trainer)
    assert first["rewards/margins"] == 0.0
    assert first["rewards/accuracies"] == 0.5
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-7)
    assert second["loss"] != first["loss"]


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_reference_within_the_update_is_exact_too(train_with, base, tmp_path, load_in_4bit):
    base.save_pretrained(tmp_path / "base")
    logs = []
    for ref_cache in ("off", None):
        model = load_model(str(tmp_path / "base"), dtype=torch.float32, load_in_4bit=load_in_4bit)
        trainer = train_with(model=model, ref_cache=ref_cache, dropout=0.1)
        trainer.train()
        logs.append(without_time(training_log(trainer)))
        assert not list(tmp_path.rglob("shard-*")) or ref_cache is None
    assert logs[0][0]["rewards/margins"] == 0.0
    assert logs[0] == logs[1]


def test_full_training_without_a_stored_reference_is_refused(train_with):
    with pytest.raises(ValueError, match="reference is gone after"):
        train_with(tuning="full", ref_cache="off")


def adapter_bytes(trainer):
    trainer.save_model()
    return (Path(trainer.args.output_dir) / "adapter_model.safetensors").read_bytes()


def test_a_second_run_computes_no_reference_and_trains_alike(train_with, monkeypatch, tmp_path):
    """A hit and a miss: same order, byte-identical adapters; a spot check only looks."""
    first = train_with(dropout=0.1)
    first.train()
    saved = adapter_bytes(first)
    stored = {path: path.read_bytes() for path in tmp_path.rglob("shard-*")}
    monkeypatch.setattr(
        "fastdpo.ref_cache.compute.score_groups",
        lambda *_, **__: pytest.fail("a reference log-prob was computed again"),
    )
    looked_at, real = [], spot_checking.score_groups

    def score_groups(model, groups, **options):
        looked_at.append(len(groups))
        return real(model, groups, **options)

    monkeypatch.setattr(spot_checking, "score_groups", score_groups)
    for count in (3, 0):
        second = train_with(dropout=0.1, logging_steps=3, ref_spot_check=count)
        second.train()
        assert_same_weights(weights(first), weights(second))
        assert order_of(first) == order_of(second)
        assert adapter_bytes(second) == saved
    assert looked_at == [3], "a check of three pairs, once, and none where none is asked for"
    assert {path: path.read_bytes() for path in tmp_path.rglob("shard-*")} == stored


def test_the_three_options_of_the_reference_store_act(train_with, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="fastdpo")
    train_with(ref_token_logps="off", max_steps=1).train()
    (shard,) = tmp_path.rglob("shard-*")
    assert b"token_logps" not in shard.read_bytes()
    monkeypatch.setattr("fastdpo.system.versions.LIBRARIES", ("torch", "numpy"))
    train_with(max_steps=1).train()
    assert "computed with other versions or on another GPU" in caplog.text
    assert "Spot check: 4 pairs" in caplog.text
    assert len(list(tmp_path.rglob("shard-*"))) == 1
    train_with(ref_versions="strict", max_steps=1).train()
    assert len(list(tmp_path.rglob("shard-*"))) == 2
    assert "all 8 pairs missing" in caplog.text
    assert "(--ref_versions strict: bitsandbytes" in caplog.text
    caplog.clear()
    train_with(max_length=48, max_steps=1).train()
    assert "max_length 1024 -> 48" in caplog.text


def test_poisoned_reference_changes_the_loss(train_with):
    trainer = train_with(max_steps=1, first_margin="warn")
    trainer._add_reference(trainer.train_dataset, "train")
    trainer.train_dataset.ref_logps[:, 0] -= 5.0
    trainer.train()
    assert training_log(trainer)[0]["rewards/margins"] == pytest.approx(0.5)


def test_order_depends_on_seed_and_epoch_alone(train_with):
    order = order_of(train_with())
    assert order[:5] != order[5:], "epochs repeat each other"
    assert sorted(chain(*order[:5])) == sorted(chain(*order[5:]))
    assert order_of(train_with(seed=7)) != order
    assert order_of(train_with(learning_rate=1.0)) == order
    sequential = order_of(train_with(train_sampling_strategy="sequential"))
    assert sequential[:5] == sequential[5:]


def test_evaluation_weighs_pairs_and_knows_the_reference(train_with):
    trainer = train_with(tuning="full", micro_batch_tokens=128)
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(np.log(2), abs=1e-9)
    assert before["eval_rewards/accuracies"] == 0.5
    trainer.train()
    after = trainer.evaluate()
    groups = trainer.eval_dataset
    from fastdpo.modeling.scoring import score_pairs

    margins = score_pairs(trainer.model, groups).logps - groups.ref_logps
    margins = margins[:, 0] - margins[:, 1]
    assert after["eval_loss"] == pytest.approx(np.log1p(np.exp(-0.1 * margins)).mean())
    assert after["eval_rewards/accuracies"] == (margins > 0).mean()
    assert after["eval_rewards/accuracies"] > 0.9
    with pytest.raises(ValueError, match="Cannot compute reference log-probs"):
        trainer.evaluate(preference_rows(3, seed=5))


def test_metric_names_are_trls_and_ours(train_with):
    trainer = train_with(max_steps=1)
    trainer.train()
    names = set(training_log(trainer)[0])
    wanted = {
        "loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "entropy",
        "mean_token_accuracy", "logits/chosen", "logits/rejected", "logps/chosen",
        "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
        "rewards/margins", "perf/pairs_per_second", "perf/tokens_per_second",
    }  # fmt: skip
    assert wanted <= names
    evaluated = {name.removeprefix("eval_") for name in trainer.evaluate()}
    assert wanted - {n for n in wanted if n.startswith("perf/")} - {
        "grad_norm", "learning_rate", "num_tokens"
    } <= evaluated  # fmt: skip


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("stop_after", [3, 5, 7])
def test_resume_is_bitwise(train_with, tmp_path, tuning, stop_after):
    options = {"tuning": tuning, "dropout": 0.1, "num_train_epochs": 2}
    whole = train_with(**options)
    whole.train()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == stop_after

    options |= {"save_strategy": "steps", "save_steps": stop_after, "save_total_limit": 1}
    train_with(callbacks=[Stop()], **options).train()
    resumed = train_with(**options, eval_strategy="steps", eval_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights(resumed), weights(whole))
    assert without_time(training_log(resumed))[-1]["loss"] == training_log(whole)[-1]["loss"]
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert sorted(names) == ["checkpoint-10", "metrics.jsonl"], (
        "save_total_limit is 1, and no temporary folder stays"
    )
    pickled = [p.name for p in (tmp_path / "out").rglob("*") if p.suffix in (".bin", ".pt", ".pth")]
    assert pickled == []


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_best_checkpoint_is_kept_and_loaded(train_with, tmp_path, tuning):
    trainer = train_with(
        tuning=tuning, learning_rate=0.05, num_train_epochs=2, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, save_total_limit=1, load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/margins", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    evaluated = [line for line in trainer.state.log_history if "eval_loss" in line]
    best = max(evaluated, key=lambda line: line["eval_rewards/margins"])
    folder = tmp_path / "out" / f"checkpoint-{best['step']}"
    assert trainer.state.best_model_checkpoint == str(folder)
    assert folder.is_dir()
    again = trainer.evaluate()
    assert again["eval_rewards/margins"] == best["eval_rewards/margins"]


def test_resume_refuses_another_run_and_skips_damage(train_with, tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 2}
    train_with(**options).train()
    with pytest.raises(CheckpointError, match="seed: the checkpoint has 42, this run 1"):
        train_with(seed=1, **options).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="data"):
        train_with(rows=ROWS[1:], **options).train(resume_from_checkpoint=True)
    newest = tmp_path / "out" / "checkpoint-5" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    (tmp_path / "out" / "checkpoint-9").mkdir()
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        train_with(**options).train(resume_from_checkpoint=True)
    assert "Resuming from" in caplog.text
    assert "checkpoint-4" in caplog.text
    assert "optimizer.safetensors is missing or not" in caplog.text


def test_the_saved_adapter_is_plain_peft(train_with, base, tmp_path):
    trainer = train_with()
    trainer.train()
    trainer.save_model()
    out = tmp_path / "out"
    stock = PeftModel.from_pretrained(copy.deepcopy(base), out)
    ours = {n: p for n, p in trainer.model.named_parameters() if "lora" in n}
    theirs = {n: p for n, p in stock.named_parameters() if "lora" in n}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (out / "tokenizer.json").exists()
    assert json.loads((out / "training_args.json").read_text())["beta"] == 0.1


def test_a_loss_that_is_not_finite_stops_before_any_weight_moves(train_with):
    trainer = train_with(max_steps=2)
    trainer._add_reference(trainer.train_dataset, "train")
    trainer.train_dataset.ref_logps[:] = np.inf
    before = weights(trainer)
    with pytest.raises(FloatingPointError, match="update 1: the loss is nan"):
        trainer.train()
    assert_same_weights(weights(trainer), before)


def test_adapters_stay_fp32_on_a_bf16_base_and_move_at_a_tiny_learning_rate(train_with, base):
    trainer = train_with(
        model=copy.deepcopy(base).to(torch.bfloat16), learning_rate=1e-6, max_steps=2,
        lr_scheduler_type="constant",
    )  # fmt: skip
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    moved = [(before[n] != after[n]).double().mean().item() for n in before if "lora_B" in n]
    assert all(weight.dtype == torch.float32 for weight in after.values())
    assert min(moved) > 0.99
    assert trainer.model.model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_adapters_train_without_autocast_and_full_weights_within(train_with):
    assert train_with(bf16=True).accelerator.mixed_precision == "no"
    full = train_with(tuning="full", bf16=True)
    assert full.accelerator.mixed_precision == "bf16"
    assert full.reference.compute_dtype == torch.bfloat16


def test_arguments_of_trl_that_make_no_sense_here_are_refused_by_name(train_with, base):
    with pytest.raises(TypeError, match="no data_collator: pairs are packed"):
        DPOTrainer(base, data_collator=list, args=DPOConfig(use_cpu=True))
    with pytest.raises(ValueError, match="loaded already"):
        train_with(model_init_kwargs={"revision": "x"})


def test_a_stream_gives_as_many_pairs_as_the_run_needs(train_with):
    taken = []

    def endless():
        for number in range(10_000):
            taken.append(number)
            yield ROWS[number % len(ROWS)]

    trainer = train_with(rows=endless(), max_steps=2, per_device_train_batch_size=8)
    assert len(trainer.train_groups) == 16
    assert len(taken) < 100
    trainer.train()
    assert trainer.state.global_step == 2


def test_updates_that_are_not_finite_stop_the_run_or_are_skipped(train_with, caplog):
    def poisoned(pairs):
        losses = (pairs.margins - 1).square()
        return losses * float("nan") if 3 in seen else losses

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            seen.append(state.global_step + 1)
            seen[:] = seen[-1:]

    for mode in ("stop", "skip"):
        seen = []
        trainer = train_with(loss_function=poisoned, nonfinite=mode, callbacks=[Count()])
        if mode == "stop":
            with pytest.raises(
                FloatingPointError, match=r"update 3: the loss is nan \(rows .*skip"
            ):
                trainer.train()
            continue
        trainer.train()
        assert trainer.state.global_step == 5
        assert [line.get("skipped_updates") for line in training_log(trainer)] == [
            None, None, 1, 1, 1,
        ]  # fmt: skip
        assert all(np.isfinite(line["loss"]) for line in training_log(trainer))
        assert "Skipped: update 3: the loss is nan" in caplog.text
        assert all(torch.isfinite(weight).all() for weight in weights(trainer).values())


def test_a_loss_scaler_skips_an_update_whose_loss_is_not_finite(train_with, monkeypatch):
    """As fp16 trains on CUDA: a scaler that is shown no gradient at all would raise."""
    calls = []

    def poisoned(pairs):
        calls.append(1)
        return (pairs.margins - 1).square() * (float("nan") if len(calls) == 2 else 1.0)

    trainer = train_with(loss_function=poisoned, nonfinite="skip", max_steps=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monkeypatch.setattr(trainer.accelerator, "scaler", scaler)
    trainer.train()
    assert len(calls) == 3
    assert trainer.record.skipped_updates == 1
    assert scaler.get_scale() == 512.0, "lowered once"
    assert all(torch.isfinite(weight).all() for weight in weights(trainer).values())


def test_a_gradient_that_is_not_finite_changes_no_weight(train_with, monkeypatch):
    trainer = train_with()
    before = weights(trainer)
    real = trainer.update.backward

    def overflow(loss):
        real(loss)
        next(p for p in trainer.policy.parameters() if p.grad is not None).grad.fill_(torch.inf)

    monkeypatch.setattr(trainer.update, "backward", overflow)
    with pytest.raises(FloatingPointError, match="update 1: the gradient is not finite"):
        trainer.train()
    assert_same_weights(before, weights(trainer))


def test_a_resumed_run_is_laid_out_as_the_one_before(train_with, tmp_path):
    """Also after memory ran out there: T, the layers' policy and the tiles come from the folder."""

    class Shrink(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            first.layout.micro_batch_tokens, first.layout.most_group_tokens = 192, 100

    options = {"save_strategy": "steps", "save_steps": 2, "activations": "recompute"}
    first = train_with(mlp_tile_tokens=128, callbacks=[Shrink()], max_steps=3, **options)
    first.train()
    resumed = train_with(max_steps=3, **options)
    assert resumed.layout.mlp_tile_tokens is None
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert resumed.layout.micro_batch_tokens == 192
    assert resumed.layout.most_group_tokens == 100
    assert resumed.layout.mlp_tile_tokens == 128
    assert resumed.layout.activation_plan == ("recompute", "recompute")
    assert [line["num_tokens"] for line in training_log(resumed)] == [
        line["num_tokens"] for line in training_log(first)
    ]


@pytest.mark.parametrize(("useless", "warned"), [(0, False), (1, False), (2, True)])
def test_rows_that_are_lost_are_a_warning_from_one_percent_on(tmp_path, caplog, useless, warned):
    """From Python nothing below a warning is seen, and rows were lost in silence."""
    rows = preference_rows(150 - useless)
    rows += [{"prompt": "Same", "chosen": " one", "rejected": " one"}] * useless
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        tiny_trainer(copy.deepcopy(tiny_base()), tmp_path, rows=rows, ref_cache="off")
    said = [r for r in caplog.records if "150 rows read" in r.getMessage()]
    assert [record.levelno for record in said] == [logging.WARNING if warned else logging.INFO]
    assert not useless or "identical" in said[0].getMessage()
