"""Small runs that are stopped, killed and resumed: a tiny model, 6 updates, dropout on."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.modeling.adapters import lora_config
from tests.tiny_trainer import TOKENIZER, preference_rows

CONFIG = LlamaConfig(
    vocab_size=288, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
    bos_token_id=256, eos_token_id=257,
)  # fmt: skip
ROWS = preference_rows(12)
ADAPTER = "adapter_model.safetensors"


class Fault(TrainerCallback):
    """Calls `what` at the end of the update that it is for."""

    def __init__(self, update, what):
        self.update, self.what = update, what

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.update:
            self.what()


def build(
    output_dir, callbacks=(), rows=ROWS, eval_rows=None, tuning="lora", base_seed=0, **options
):
    """A trainer of 6 updates of 2 pairs, dropout on, a checkpoint every second update."""
    torch.manual_seed(base_seed)
    arguments = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "ref_cache": "off",
        "report_to": "none",
        "num_train_epochs": 1,
    }
    return DPOTrainer(
        AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG)),  # a trainer writes into it
        args=DPOConfig(**arguments | options),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=TOKENIZER,
        callbacks=list(callbacks),
        peft_config=lora_config(4, 8, 0.1, None) if tuning == "lora" else None,
    )


def adapter_of(folder):
    return (folder / ADAPTER).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The output folder of a run that nothing disturbed, a checkpoint at each update."""
    output_dir = tmp_path_factory.mktemp("whole")
    build(output_dir, save_steps=1).train()
    return output_dir


def checkpoint_names(output_dir):
    return sorted(path.name for path in output_dir.glob("checkpoint-*"))
