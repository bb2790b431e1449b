"""A tiny Llama, a byte tokenizer, random preference rows, and trainers made of them."""

import copy

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.modeling.adapters import lora_config

CONFIG = LlamaConfig(
    vocab_size=288, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    bos_token_id=256, eos_token_id=257,
)  # fmt: skip


def byte_tokenizer():
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def preference_rows(count, seed=0):
    draw = np.random.default_rng(seed)
    words = ["good", "bad", "fine", "poor", "sunny", "rainy", "calm", "loud"]

    def text(low, high):
        return " ".join(draw.choice(words, draw.integers(low, high)))

    return [
        {"prompt": f"The day was {text(1, 4)}.", "chosen": f" Good: {text(1, 6)}!",
         "rejected": f" Bad: {text(1, 6)}?"}
        for _ in range(count)
    ]  # fmt: skip


ROWS, HELD_OUT = preference_rows(35), preference_rows(11, seed=1)
TOKENIZER = byte_tokenizer()


def plain_logps(model, row, tokenizer):
    """Sum of the completion's log-probs, from logits, for chosen and rejected."""
    found = []
    for side in ("chosen", "rejected"):
        prompt = tokenizer(row["prompt"]).input_ids
        ids = tokenizer(row["prompt"] + row[side] + tokenizer.eos_token).input_ids
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits.double().log_softmax(-1)[0]
        places = range(len(prompt), len(ids))
        found.append(sum(float(logps[place - 1, ids[place]]) for place in places))
    return found


def tiny_base(config=CONFIG):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config))  # a trainer writes into it


def tiny_trainer(
    model, output_dir, *, tuning="lora", dropout=0.0, callbacks=None, rows=ROWS, held_out=HELD_OUT,
    ref_model=None, loss_function=None, **options,
):  # fmt: skip
    """A trainer of `model` itself."""
    arguments = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "linear",
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return DPOTrainer(
        model,
        ref_model=ref_model,
        args=DPOConfig(**arguments | options),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=TOKENIZER,
        callbacks=callbacks,
        peft_config=lora_config(4, 8, dropout, None) if tuning == "lora" else None,
        loss_function=loss_function,
    )


def away_from_reference(trainer):
    """The trainer, ready to train, its LoRA adapter moved so that policy and reference differ."""
    drawn = torch.Generator().manual_seed(1)
    for name, parameter in trainer.policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=drawn)
    trainer.on_before_train()
    return trainer
