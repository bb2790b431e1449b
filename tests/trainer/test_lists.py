"""Pairs of one prompt that share completions: each completion once, the gradient of every pair."""

import copy
import itertools

import numpy as np
import pytest
import torch

from fastdpo.modeling import scoring
from fastdpo.modeling.logprobs import METRIC_OUTPUTS
from fastdpo.modeling.scoring import score_pairs
from fastdpo.ref_cache import compute
from fastdpo.trainer import update as update_room
from tests.tiny_trainer import away_from_reference, preference_rows, tiny_base, tiny_trainer
from tests.trainer.test_update import assert_close, fail_at, updated

WORDS = ("good", "bad", "fine", "poor", "sunny", "rainy", "calm", "loud")


def rated(completions, seed=0):
    """All pairs of so many rated completions, as `--rated_pairs all` makes them."""
    draw = np.random.default_rng(seed)
    prompt = f"The day {seed} was {' '.join(draw.choice(WORDS, 3))}."
    # No two begin alike, so that every token of a completion belongs to it alone.
    texts = [f"{number}: {' '.join(draw.choice(WORDS, 5))}" for number in range(completions)]
    return [
        {"prompt": prompt, "chosen": better, "rejected": worse}
        for better, worse in itertools.combinations(texts, 2)
    ]


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture
def trainer_of(base, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))

    def build(rows, **options):
        trainer = tiny_trainer(
            copy.deepcopy(base), tmp_path / "out", rows=rows, held_out=rows,
            **{"micro_batch_tokens": 1024} | options,
        )  # fmt: skip
        return away_from_reference(trainer)

    return build


@pytest.fixture
def micro_batches(monkeypatch):
    """The micro-batches that updates, the reference pass and evaluations run."""
    seen = []
    for room in (update_room, scoring):

        def noted(model, micro_batch, *others, real=room.packed_logprobs, **named):
            seen.append(micro_batch)
            return real(model, micro_batch, *others, **named)

        monkeypatch.setattr(room, "packed_logprobs", noted)
    return seen


def completion_tokens(micro_batches, prompt):
    """Input tokens of packed sequences that belong to completions, all of one prompt."""
    segments = [s for m in micro_batches for s in m.segments if s.suffix_tokens]
    return sum(segment.tokens - len(prompt) for segment in segments)


def pair_by_pair(trainer, count):
    """Loss, log-probs and gradient of the mean over updates of one pair each."""
    results, gradients = [], []
    for index in range(count):
        result = trainer.update.run([trainer.train_groups[index]])
        results.append(result)
        named = trainer.policy.named_parameters()
        gradients.append({n: p.grad / count for n, p in named if p.grad is not None})
        trainer.policy.zero_grad()
    whole = copy.copy(results[0])
    object.__setattr__(whole, "loss", torch.stack([r.loss for r in results]).mean())
    object.__setattr__(whole, "logps", torch.cat([r.logps for r in results]))
    gradient = {name: sum(each[name] for each in gradients) for name in gradients[0]}
    return whole, gradient


LOSSES = {
    "sigmoid": {},
    "ld": {"ld_alpha": 0.3},
    "wpo": {"use_weighting": True},
    "ipo": {"loss_type": "ipo"},
    "reference of the moment": {"ref_cache": "off"},
    "unshared": {"shared_prefix": "off"},
    "padded": {"packing": "off"},
}


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("completions", [4, 7])
def test_a_list_has_the_gradient_of_its_pairs_one_by_one(trainer_of, completions, options):
    trainer = trainer_of(rated(completions), **options)
    pairs = len(trainer.train_groups)
    trainer.policy.train()
    expected = pair_by_pair(trainer, pairs)
    assert_close(expected, updated(trainer, count=pairs), tolerance=1e-5)
    cut = updated(trainer, count=pairs, micro_batch_tokens=128)  # completions of pairs apart
    assert_close(expected, cut, tolerance=1e-5)
    assert_close(expected, updated(trainer, count=pairs, most_group_tokens=0), tolerance=1e-5)


@pytest.mark.parametrize("completions", [4, 7])
@pytest.mark.parametrize("most", [1024, 128])
def test_every_completion_is_computed_once(trainer_of, micro_batches, completions, most):
    rows = rated(completions)
    trainer = trainer_of(rows, micro_batch_tokens=most, ref_spot_check=0)
    groups = list(trainer.train_groups)
    prompt = groups[0].prompt_ids
    of_reference = completion_tokens(micro_batches, prompt)
    before = sum(len(c) - 1 for group in groups for c in group.completions)
    assert before == (completions - 1) * of_reference, "once for every pair, and once in all"
    micro_batches.clear()
    result, _ = updated(trainer, count=len(groups))
    passes = 1 if len(micro_batches) == 1 else 2  # GradCache, where pairs lie apart
    assert passes == (1 if most == 1024 else 2)
    assert completion_tokens(micro_batches, prompt) == passes * of_reference
    assert result.computed_tokens == sum(m.num_tokens for m in micro_batches) / passes
    micro_batches.clear()
    trainer.evaluate()
    assert completion_tokens(micro_batches, prompt) == of_reference


def test_pairs_in_whole_micro_batches_need_no_second_forward(trainer_of, micro_batches):
    trainer = trainer_of([*rated(7), *rated(5, seed=1)], micro_batch_tokens=200)
    micro_batches.clear()
    updated(trainer, count=31)
    lists = [trainer.train_groups[index].prompt_ids[:16].tolist() for index in (0, 21)]
    held = [[lists.index(m.input_ids[0, :16].tolist())] for m in micro_batches]
    assert held == [[1], *[[0]] * (len(held) - 1)], "the one that fits, then twice the other"
    assert len(held) % 2 == 1


def test_metrics_count_every_pair(trainer_of):
    trainer = trainer_of(rated(4))
    groups = list(trainer.train_groups)
    listed = trainer.update.run(groups, METRIC_OUTPUTS)
    alone = [trainer.update.run([group], METRIC_OUTPUTS) for group in groups]
    for name in METRIC_OUTPUTS:
        values = torch.cat([each.token_metrics[name] for each in alone])
        torch.testing.assert_close(listed.token_metrics[name], values)
    assert torch.equal(listed.tokens, torch.cat([each.tokens for each in alone]))
    completions = [2 * pair + each.token_completions for pair, each in enumerate(alone)]
    assert torch.equal(listed.token_completions, torch.cat(completions))


@pytest.mark.parametrize("place", ["inside a forward", "after a backward"])
def test_out_of_memory_changes_nothing(trainer_of, monkeypatch, place):
    trainer = trainer_of([*rated(4), *rated(5, seed=1)], micro_batch_tokens=256)
    pairs = len(trainer.train_groups)
    expected = updated(trainer, count=pairs)
    for number in (1, 2):
        with monkeypatch.context() as patch:
            fail_at(trainer, place, number, patch)
            found = updated(trainer, count=pairs, micro_batch_tokens=256)
        assert trainer.layout.micro_batch_tokens < 256
        assert_close(expected, found)


def test_evaluation_and_scores_are_those_of_the_pairs_alone(trainer_of):
    trainer = trainer_of([*rated(4), *preference_rows(3), *rated(5, seed=1)])
    groups = trainer.eval_groups
    listed = score_pairs(trainer.policy, groups, trainer.layout, outputs=("entropy",))
    alone = [score_pairs(trainer.policy, [g], trainer.layout, outputs=("entropy",)) for g in groups]
    np.testing.assert_allclose(listed.logps, np.concatenate([a.logps for a in alone]), rtol=1e-6)
    torch.testing.assert_close(listed.token_logps, torch.cat([a.token_logps for a in alone]))
    entropy = torch.cat([a.extras["entropy"] for a in alone])
    torch.testing.assert_close(listed.extras["entropy"], entropy)


def test_a_run_over_lists(base, tmp_path, monkeypatch, caplog):
    """Lists stay in one update, policy and reference begin equal, and it resumes to the bit."""
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    caplog.set_level("INFO")
    rows = [*rated(4), *preference_rows(5), *rated(3, seed=1), *rated(4, seed=2)]
    options = {"rows": rows, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    ends = []
    for name, resume in (("whole", None), ("resumed", str(tmp_path / "whole/checkpoint-2"))):
        trainer = tiny_trainer(copy.deepcopy(base), tmp_path / name, dropout=0.1, **options)
        sampler = trainer.sets.sampler()
        assert [sorted(map(sum, sampler.plan))] == [[4, 8, 8]]
        lists = trainer.train_groups.lists
        for update in sampler:
            whole = [index for index, name in enumerate(lists) if name in lists[update]]
            assert whole == sorted(update)
        trainer.train(resume_from_checkpoint=resume)
        ends.append({n: p.detach() for n, p in trainer.policy.named_parameters()})
        if resume is None:
            assert trainer.first_update_margin == 0.0
            assert "in lists of up to 6" in caplog.text
            assert trainer.resume_signature()["sampling"] == "random, lists together"
    for name, weight in ends[0].items():
        assert torch.equal(weight, ends[1][name]), name


def test_known_completions_are_kept_once(trainer_of, monkeypatch):
    stored = []
    real = compute.ReferenceStore.append
    monkeypatch.setattr(
        compute.ReferenceStore, "append", lambda self, rows: stored.extend(rows) or real(self, rows)
    )
    trainer_of(rated(5))
    assert len(stored) == len({row.key for row in stored}) == 5
