"""reference_model.py and what the trainer makes of it: base, adapter, other models, TR-DPO."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, LlamaConfig

from fastdpo.modeling.reference_model import FROZEN_ADAPTER
from fastdpo.modeling.scoring import score_pairs
from tests.tiny_trainer import CONFIG, ROWS, TOKENIZER, preference_rows, tiny_base, tiny_trainer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base with its tokenizer on disk, and an adapter trained on it: what SFT leaves behind."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny_base()
    base.save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    on_disk = AutoModelForCausalLM.from_pretrained(folder / "base")
    trainer = tiny_trainer(
        on_disk, folder / "sft", loss_type="sft", eval_strategy="no", learning_rate=2e-2
    )
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture
def train_on(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))

    def build(model="sft", **options):
        given = str(folders / model) if isinstance(model, str) else model
        return tiny_trainer(given, tmp_path / "out", tuning="as it is", **options)

    return build


def base_of(folders):
    return AutoModelForCausalLM.from_pretrained(folders / "base")


def logps(model, trainer):
    return score_pairs(model, trainer.eval_groups, trainer.layout).logps


def ref_logps(trainer):
    trainer.compute_references()
    return trainer.eval_groups.ref_logps


def start(folders):
    return PeftModel.from_pretrained(base_of(folders), folders / "sft")


def test_training_on_from_an_adapter_compares_with_a_frozen_copy(train_on, folders):
    trainer = train_on()
    sft = logps(start(folders), trainer)
    assert abs(sft - logps(base_of(folders), trainer)).max() > 0.1, "the adapter does something"
    before = {n: p.clone() for n, p in trainer.policy.named_parameters() if FROZEN_ADAPTER in n}
    assert before
    trainer.train()
    assert trainer.first_update_margin == 0.0
    torch.testing.assert_close(ref_logps(trainer), sft, rtol=1e-6, atol=1e-4)
    for name, parameter in trainer.policy.named_parameters():
        if FROZEN_ADAPTER in name:
            assert torch.equal(parameter, before[name])
            assert not parameter.requires_grad
    assert abs(logps(trainer.policy, trainer) - sft).max() > 0.1, "the policy has moved"
    assert trainer.policy.active_adapters == ["default"]


def test_a_copy_does_not_depend_on_what_the_memory_held(train_on):
    """A new adapter is left uninitialized, and x + 0 * NaN is not x."""
    trainer = train_on("sft")
    reference = trainer.reference.reference
    for tensor in reference.tensors().values():
        tensor.data.fill_(torch.nan)
    reference.update_ema(trainer.policy, 1.0)
    policy = get_peft_model_state_dict(trainer.policy, adapter_name="default")
    for name, tensor in reference.tensors().items():
        assert torch.equal(tensor, policy[name]), name


def test_only_the_policys_adapter_is_saved(train_on, tmp_path, folders):
    trainer = train_on()
    trainer.train()
    trainer.save_model()
    saved = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert "adapter_model.safetensors" in saved
    assert FROZEN_ADAPTER not in saved
    again = PeftModel.from_pretrained(base_of(folders), tmp_path / "out")
    torch.testing.assert_close(
        logps(again, trainer), logps(trainer.policy, trainer), rtol=1e-6, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["base", "adapter", "a model", "an adapter", "an object"])
def test_what_the_reference_is_can_be_asked_for(train_on, folders, kind):
    requested = {
        "base": {"reference": "base"},
        "adapter": {"reference": "adapter"},
        "a model": {"reference": str(folders / "base")},
        "an adapter": {"ref_model": str(folders / "sft")},
        "an object": {"ref_model": base_of(folders)},
    }[kind]
    trainer = train_on(**requested)
    expected = start(folders) if "adapter" in kind else base_of(folders)
    torch.testing.assert_close(ref_logps(trainer), logps(expected, trainer), rtol=1e-6, atol=1e-4)
    trainer.train()
    assert (trainer.first_update_margin == 0.0) == ("adapter" in kind)


def test_the_store_keeps_the_adapters_apart(train_on, tmp_path):
    """Base and base with adapter are two references; the same adapter again is found."""
    for at, requested in enumerate(({}, {"reference": "base"}, {})):
        trainer = train_on(**requested)
        trainer.compute_references()
        stores = sorted((tmp_path / "cache" / "reference").glob("*/manifest.json"))
        assert len(stores) == (1, 2, 2)[at]
    told = [json.loads(path.read_text())["identity"] for path in stores]
    assert sum("adapter" in identity for identity in told) == 1


def test_a_new_adapter_needs_no_copy(train_on, folders):
    trainer = tiny_trainer(base_of(folders), folders / "out", ref_cache="off")
    assert trainer.reference.reference.adapter is None
    assert not any(FROZEN_ADAPTER in name for name, _ in trainer.policy.named_parameters())
    with pytest.raises(ValueError, match="does not start from an adapter"):
        tiny_trainer(base_of(folders), folders / "out", ref_cache="off", reference="adapter")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ref_model": "policy"}, "would move with it"),
        ({"ref_model": "vocabulary"}, "vocabulary of 300 tokens and the policy one of 288"),
        ({"sync_ref_model": True, "reference": "base"}, "sync_ref_model moves a copy"),
        ({"sync_ref_model": True, "ref_model": "base"}, "sync_ref_model moves a copy"),
    ],
)
def test_a_reference_that_cannot_be_compared_is_refused(train_on, folders, options, reason):
    policy = base_of(folders)
    other = LlamaConfig(**{**CONFIG.to_dict(), "vocab_size": 300})
    models = {
        "policy": policy,
        "vocabulary": AutoModelForCausalLM.from_config(other),
        "base": base_of(folders),
    }
    if "ref_model" in options:
        options = {**options, "ref_model": models[options["ref_model"]]}
    with pytest.raises(ValueError, match=reason):
        train_on(policy, **options)


def test_a_full_run_may_have_another_reference_and_no_store(train_on, folders):
    trainer = train_on(base_of(folders), ref_model=base_of(folders), ref_cache="off")
    trainer.train()
    assert trainer.first_update_margin == 0.0
    assert trainer.evaluate()["eval_rewards/margins"] != 0.0


@pytest.mark.parametrize("model", ["sft", "base"])
def test_tr_dpo_follows_the_policy(train_on, model, monkeypatch):
    """After every second update the reference becomes 0.5 policy + 0.5 reference."""
    trainer = train_on(
        model, sync_ref_model=True, ref_model_mixup_alpha=0.5, ref_model_sync_steps=2
    )
    reference = trainer.reference.reference
    steps = []

    def policy_now():
        named = dict(trainer.policy.named_parameters())
        return {
            name: tensor.detach().clone()
            for name, tensor in named.items()
            if FROZEN_ADAPTER not in name and ("lora" in name or model == "base")
        }

    real = type(reference).update_ema
    expected = {n.replace(".default.", "."): t for n, t in policy_now().items()}

    def update_ema(self, policy, alpha):
        assert trainer.state.global_step % 2 == 0
        for name, tensor in policy_now().items():
            key = name.replace(".default.", ".")
            expected[key] = 0.5 * tensor + 0.5 * expected[key]
        real(self, policy, alpha)
        steps.append(trainer.state.global_step)

    with monkeypatch.context() as patch:
        patch.setattr(type(reference), "update_ema", update_ema)
        trainer.train()
    assert steps == [2, 4]
    own = reference.tensors()
    assert len(own) == len(expected)
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, expected[name.removeprefix("model.")] if name not in
                                   expected else expected[name], rtol=1e-5, atol=1e-7)  # fmt: skip
    assert trainer.train_groups.ref_logps is None, "nothing is stored of what moves"
    moved = trainer.evaluate()
    plain = train_on(model)
    plain.train()
    assert moved["eval_rewards/margins"] != plain.evaluate()["eval_rewards/margins"]


def test_tr_dpo_resumes_where_its_reference_was(train_on):
    options = {
        "sync_ref_model": True, "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 1,
        "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    whole = train_on(**options)
    whole.train()
    resumed = train_on(**options)
    folder = f"{resumed.args.output_dir}/checkpoint-2"
    resumed.train(resume_from_checkpoint=folder)
    names = dict(resumed.policy.named_parameters())
    for name, parameter in whole.policy.named_parameters():
        assert torch.equal(parameter, names[name]), name


def test_a_model_object_with_a_trained_adapter_is_as_its_folder(train_on, folders):
    loaded = PeftModel.from_pretrained(base_of(folders), folders / "sft", is_trainable=True)
    results = []
    for model in ("sft", loaded):
        trainer = train_on(copy.deepcopy(model), rows=preference_rows(16, seed=3))
        trainer.train()
        results.append(ref_logps(trainer))
    assert (results[0] == results[1]).all()
    assert len(ROWS) > 16
