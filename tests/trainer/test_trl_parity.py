"""The same pairs in the same order through trl.DPOTrainer 1.16: loss and gradient norm agree.

`make test` runs a short form of each; `make soak` 20 updates of each (`--soak`).
"""

import copy

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.data import read_rows
from fastdpo.modeling.adapters import lora_config

trl = pytest.importorskip("trl", reason="the oracle is trl.DPOTrainer (pip install fastdpo[dev])")

PAIRS_PER_UPDATE = 8
SHORT = (("full", 1), ("lora", 1), ("lora", 4))
BOUND = 2e-5  # relative; own-against-own with another T is as far apart (prototype: 1e-5)


def common_arguments(folder, accumulation, updates):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": PAIRS_PER_UPDATE // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": updates,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "beta": 0.1,
    }


def curve(trainer):
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.fixture(scope="module")
def story_model(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "hf" / "stories260K")
    tokenizer.eos_token = tokenizer.pad_token = "<s>"
    model = AutoModelForCausalLM.from_pretrained(
        shared_data / "hf" / "stories260K", dtype=torch.float32
    )
    rows = read_rows(str(shared_data / "prefs/tinystories/ts_happy_onpolicy_train.jsonl"))
    # From row 150 on: there are pairs whose prompt merges with the completion among them.
    return model, tokenizer, [dict(row) for row in rows.rows[150:400]]


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_loss_and_gradient_norm_equal_trl(story_model, tmp_path, tuning, accumulation, soak):
    # How an update is split changes no bit of ours (test_dpo_trainer.py): here it is TRL's.
    if not soak and (tuning, accumulation) not in SHORT:
        pytest.skip("one of the long forms: make soak")
    updates = 20 if soak else 4
    model, tokenizer, rows = story_model
    rows = rows[: updates * PAIRS_PER_UPDATE]
    arguments = common_arguments(tmp_path, accumulation, updates)
    peft_config = None if tuning == "full" else lora_config(16, 32, 0.0, None)
    ours = DPOTrainer(
        copy.deepcopy(model),
        args=DPOConfig(**arguments, truncation_mode="keep_start", ref_cache=str(tmp_path / "ref")),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    torch.manual_seed(ours.args.seed)  # TRL leaves the adapter's first weights to the caller
    theirs = trl.DPOTrainer(
        copy.deepcopy(model),
        args=trl.DPOConfig(**arguments, precompute_ref_log_probs=tuning == "full"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=copy.deepcopy(peft_config),
    )
    ends = assert_equal_curves(ours, theirs, f"{tuning} accumulation {accumulation}", updates)
    # Per token, TRL averages the averages of its micro-batches: equal only without accumulation.
    per_token = 1e-5 if accumulation == 1 else 1e-2
    for name in ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"):
        assert ends[0][name] == pytest.approx(ends[1][name], rel=per_token), name
    assert ends[0]["num_tokens"] == ends[1]["num_tokens"]


def assert_equal_curves(ours, theirs, name, updates):
    """Train both; the metrics of the last update, ours and theirs."""
    our_curve, their_curve = curve(ours), curve(theirs)
    assert len(our_curve) == len(their_curve) == updates
    for metric in ("loss", "grad_norm"):
        pairs = zip(our_curve, their_curve, strict=True)
        worst = max(abs(a[metric] - b[metric]) / abs(b[metric]) for a, b in pairs)
        print(f"{name}: {metric} within {worst:.1e} of TRL's")
        assert worst <= BOUND, f"{metric} differs by {worst:.1e} relative"
    for metric in ("logps/chosen", "logps/rejected"):
        assert our_curve[-1][metric] == pytest.approx(their_curve[-1][metric], rel=1e-5), metric
    for metric in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
        assert our_curve[-1][metric] == pytest.approx(their_curve[-1][metric], abs=1e-4), metric
    return our_curve[-1], their_curve[-1]


def both(model, tokenizer, rows, folder, updates, **options):
    """Our trainer and TRL's, of copies of one model."""
    arguments = common_arguments(folder, 1, updates) | options
    ours = DPOTrainer(
        copy.deepcopy(model),
        args=DPOConfig(**arguments, truncation_mode="keep_start", ref_cache=str(folder / "ref")),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    theirs = trl.DPOTrainer(
        copy.deepcopy(model),
        args=trl.DPOConfig(**arguments, precompute_ref_log_probs=not isinstance(model, PeftModel)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return ours, theirs


def test_an_sft_adapter_as_start_and_reference_equals_trl(story_model, tmp_path, soak):
    updates = 15 if soak else 3
    model, tokenizer, rows = story_model
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(model), lora_config(8, 16, 0.0, None))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    ours, theirs = both(adapted, tokenizer, rows[: updates * PAIRS_PER_UPDATE], tmp_path, updates)
    assert ours.reference.reference.adapter is not None, "a frozen copy, as TRL's `ref` adapter"
    assert_equal_curves(ours, theirs, "SFT adapter", updates)


def test_conversations_equal_trl(shared_data, tmp_path, soak):
    updates = 15 if soak else 2
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "minimind_chatml")
    found = read_rows(str(shared_data / "prefs/norm/llamafactory_dpo_en_demo_conv.jsonl"))
    rows = [dict(row) for row in found.rows if len(str(row)) < 1500]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    pairs = rows[: updates * PAIRS_PER_UPDATE]
    ours, theirs = both(model, tokenizer, pairs, tmp_path, updates, num_train_epochs=20)
    assert_equal_curves(ours, theirs, "conversations", updates)
