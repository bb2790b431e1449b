"""Models and adapters that a user brings: their names, their dtype, their base."""

import copy
import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fastdpo import DPOConfig, DPOTrainer, evaluate
from fastdpo.evaluation.load_both import policy_name
from fastdpo.modeling.base_names import is_same_base, looks_like_path
from fastdpo.modeling.trainable import check_quantization_config
from fastdpo.options import ComparisonOptions, ModelOptions
from tests.tiny_trainer import ROWS, TOKENIZER, tiny_base, tiny_trainer

LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a base and a trained adapter on it, named as ./base."""
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny_base().save_pretrained("base")
    TOKENIZER.save_pretrained("base")
    save_adapter("adapter", 0.05)
    return tmp_path


def save_adapter(folder, shift):
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("./base"), copy.deepcopy(LORA))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(shift)
    model.save_pretrained(folder)


def bring(names, **options):
    """A PeftModel with adapters of these names, the first one trained."""
    base = AutoModelForCausalLM.from_pretrained("./base")
    first, *others = names
    model = PeftModel.from_pretrained(base, "adapter", is_trainable=True, adapter_name=first)
    for name in others:
        model.load_adapter("adapter", adapter_name=name)
    return tiny_trainer(model, "out", tuning="brought", rows=ROWS[:8], max_steps=1, **options)


@pytest.mark.parametrize(
    ("names", "options", "held"),
    [
        (["policy", "reference"], {}, "reference"),  # TRL's recipe of two adapters
        (["mine", "ref"], {"reference": "ref"}, "ref"),
        (["reference"], {}, None),
        (["reference", "reference_2"], {}, None),
        (["default", "other"], {}, None),
    ],
)
def test_any_name_of_an_adapter_will_do(workplace, names, options, held):
    """Both adapters come from one folder, so the first margin is 0 whichever is the reference."""
    trainer = bring(names, **options)
    reference = trainer.reference.reference
    assert reference.adapter == held or (held is None and reference.adapter not in names)
    assert (f"called {held}" in reference.description) == (held is not None)
    trainer.train()
    assert trainer.first_update_margin == 0.0
    moved = {name for name, p in trainer.policy.named_parameters() if p.requires_grad}
    assert moved
    assert all(f".{names[0]}." in name for name in moved)
    trainer.save_model()
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("./base"), "out")
    assert again.active_adapters == ["default"]


def test_an_adapter_of_any_name_is_saved_resumed_and_evaluated(workplace, capsys):
    """PEFT keeps all but the one called default in a folder of its name; nothing looks there."""
    options = {"save_strategy": "steps", "save_steps": 1}
    bring(["policy", "reference"], **options).train()
    again = bring(["policy", "reference"], **options)
    again.train(resume_from_checkpoint="out/checkpoint-1")
    kept, trained = (
        get_peft_model_state_dict(again.policy, adapter_name=name)
        for name in ("reference", "policy")
    )
    assert any(not torch.equal(kept[name], trained[name]) for name in kept)
    saved = load_file("out/checkpoint-1/adapter_model.safetensors")
    assert all(torch.equal(saved[name], trained[name]) for name in saved)
    again.save_model()
    (workplace / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS[:4])))
    evaluate.main(["--adapter", "out", "--dataset", "rows.jsonl", "--num_completions", "0"])
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", torch.bfloat16])
def test_the_dtype_of_model_init_kwargs_is_taken(workplace, key, value):
    config = DPOConfig("out", model_init_kwargs={key: value}, use_cpu=True, report_to="none")
    trainer = DPOTrainer("base", args=config, train_dataset=ROWS[:4], peft_config=LORA)
    assert trainer.policy.get_base_model().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BitsAndBytesConfig(load_in_8bit=True), "load_in_8bit"),
        ({"load_in_8bit": True}, "load_in_8bit"),
        ({"quant_method": "gptq", "bits": 4}, "a dict"),
        (object(), "object"),
    ],
)
def test_other_quantizations_are_refused_before_loading(config, words):
    with pytest.raises(ValueError, match=f"quantization_config is {words}"):
        check_quantization_config(config)
    with pytest.raises(ValueError, match="quantization_config is"):
        DPOTrainer("no-such-model", quantization_config=config, processing_class=TOKENIZER)
    check_quantization_config(BitsAndBytesConfig(load_in_4bit=True))


def test_a_base_by_relative_path_is_asked_for_elsewhere(workplace, monkeypatch):
    options = ComparisonOptions(adapter=str(workplace / "adapter"))
    assert policy_name(ModelOptions(), options) == "./base"
    (workplace / "elsewhere").mkdir()
    monkeypatch.chdir(workplace / "elsewhere")
    with pytest.raises(ValueError, match=r"names its base \./base, relative to .*: pass .*--model"):
        policy_name(ModelOptions(), options)
    assert policy_name(ModelOptions(model_name_or_path="../base"), options) == "../base"
    with pytest.raises(ValueError, match=r"names its base \./base, relative"):
        DPOTrainer(str(workplace / "adapter"), processing_class=TOKENIZER)


def test_two_spellings_and_two_copies_of_a_base_are_one(workplace):
    assert is_same_base("base", str(workplace / "base"))
    assert is_same_base("./base", os.path.join("..", workplace.name, "base"))
    os.symlink("base", "link")
    assert is_same_base("link", "base")
    shutil.copytree("base", "copy")
    assert is_same_base("copy", "base")
    torch.manual_seed(9)
    other = tiny_base()
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    other.save_pretrained("other")
    assert not is_same_base("other", "base")
    assert not is_same_base("org/base", "base")
    assert not is_same_base("adapter", "base")
    assert [looks_like_path(name) for name in ("gpt2", "org/name")] == [False, False]
    assert all(map(looks_like_path, ("./a", "../a", "/a", "~/a", "a/b/c")))


def test_the_reference_may_name_the_same_base_otherwise(workplace):
    config = {"rows": ROWS[:4], "max_steps": 1, "reference": "adapter"}
    model = AutoModelForCausalLM.from_pretrained(str(workplace / "base"))
    trainer = tiny_trainer(model, "out", **config | {"reference": str(workplace / "adapter")})
    assert "adapter in" in trainer.reference.reference.description
