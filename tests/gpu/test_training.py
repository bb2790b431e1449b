"""Whole runs on a CUDA device: planned and rehearsed, in fp16, out of memory."""

import gc

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.batching import PromptGroup
from fastdpo.modeling.adapters import lora_config
from fastdpo.modeling.layout import ExecutionLayout
from fastdpo.modeling.scoring import score_pairs
from tests.gpu.test_updates import CONFIG
from tests.tiny_trainer import HELD_OUT, ROWS, TOKENIZER
from tests.trainer.test_dpo_trainer import training_log

pytestmark = pytest.mark.gpu


def trainer_of(folder, *, tuning="lora", dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    arguments = {"per_device_train_batch_size": 8, "max_steps": 6, "logging_steps": 1}
    arguments |= {"learning_rate": 1e-3, "disable_tqdm": True, "save_strategy": "no"}
    return DPOTrainer(
        AutoModelForCausalLM.from_config(CONFIG, dtype=dtype).cuda(),
        args=DPOConfig(str(folder), **arguments | options),
        train_dataset=ROWS,
        eval_dataset=HELD_OUT,
        processing_class=TOKENIZER,
        peft_config=lora_config(8, 16, 0.0, None) if tuning == "lora" else None,
    )


RUNS = {
    "coupled": {"loss_type": "aot"},
    "length-desensitised": {"ld_alpha": 0.5},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "moving reference, all weights": {
        "tuning": "full", "dtype": torch.float32, "sync_ref_model": True, "ref_model_sync_steps": 2,
    },
    "fp16": {"tuning": "full", "dtype": torch.float32, "fp16": True, "bf16": False},
    "no autocast": {"tuning": "full", "dtype": torch.float32, "bf16": False},
}  # fmt: skip


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS.keys())
def test_a_planned_run(tmp_path, monkeypatch, caplog, options):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    caplog.set_level("INFO")
    trainer = trainer_of(tmp_path / "out", **options)
    assert trainer.plan is not None
    trainer.train()
    assert "The fullest micro-batch fits" in caplog.text
    losses = [line["loss"] for line in training_log(trainer)]
    assert len(losses) == 6
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_a_pass_without_gradients_survives_a_real_lack_of_memory(caplog):
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).cuda()
    draw = np.random.default_rng(0)
    sizes = [(300, 100, 90)] * 200
    groups = []
    for prompt, chosen, rejected in sizes:
        ids = draw.integers(0, 288, prompt + chosen + rejected).astype(np.int32)
        parts = np.split(ids, [prompt, prompt + chosen])
        groups.append(PromptGroup(parts[0], (parts[1], parts[2])))
    expected = score_pairs(model, groups, ExecutionLayout(2048))
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    bound = torch.cuda.memory_allocated() + 100 * 2**20
    torch.cuda.set_per_process_memory_fraction(bound / total)
    try:
        found = score_pairs(model, groups, ExecutionLayout(100_000))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Out of memory" in caplog.text
    assert np.abs(found.logps - expected.logps).max() <= 2.0, "bfloat16 in other company"
