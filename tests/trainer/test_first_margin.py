"""The first update as a check: what stops a run whose policy and reference should be one."""

import copy
import dataclasses
import logging

import pytest
import torch
from transformers import TrainerCallback

from fastdpo.batching import PromptGroup
from fastdpo.ref_cache import shards
from fastdpo.trainer.first_margin import first_margin_fault
from fastdpo.trainer.metrics import UpdateResult
from tests.tiny_trainer import preference_rows, tiny_base, tiny_trainer

ROWS = preference_rows(16)


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture
def train_with(base, tmp_path):
    def build(model=None, **options):
        arguments = {
            "rows": ROWS, "held_out": None, "eval_strategy": "no", "ref_cache": str(tmp_path / "s"),
            "ref_spot_check": 0, "ref_token_logps": "off",
        }  # fmt: skip
        model = copy.deepcopy(base) if model is None else model
        return tiny_trainer(model, tmp_path / "out", **arguments | options)

    return build


@pytest.fixture
def wrong_store(train_with, monkeypatch):
    """Fill the store with a part of each log-prob; every checksum in it is right."""

    def fill(factor, **options):
        encode = shards.encode

        def spoiled(rows, *others, **named):
            rows = [dataclasses.replace(row, logps=factor * row.logps) for row in rows]
            return encode(rows, *others, **named)

        with monkeypatch.context() as patch:
            patch.setattr(shards, "encode", spoiled)
            patch.setattr(shards, "_sum_fault", lambda tensors: None)
            train_with(**options).compute_references()

    return fill


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("factor", [0.0, 0.5, 0.999])
def test_a_wrong_store_stops_the_run_before_a_weight_changes(
    train_with, wrong_store, tmp_path, tuning, factor
):
    wrong_store(factor, tuning=tuning)
    trainer = train_with(tuning=tuning, save_strategy="steps", save_steps=1)
    before = {name: tensor.clone() for name, tensor in trainer.policy.state_dict().items()}
    with pytest.raises(ValueError, match=r"completion of row \d+ has -\d.* nats under the policy"):
        trainer.train()
    for name, tensor in trainer.policy.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_dropout_of_a_new_adapter_hides_nothing(train_with, wrong_store):
    wrong_store(0.5)
    with pytest.raises(ValueError, match="policy and reference are the same model"):
        train_with(dropout=0.5).train()


def test_warn_says_it_and_goes_on(train_with, wrong_store, caplog):
    wrong_store(0.5)
    with caplog.at_level(logging.WARNING):
        train_with(first_margin="warn").train()
    assert "Policy and reference differ: in the first update" in caplog.text
    with pytest.raises(ValueError, match="--first_margin is 'go'"):
        train_with(first_margin="go")


def test_noise_that_no_option_turns_off_stops_the_run(train_with, base):
    """As rates of dropout that a layer holds as a number are: they are no modules."""
    noisy = copy.deepcopy(base)
    for layer in noisy.model.layers:
        layer.mlp.register_forward_hook(
            lambda mlp, given, out: out + 0.1 * torch.randn_like(out) if mlp.training else out
        )
    with pytest.raises(ValueError, match="dropout that stays on"):
        train_with(noisy, ref_cache="off").train()


@pytest.mark.parametrize("options", [{}, {"tuning": "full"}, {"sync_ref_model": True}])
def test_a_right_run_is_not_stopped(train_with, options):
    trainer = train_with(**options)
    trainer.train()
    assert trainer.first_update_margin < 1e-4


@pytest.mark.parametrize("micro_batch_tokens", [128, 4096])
def test_rounding_in_bf16_does_not_stop_a_run(train_with, base, micro_batch_tokens):
    half = copy.deepcopy(base).bfloat16()
    train_with(half).compute_references()  # in other micro-batches than the update's
    train_with(copy.deepcopy(base).bfloat16(), micro_batch_tokens=micro_batch_tokens).train()


def test_where_the_two_differ_by_right_nothing_is_stopped(train_with, wrong_store, base, tmp_path):
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    trainer = train_with(ref_model=other)
    trainer.train()
    assert trainer.first_update_margin > 1e-3
    trained = train_with(dropout=0.5)
    trained.train()
    assert trained.first_update_margin == 0, "the adapter adds nothing, dropped out or not"
    trainer = train_with(trained.policy, tuning="as it is", ref_cache="off")
    trainer.train()
    assert trainer.first_update_margin > 1e-3

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = True

    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "ref_cache": "off"}
    train_with(callbacks=[Stop()], **options).train()
    resumed = train_with(**options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


def result_of(logps, ref_logps, tokens):
    logps, ref_logps = (torch.tensor(each, dtype=torch.float64) for each in (logps, ref_logps))
    return UpdateResult(
        loss=torch.zeros(()), logps=logps, ref_logps=ref_logps, tokens=torch.tensor(tokens),
        token_metrics={}, token_completions=torch.empty(0), computed_tokens=0, aux_loss=None,
    )  # fmt: skip


def test_the_bounds_are_by_token():
    groups = [PromptGroup(None, (), row=4), PromptGroup(None, (), row=7)]
    equal = [[-10.0, -20.0], [-30.0, -5.0]]

    def fault(change, exact, tokens=100):
        other = [[-10.0, -20.0], [-30.0, -5.0 - change]]
        counts = [[9, 9], [9, tokens]]
        return first_margin_fault(groups, result_of(equal, other, counts), exact=exact)

    assert fault(0.0099, exact=True) is None
    assert "rejected completion of row 8 has -5.000000" in fault(0.0101, exact=True)
    assert fault(2.9, exact=False) is None
    assert "0.031 a token apart (at most 0.03)" in fault(3.1, exact=False)
    assert fault(0.4, exact=False, tokens=1) is None
    assert fault(0.6, exact=False, tokens=1) is not None
