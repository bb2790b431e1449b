"""layout.py and the trainer's planned path, without a GPU: planned, laid out, probed."""

import copy
from dataclasses import replace
from functools import reduce

import pytest
import torch
from torch import nn

import fastdpo.trainer.dpo_trainer as trainer_room
import fastdpo.trainer.update as update_room
from fastdpo.batching import PromptGroup, group_tokens, shared_prefix_length
from fastdpo.data import rows_from
from fastdpo.modeling import scoring
from fastdpo.modeling.activations import decoder_layers
from fastdpo.modeling.layout import ExecutionLayout, distinct_items, group_length
from fastdpo.planner import GPUSpec, from_model, plan_for_run
from fastdpo.trainer.layout import (
    _Lists,
    choose_layout,
    group_lengths,
    plan_memory,
    worst_case_batch,
)
from tests.tiny_trainer import tiny_base, tiny_trainer
from tests.trainer.test_dpo_trainer import assert_same_weights, weights

GIB = 2**30
GPU = GPUSpec("a tiny GPU", 2 * GIB, 10, 100)


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    base = tiny_base()

    def build(**options):
        return tiny_trainer(copy.deepcopy(base), tmp_path / "out", **options)

    return build


def plan_of(trainer, **changes):
    """As `plan_memory` asks for it, of a GPU that is not there."""
    groups = trainer.train_groups
    made = plan_for_run(
        trainer.policy,
        trainer.user_args,
        group_lengths(groups, trainer.mode),
        pairs_per_update=trainer.pairs_per_update,
        scored_tokens=sum(len(ids) for group in groups for ids in group.completions),
        gpu=GPU,
        host_bytes=GIB,
    )
    return replace(made, **changes)


@pytest.fixture
def planned(build, monkeypatch):
    """A trainer that thinks it has a GPU and a plan for it."""

    def planned(changes=None, **options):
        values = {"activation_plan": ("recompute", "keep"), "micro_batch_tokens": 256}
        made = plan_of(build(**options), **values | (changes or {}))
        with monkeypatch.context() as patch:
            patch.setattr(trainer_room, "plan_memory", lambda *_: made)
            trainer = build(**options)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
        return trainer

    return planned


def layout_of(trainer, plan, **options):
    args = copy.copy(trainer.user_args)
    for name, value in options.items():
        setattr(args, name, value)
    return choose_layout(trainer.policy, args, trainer.train_groups, trainer.mode, plan)


# Plans and layouts


def test_a_plan_of_a_loaded_model_fits_its_gpu(build):
    trainer = build(activation_checkpointing=True)
    made = plan_of(trainer)
    assert made.fits
    assert len(made.activation_plan) == 2
    assert made.micro_batch_tokens >= max(group_lengths(trainer.train_groups, trainer.mode))
    assert made.gpu_bytes == GPU.memory_bytes
    assert sum(made.terms.values()) > sum(p.nbytes for p in trainer.policy.parameters())
    small = replace(GPU, memory_bytes=2**20)
    again = plan_for_run(
        trainer.policy, trainer.user_args, [90, 100], pairs_per_update=8, scored_tokens=50,
        gpu=small, host_bytes=0,
    )  # fmt: skip
    assert not again.fits


def test_where_there_is_no_gpu_nothing_is_planned(build):
    trainer = build()
    assert trainer.plan is None
    assert plan_memory(trainer.policy, trainer.user_args, None, trainer.mode, 8) is None


def test_the_layout_follows_the_plan_and_the_options_come_first(build):
    trainer = build(activation_checkpointing=True)
    made = plan_of(
        trainer, activation_plan=("offload", "keep"), micro_batch_tokens=512, mlp_tile_tokens=2048,
        norm_tile_tokens=1024, embeddings_on_host=True,
    )  # fmt: skip
    plain = layout_of(trainer, made)
    assert plain == ExecutionLayout(
        512, ("offload", "keep"), 2048, 1024, True, None, plain.attention, "eager"
    )
    assert layout_of(trainer, made, micro_batch_tokens=300).micro_batch_tokens == 300
    assert layout_of(trainer, made, activations="recompute").activation_plan == ("recompute",) * 2
    assert layout_of(trainer, made, activation_checkpointing=False).activation_plan == ("keep",) * 2
    assert layout_of(trainer, made, mlp_tile_tokens=64).mlp_tile_tokens == 64
    none = layout_of(trainer, made, mlp_tile_tokens=0)
    assert (none.mlp_tile_tokens, none.norm_tile_tokens) == (None, None)
    assert not layout_of(trainer, made, embeddings="device").embeddings_on_host
    assert layout_of(trainer, None, embeddings="host").embeddings_on_host
    without = layout_of(trainer, None)
    assert without.micro_batch_tokens == 2048
    assert without.activation_plan == ("recompute",) * 2


def test_a_plan_of_short_rows_splits_the_longest_pairs(build):
    trainer = build()
    longest = max(group_lengths(trainer.train_groups, trainer.mode))
    assert (
        layout_of(trainer, plan_of(trainer, micro_batch_tokens=longest)).most_group_tokens is None
    )
    split = layout_of(trainer, plan_of(trainer, micro_batch_tokens=longest - 1))
    assert split.most_group_tokens == longest - 1


def test_the_fullest_update_is_the_longest_pairs_that_share_a_row(build):
    trainer = build()
    layout = layout_of(trainer, None, micro_batch_tokens=256)
    chosen = [
        group_tokens(each) for each in worst_case_batch(trainer.train_groups, trainer.mode, layout)
    ]
    ordered = sorted(group_lengths(trainer.train_groups, trainer.mode), reverse=True)
    assert chosen == ordered[: len(chosen)]
    assert sum(chosen) <= 256 < sum(ordered[: len(chosen) + 1])
    short = replace(layout, micro_batch_tokens=1)
    assert len(worst_case_batch(trainer.train_groups, trainer.mode, short)) == 1


def test_layers_without_the_hook_can_be_kept(build, monkeypatch):
    """A model from elsewhere, its layers no GradientCheckpointingLayer."""
    trainer = build()
    for layer in decoder_layers(trainer.policy):
        plain = {k: v for k, v in type(layer).__dict__.items() if k in ("__init__", "forward")}
        layer.__class__ = type("PlainLayer", (nn.Module,), plain)
    layout = layout_of(trainer, None, activations="keep")
    assert layout.activation_plan == ()
    layout.apply(trainer.policy)
    with pytest.raises(ValueError, match="GradientCheckpointingLayer"):
        replace(layout, mlp_tile_tokens=64).apply(trainer.policy)


def test_what_else_lies_on_the_gpu_is_not_planned_with(build, monkeypatch):
    trainer = build(reference="base")
    own = sum(p.nbytes for p in trainer.policy.parameters())
    own += sum(b.nbytes for b in trainer.policy.buffers())
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: own + 12345)
    assert from_model.other_allocations(trainer.policy) == 12345
    copied = build(sync_ref_model=True)
    frozen = [p for n, p in copied.policy.named_parameters() if ".reference." in n]
    assert frozen
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: own + sum(p.nbytes for p in frozen))
    assert from_model.other_allocations(copied.policy) == sum(p.nbytes for p in frozen)


# The memory probe

LOSSES = {
    "sigmoid": {},
    "coupled": {"loss_type": "aot"},
    "ld": {"ld_alpha": 0.4},
    "no reference": {"loss_type": "simpo"},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "reference of the moment": {"ref_cache": "off"},
    "all weights": {"tuning": "full"},
    "split": {"micro_batch_tokens": 128},
}


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES.keys())
def test_a_memory_probe_leaves_no_trace(planned, options):
    trainer = planned(dropout=0.3, **options)
    before, state = weights(trainer), torch.get_rng_state()
    if options.get("micro_batch_tokens"):
        trainer.layout.most_group_tokens = 0
    trainer.on_before_train()
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_weights(before, weights(trainer))
    assert all(p.grad is None for p in trainer.policy.parameters())
    assert trainer.first_update_margin is None
    assert trainer.record.tokens_seen == 0
    assert "loss" not in trainer.record.flush()


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_planned_run_trains_to_the_same_weights(planned, build, tuning, caplog):
    """Its fullest update is probed first, layers recompute and MLPs run in tiles: only rounding."""
    options = {"tuning": tuning, "micro_batch_tokens": 256, "learning_rate": 1e-3}
    plain = build(**options)
    plain.train()
    caplog.set_level("INFO")
    trainer = planned({"mlp_tile_tokens": 32, "norm_tile_tokens": 64}, **options)
    trainer.train()
    assert "The fullest micro-batch fits. Peak memory: 3.0 MiB measured" in caplog.text
    assert trainer.layout.mlp_tile_tokens == 32
    bitwise = planned(**options)
    bitwise.train()
    assert_same_weights(weights(plain), weights(bitwise))
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(trainer)[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_memory_that_runs_out_in_the_probe_lowers_t_for_the_run(planned, monkeypatch, caplog):
    trainer = planned()
    real, failed = update_room._StepAttempt.run, []

    def run(self):
        if trainer.layout.micro_batch_tokens == 256:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self)

    monkeypatch.setattr(update_room._StepAttempt, "run", run)
    trainer.train()
    assert len(failed) == 1, "in the probe, and never again"
    assert trainer.layout_state()["layout"]["micro_batch_tokens"] < 256
    assert trainer.state.global_step == 5


def test_memory_that_runs_out_in_an_evaluation_lowers_t_for_the_updates(build, monkeypatch):
    """Updates, the reference pass and evaluations hold one layout, and the checkpoint stores it."""
    trainer = build(micro_batch_tokens=512)
    expected, real = trainer.evaluate(), scoring.packed_logprobs
    assert trainer.layout.micro_batch_tokens == 512

    def packed_logprobs(model, micro_batch, outputs):
        if micro_batch.num_tokens > 128:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, micro_batch, outputs)

    monkeypatch.setattr(scoring, "packed_logprobs", packed_logprobs)
    found = trainer.evaluate()
    for name in ("eval_loss", "eval_logps/chosen", "eval_entropy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    lowered = trainer.layout.micro_batch_tokens
    assert lowered < 512
    assert trainer.update.layout is trainer.layout
    assert trainer.reference.options["layout"] is trainer.layout
    assert trainer.layout_state()["layout"]["micro_batch_tokens"] == lowered


@pytest.mark.parametrize("packing", ["auto", "off"])
@pytest.mark.parametrize("shared_prefix", ["auto", "off"])
def test_lengths_over_arrays_are_those_of_the_groups(build, packing, shared_prefix):
    rated = [
        {"prompt": f"The day was {word}.", "completions": [" Good", " Good: so", " Bad", " Bad"],
         "ratings": [4, 3, 2, 1]}
        for word in ("fine", "poor")
    ]  # fmt: skip
    rows = rows_from(rated, "rated", rated_pairs="all")
    trainer = build(rows=rows, packing=packing, shared_prefix=shared_prefix)
    for groups in (trainer.train_groups, trainer.eval_groups):
        mode = trainer.mode
        lengths = group_lengths(groups, mode)
        assert lengths == [group_length(group, mode) for group in groups]
        shared = [shared_prefix_length(g) - len(g.prompt_ids) for g in groups]
        assert groups.pairs.shared_tokens.tolist() == shared
        lists = _Lists.of(groups, mode)
        joined = []
        for members in lists.members:
            items, _ = distinct_items([groups[index] for index in members])
            joined.append(reduce(PromptGroup.joined, (item.group for item in items)))
        assert lists.lengths == [group_length(group, mode) for group in joined]
        assert lists.repeated == sum(
            (len(g.completions) - 1) * shared_prefix_length(g) for g in joined
        )
        assert lists.scored == sum(sum(g.scored_tokens) for g in joined)
    assert max(map(len, _Lists.of(trainer.train_groups, mode).members)) > 1
