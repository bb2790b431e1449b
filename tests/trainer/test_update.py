"""update.py: the same gradient by every way to it, and after memory has run out anywhere."""

import copy
import gc
import logging

import pytest
import torch
from transformers import MixtralConfig

from fastdpo.losses import PairLogps
from fastdpo.system.oom import DoesNotFitError
from fastdpo.trainer import update as update_room
from tests.tiny_trainer import ROWS, away_from_reference, tiny_base, tiny_trainer

T = 512


@pytest.fixture(scope="module")
def base():
    return tiny_base()


@pytest.fixture
def trainer_with(base, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))

    def build(**options):
        trainer = tiny_trainer(
            copy.deepcopy(base), tmp_path / "out", micro_batch_tokens=T, **options
        )
        return away_from_reference(trainer)

    return build


def updated(trainer, count=8, **attributes):
    """The result of one update over the first pairs, and the gradient; then as before."""
    for name, value in attributes.items():
        setattr(trainer.layout, name, value)
    groups = [trainer.train_groups[i] for i in range(count)]
    trainer.policy.train()
    result = trainer.update.run(groups)
    gradient = {
        name: parameter.grad.clone()
        for name, parameter in trainer.policy.named_parameters()
        if parameter.grad is not None
    }
    trainer.policy.zero_grad()
    return result, gradient


def assert_close(first, second, tolerance=2e-5):
    (result, gradient), (other, its_gradient) = first, second
    torch.testing.assert_close(other.loss, result.loss, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(other.logps, result.logps, rtol=1e-6, atol=1e-6)
    assert gradient.keys() == its_gradient.keys()
    assert gradient
    for name, value in gradient.items():
        away = (its_gradient[name] - value).norm()
        assert away <= tolerance * value.norm() + 1e-9, (name, float(away / value.norm()))


def geometric(pairs: PairLogps):
    return (pairs.margins - pairs.margins.mean()).square()


geometric.couples_pairs = True

LOSSES = {
    "sigmoid": {},
    "sft and sigmoid": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    "aot": {"loss_type": "aot"},
    "aot_unpaired": {"loss_type": "aot_unpaired"},
    "ld": {"ld_alpha": 0.3, "loss_type": ["sigmoid", "sft"]},
    "wpo": {"use_weighting": True},
    "reference_free": {"reference_free": True},
    "simpo": {"loss_type": "simpo", "beta": 2.0},
    "own": {"loss_function": lambda pairs: torch.nn.functional.softplus(-pairs.margins)},
    "own, coupled": {"loss_function": geometric},
}


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES.keys())
def test_pairs_split_into_completions_have_the_same_gradient(trainer_with, options):
    trainer = trainer_with(**options)
    whole = updated(trainer)
    assert_close(whole, updated(trainer, most_group_tokens=0))  # every pair in two pieces
    assert_close(whole, updated(trainer, micro_batch_tokens=128))  # and in other company
    assert_close(whole, updated(trainer, most_group_tokens=None))


def test_the_reference_of_the_moment_is_the_stored_one(trainer_with):
    for options in ({}, {"ld_alpha": 0.5}):
        stored = updated(trainer_with(**options))
        now = updated(trainer_with(ref_cache="off", **options))
        # Packed otherwise in the pass than in the update: to rounding, whatever the BLAS.
        assert torch.allclose(stored[0].ref_logps, now[0].ref_logps, rtol=1e-6)
        assert_close(stored, now)


def test_dropout_is_the_same_in_both_passes(trainer_with):
    """The second pass by coefficients repeats the first one's masks, so the margins agree."""
    trainer = trainer_with(dropout=0.5, loss_type="aot")
    seen = []
    real = update_room._StepAttempt._forward

    def forward(self, micro_batch, indices, outputs):
        found = real(self, micro_batch, indices, outputs)
        seen.append(found[0]["logps"].detach().clone())
        return found

    update_room._StepAttempt._forward = forward
    try:
        updated(trainer, micro_batch_tokens=128)
    finally:
        update_room._StepAttempt._forward = real
    half = len(seen) // 2
    assert half > 1
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))
    assert not torch.equal(seen[0], seen[1])


class Failing:
    """Runs out of memory at the n-th call, before or after the real work."""

    def __init__(self, real, at, *, after):
        self.real, self.at, self.after, self.calls = real, at, after, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls != self.at:
            return self.real(*args, **kwargs)
        if self.after:
            self.real(*args, **kwargs)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


PLACES = ("before a forward", "inside a forward", "after a forward", "after a backward")


def fail_at(trainer, place, number, monkeypatch):
    """Let memory run out at one place of one micro-batch."""
    if place == "inside a forward":
        layer = next(m for n, m in trainer.policy.named_modules() if n.endswith("layers.1.mlp"))
        failing = Failing(layer.forward, number, after=False)
        monkeypatch.setattr(layer, "forward", failing)
    elif place == "after a backward":  # it has added to .grad
        failing = Failing(trainer.update.backward, number, after=True)
        monkeypatch.setattr(trainer.update, "backward", failing)
    else:
        failing = Failing(update_room.packed_logprobs, number, after=place == "after a forward")
        monkeypatch.setattr(update_room, "packed_logprobs", failing)
    return failing


@pytest.mark.parametrize("place", PLACES)
def test_an_update_that_ran_out_of_memory_is_the_same_update(
    trainer_with, place, monkeypatch, caplog
):
    trainer = trainer_with()
    micro_batches = 3
    expected = updated(trainer, micro_batch_tokens=256)
    for number in range(1, micro_batches + 1):
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            caplog.clear()
            failing = fail_at(trainer, place, number, patch)
            found = updated(trainer, micro_batch_tokens=256)
        assert failing.calls > number, "it went on"
        assert_close(expected, found)
        assert trainer.layout.micro_batch_tokens < 256
        assert sum("Out of memory" in line for line in caplog.messages) == 1


def test_an_update_after_out_of_memory_draws_the_noise_of_a_fresh_one(trainer_with, monkeypatch):
    trainer = trainer_with(dropout=0.3)
    torch.manual_seed(5)
    with monkeypatch.context() as patch:
        fail_at(trainer, "after a backward", 2, patch)
        found = updated(trainer, micro_batch_tokens=256)
    lowered = trainer.layout.micro_batch_tokens
    torch.manual_seed(5)
    expected = updated(trainer, micro_batch_tokens=lowered)
    assert torch.equal(found[0].logps, expected[0].logps)
    for name, value in expected[1].items():
        assert torch.equal(value, found[1][name]), name


def test_twenty_failures_leak_nothing(trainer_with, monkeypatch):
    trainer = trainer_with()
    expected = updated(trainer)

    def live():
        gc.collect()
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())

    counts = []
    for _ in range(20):
        with monkeypatch.context() as patch:
            fail_at(trainer, "after a backward", 1, patch)
            found = updated(trainer, micro_batch_tokens=T, most_group_tokens=None)
        counts.append(live())
    assert_close(expected, found)
    assert max(counts[2:]) <= counts[1], counts


def test_memory_that_never_suffices_ends_with_what_to_do(trainer_with, monkeypatch):
    trainer = trainer_with()

    def never(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(update_room, "packed_logprobs", never)
    with pytest.raises(DoesNotFitError, match=r"single completion.*--max_length.*fastdpo\.plan"):
        updated(trainer)
    assert all(p.grad is None for p in trainer.policy.parameters())
    assert trainer.layout.most_group_tokens is not None, "it tried single completions"


def test_another_error_is_not_taken_for_a_lack_of_memory(trainer_with, monkeypatch):
    trainer = trainer_with()

    def wrong(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(update_room, "packed_logprobs", wrong)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        updated(trainer)


def test_a_loss_of_the_wrong_shape_is_named(trainer_with):
    trainer = trainer_with(loss_function=lambda pairs: pairs.margins.mean())
    with pytest.raises(ValueError, match=r"shape \(8,\)|one floating-point loss per pair"):
        updated(trainer)


def test_the_routers_loss_is_over_the_tokens_of_the_whole_update(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path))
    config = MixtralConfig(
        vocab_size=288, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    found = {}
    for coef in (0.0, 0.5):
        trainer = tiny_trainer(
            tiny_base(config), tmp_path / "out", tuning="full", router_aux_loss_coef=coef,
            micro_batch_tokens=T,
        )  # fmt: skip
        trainer.on_before_train()
        found[coef] = updated(trainer)
        if coef:
            split = updated(trainer, most_group_tokens=0)
            assert split[0].aux_loss > 0, "of other rows, but of the same kind"
            trainer.train()
            assert trainer.state.log_history[0]["aux_loss"] > 0
    assert found[0.0][0].aux_loss is None
    router = next(name for name in found[0.0][1] if "gate" in name)
    assert not torch.allclose(found[0.0][1][router], found[0.5][1][router])
    expected = found[0.0][0].loss + 0.5 * found[0.5][0].aux_loss
    torch.testing.assert_close(found[0.5][0].loss, expected, msg="in the loss too, as in TRL")


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_training_survives_memory_running_out_again_and_again(base, tmp_path, monkeypatch, tuning):
    """A whole run with failures in it: the weights of a run without, to rounding."""
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    runs = []
    for fails in (False, True):
        trainer = tiny_trainer(
            copy.deepcopy(base), tmp_path / "out", rows=ROWS, tuning=tuning, eval_strategy="no",
            micro_batch_tokens=T, learning_rate=1e-3,
        )  # fmt: skip
        with monkeypatch.context() as patch:
            if fails:
                fail_at(trainer, "after a backward", 3, patch)
            trainer.train()
        runs.append({n: p.detach() for n, p in trainer.policy.named_parameters()})
        assert (trainer.layout.micro_batch_tokens < T) == fails
    for name, weight in runs[0].items():
        torch.testing.assert_close(runs[1][name], weight, rtol=1e-4, atol=1e-5, msg=name)
