"""Methods that a subclass overrides are called, or refused with what to do instead."""

import inspect

import pytest
from transformers import Trainer

from fastdpo import DPOTrainer
from fastdpo.trainer.overrides import NEVER_CALLED
from fastdpo.trainer.resumable import ResumableTrainer
from tests.tiny_trainer import HELD_OUT, tiny_base, tiny_trainer

ELSEWHERE = {
    # called by the user, or under options that are refused (several processes, a search)
    "_defer_fsdp_gradient_reduction", "_mixed_mesh_grad_norm", "_push_from_checkpoint",
    "_sync_replicated_trainable_parameters", "_tune_save_checkpoint", "_update_auto_batch_size",
    "call_model_init", "end", "get_learning_rates", "get_num_trainable_parameters",
    "get_optimizer_group", "hyperparameter_search", "init_hf_repo", "log_metrics",
    "metrics_format", "push_to_hub", "save_metrics", "save_state",
}  # fmt: skip


def methods_of(kind):
    found = {
        name
        for name, value in vars(kind).items()
        if callable(value) or isinstance(value, staticmethod)
    }
    return {name for name in found if not name.startswith("__")}


def noting(name, called):
    """The method of this name, which notes that it was called."""
    original = inspect.getattr_static(DPOTrainer, name)
    if isinstance(original, staticmethod):
        function = original.__func__
        return staticmethod(
            lambda *args, **kwargs: (called.add(name), function(*args, **kwargs))[1]
        )
    return lambda self, *args, **kwargs: (called.add(name), original(self, *args, **kwargs))[1]


def test_every_method_of_transformers_is_called_or_refused(tmp_path, monkeypatch):
    """A whole run with evaluation, checkpoints, the best one loaded, a resume and a prediction."""
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    called: set[str] = set()
    theirs = methods_of(Trainer)
    watched = {name: noting(name, called) for name in theirs - set(NEVER_CALLED)}
    monkeypatch.setattr("tests.tiny_trainer.DPOTrainer", type("Watched", (DPOTrainer,), watched))
    options = {
        "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1,
        "max_steps": 2, "load_best_model_at_end": True, "include_num_input_tokens_seen": "all",
        "rows": HELD_OUT, "per_device_train_batch_size": 2,
    }  # fmt: skip
    trainer = tiny_trainer(tiny_base(), tmp_path / "out", **options)
    trainer.train()
    trainer.save_model()
    trainer.predict(HELD_OUT)
    trainer.create_model_card()
    again = tiny_trainer(tiny_base(), tmp_path / "out", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert theirs - called - set(NEVER_CALLED) <= ELSEWHERE


def test_every_method_of_trl_is_called_or_refused():
    trl = pytest.importorskip("trl")
    theirs = methods_of(trl.DPOTrainer)
    unknown = theirs - methods_of(Trainer) - set(NEVER_CALLED)
    assert not {name for name in unknown if not hasattr(DPOTrainer, name)}


def test_our_classes_define_no_method_that_they_never_call():
    for kind in (DPOTrainer, ResumableTrainer):
        assert not methods_of(kind) & set(NEVER_CALLED)


@pytest.mark.parametrize("name", sorted(NEVER_CALLED))
def test_overriding_is_refused_before_anything_is_loaded(name):
    class Mixin:
        pass

    setattr(Mixin, name, lambda self: None)
    for bases in ((Mixin, DPOTrainer), (type("Mine", (Mixin, DPOTrainer), {}),)):
        with pytest.raises(TypeError, match=rf"Mixin has its own {name}, which fastdpo never"):
            type("Below", bases, {})("no-such-model")


def test_what_is_set_from_outside_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    trainer = tiny_trainer(tiny_base(), tmp_path / "out", max_steps=1)
    trainer.compute_loss = lambda *args: None
    with pytest.raises(TypeError, match="the trainer has its own compute_loss"):
        trainer.train()
    assert not list(tmp_path.glob("cache/**/shard-*"))
    monkeypatch.setattr(DPOTrainer, "get_batch_logps", print, raising=False)
    with pytest.raises(TypeError, match="DPOTrainer has its own get_batch_logps"):
        DPOTrainer("no-such-model")
