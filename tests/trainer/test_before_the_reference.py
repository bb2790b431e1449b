"""What the options and DPOTrainer(...) refuse before the reference pass: a table in docs/faults.md.

Each row of `TABLE` is a fault with the smallest run that has it; `as_markdown` renders it.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, TrainingArguments

from fastdpo import DPOConfig, DPOTrainer
from tests.tiny_trainer import ROWS, TOKENIZER, tiny_base

DOCS = Path(__file__).parents[2] / "docs" / "faults.md"
LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


@dataclass
class Fault:
    """One fault that is known before the reference pass.

    Attributes:
        what: it is, as docs/faults.md says.
        where: it is found: "options", or "constructor", which the dry run runs too.
        words: of the message.
        error: that is raised.
        options: of DPOConfig.
        arguments: of DPOTrainer.
        model: makes the model.
        cls: the class of the trainer.
    """

    what: str
    where: str
    words: str
    error: type[Exception] = ValueError
    options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    model: Any = tiny_base
    cls: type[DPOTrainer] = DPOTrainer


def overriding(name):
    return type("Mine", (DPOTrainer,), {name: lambda self, *args, **kwargs: None})


def frozen():
    return tiny_base().requires_grad_(False)


def frozen_adapter():
    model = get_peft_model(tiny_base(), copy.deepcopy(LORA))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def adapter_inside():
    model = tiny_base()
    model.add_adapter(copy.deepcopy(LORA))
    return model


def two_active():
    model = get_peft_model(tiny_base(), copy.deepcopy(LORA))
    model.add_adapter("second", copy.deepcopy(LORA))
    model.base_model.set_adapter(["default", "second"])
    return model


def in_8_bits():
    import bitsandbytes as bnb

    model = tiny_base()
    mlp = model.model.layers[0].mlp
    mlp.up_proj = bnb.nn.Linear8bitLt(64, 128, bias=False, has_fp16_weights=False)
    return model


def with_learned_positions():
    return AutoModelForCausalLM.from_config(
        GPT2Config(n_positions=32, n_embd=32, n_layer=1, n_head=2, vocab_size=288)
    )


PEFT = {"peft_config": LORA}
TABLE = (
    Fault("a batch of 0 pairs", "options", "is 0; it must be a whole number",
          options={"per_device_train_batch_size": 0}),
    Fault("a number that is infinite or NaN", "options", "finite",
          options={"learning_rate": float("inf")}),
    Fault("a negative learning rate, betas of 1, no epochs", "options", "at least 0",
          options={"learning_rate": -1e-5}),
    Fault("arguments of a schedule whose names are no text", "options", "is no text",
          options={"lr_scheduler_kwargs": {1: 2}}),
    Fault("the dtype given twice", "options", "keep dtype",
          options={"model_init_kwargs": {"dtype": "float32", "torch_dtype": "float32"}}),
    Fault("options that are no fastdpo.DPOConfig", "constructor", "has to be a fastdpo.DPOConfig",
          TypeError, arguments={"args": TrainingArguments("x", use_cpu=True)}),
    Fault("a dict as peft_config", "constructor", r"LoraConfig\(\*\*peft_config\)", TypeError,
          arguments={"peft_config": {"r": 4}}),
    Fault("a name as processing_class", "constructor", "AutoTokenizer.from_pretrained", TypeError,
          arguments={"processing_class": "my-model"}),
    Fault("a model that is none of transformers'", "constructor", "model is a torch", TypeError,
          model=lambda: torch.nn.Linear(2, 2)),
    Fault("a method that is overridden and never called", "constructor", "pass loss_function",
          TypeError, cls=overriding("compute_loss")),
    Fault("an optimizer whose package is missing", "constructor", "--optim is stable_adamw",
          options={"optim": "stable_adamw"}),
    Fault("an optimizer that steps within the backward", "constructor", "--optim lomo cannot work",
          options={"optim": "lomo"}),
    Fault("an optimizer over other tensors than the model's", "constructor", "no parameters of the",
          arguments={"optimizers": (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), None)}),
    Fault("optimizer arguments that cannot be read", "constructor", "name=value",
          options={"optim_args": "rank"}),
    Fault("a schedule that does not take its arguments", "constructor", "min_lr",
          options={"lr_scheduler_type": "cosine_with_min_lr",
                   "lr_scheduler_kwargs": {"min_lr": "1e-6"}}),
    Fault("a tracker that is not installed", "constructor", "--report_to is neptune",
          options={"report_to": "neptune"}),
    Fault("a folder for the reference that cannot be written", "constructor", "--ref_cache off",
          options={"ref_cache": "/dev/null/store"}),
    Fault("nothing that is trained", "constructor", r"is_trainable=True", model=frozen_adapter),
    Fault("a model that is frozen as a whole", "constructor", "requires_grad_", model=frozen),
    Fault("an adapter of model.add_adapter", "constructor", "get_peft_model", model=adapter_inside),
    Fault("two active adapters", "constructor", "set_adapter", model=two_active),
    Fault("an adapter that takes a part of the base", "constructor", "init_lora_weights is 'pissa'",
          arguments={"peft_config": LoraConfig(r=2, init_lora_weights="pissa")}),
    Fault("a kind of adapter that works outside its layers", "constructor", "activated LoRA",
          arguments={"peft_config": LoraConfig(alora_invocation_tokens=[1, 2])}),
    Fault("weights quantized otherwise than in 4 bits", "constructor", "8 bits by bitsandbytes",
          model=in_8_bits, arguments=PEFT),
    Fault("sequences beyond the model's learned positions", "constructor", "--max_length 32",
          model=with_learned_positions),
    Fault("fewer pairs than an update, and drop_last", "constructor", "leave no update",
          options={"dataloader_drop_last": True, "per_device_train_batch_size": 64}),
)  # fmt: skip


def as_markdown():
    """The table of docs/faults.md."""
    words = {"options": "DPOConfig, command line, YAML", "constructor": "DPOTrainer, --dry_run"}
    rows = [f"| {fault.what} | {words[fault.where]} |" for fault in TABLE]
    return "\n".join(["| fault | found by |", "|---|---|", *rows]) + "\n"


def config_of(fault, tmp_path):
    options = {"report_to": "none", "use_cpu": True, "bf16": False, **fault.options}
    return DPOConfig(str(tmp_path / "out"), **options)


@pytest.mark.parametrize("fault", TABLE, ids=lambda fault: fault.what)
def test_a_fault_is_found_before_the_reference_pass(fault, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    if fault.where == "options":
        with pytest.raises(fault.error, match=fault.words):
            config_of(fault, tmp_path)
        return
    arguments = {
        "args": config_of(fault, tmp_path),
        "train_dataset": ROWS[:4],
        "processing_class": TOKENIZER,
    }
    model = fault.model()
    with pytest.raises(fault.error, match=fault.words):
        fault.cls(model, **arguments | fault.arguments)
    assert not (tmp_path / "cache").exists()


def test_the_page_holds_the_table():
    assert as_markdown() in DOCS.read_text()
