"""Packed pairs and training on a CUDA device: run by `make gpu`, or `pytest -m gpu` on one."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.batching import pack_update
from fastdpo.modeling.adapters import lora_config
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.loading import load_model
from fastdpo.modeling.logprobs import packed_logprobs
from tests.modeling.test_packed_pairs import random_groups, separate
from tests.tiny_trainer import HELD_OUT, ROWS, TOKENIZER
from tests.trainer.test_dpo_trainer import training_log

pytestmark = pytest.mark.gpu

CONFIG = LlamaConfig(
    vocab_size=288, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_pairs_equal_separate_sequences(dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG).to(dtype)
    groups = random_groups()
    truth, _ = separate(copy.deepcopy(model).float(), groups)
    model = model.cuda()
    with packed_attention(model.config):
        for micro_batch in pack_update(groups, 512):
            found = packed_logprobs(model, micro_batch.to("cuda")).logps.view(-1, 2).tolist()
            for index, row in zip(micro_batch.group_indices, found, strict=True):
                bound = 1e-4 if dtype == torch.float32 else 0.05 * 20
                assert np.abs(np.array(row) - truth[index]).max() <= bound


@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
def test_training_starts_without_margin_and_learns(tmp_path, monkeypatch, tuning):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(tmp_path / "base")
    dtype = torch.float32 if tuning == "full" else torch.bfloat16
    model = load_model(str(tmp_path / "base"), dtype=dtype, load_in_4bit=tuning == "qlora")
    arguments = {"learning_rate": 5e-3 if tuning != "full" else 5e-4, "logging_steps": 1}
    arguments |= {"per_device_train_batch_size": 8, "num_train_epochs": 3, "disable_tqdm": True}
    trainer = DPOTrainer(
        model,
        args=DPOConfig(str(tmp_path / "out"), save_strategy="no", ref_cache="off", **arguments)
        if tuning != "full"
        else DPOConfig(str(tmp_path / "out"), save_strategy="no", **arguments),
        train_dataset=ROWS,
        eval_dataset=HELD_OUT,
        processing_class=TOKENIZER,
        peft_config=None if tuning == "full" else lora_config(8, 16, 0.0, None),
    )
    trainer.train()
    print(f"{tuning}: largest first margin {trainer.first_update_margin}")
    assert trainer.first_update_margin <= (0.0 if tuning != "full" else 0.05)
    assert training_log(trainer)[-1]["loss"] < 0.6
    assert trainer.evaluate()["eval_rewards/accuracies"] > 0.8
