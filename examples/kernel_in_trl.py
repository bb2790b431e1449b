"""fastdpo's log-probs in TRL's DPOTrainer and SFTTrainer: one name replaced.

    python examples/kernel_in_trl.py                     # a tiny random Llama, 9 s on two cores
    python examples/kernel_in_trl.py --model Qwen/Qwen3-0.6B

Both trainers of TRL 1.16 score tokens through `trl.trainer.utils._ChunkedLogProbFunction.apply`,
a private name, for which no public setting exists: with another version, look there first.
Trains LoRA twice from the same weights with each trainer, and prints both losses.
"""

import argparse
import copy
import tempfile
from unittest import mock

import torch
import trl.trainer.utils
from datasets import Dataset
from fastdpo_kernels import linear_logprobs
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

EXTRAS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TEXT = {"prompt": "which way ?", "chosen": " left , please", "rejected": " right , who knows"}


class KernelLogprobs:  # free of gradient in the entropy, which both trainers only log
    @staticmethod
    def apply(states, weight, bias, targets, temperature, _chunk, softcap, logit_scale, outputs):
        requested = tuple(name for name in EXTRAS if name in outputs)
        options = {"softcap": softcap, "logit_scale": logit_scale, "temperature": temperature}
        options |= {
            "bias": bias,
            "ignore_index": None,
            "outputs": requested,
        }  # TRL has dropped rows
        found = linear_logprobs(states, weight.to(states.dtype), targets, **options)
        return found.token_logps, *(getattr(found, name) for name in EXTRAS)


def tiny_model():  # random, with a tokenizer of the few words of TEXT
    ids = dict.fromkeys(["[UNK]", "</s>", *" ".join(TEXT.values()).split()])
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(ids)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=len(ids), num_attention_heads=4, **sizes)
    special = {"eos_token": "</s>", "pad_token": "[UNK]", "tokenizer_object": words}
    return AutoModelForCausalLM.from_config(config), PreTrainedTokenizerFast(**special)


def losses_of(trainer_class, config, model, rows, tokenizer):
    torch.manual_seed(0)  # of the adapter's first weights
    data = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    trainer = trainer_class(copy.deepcopy(model), args=config, peft_config=LoraConfig(), **data)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a causal LM of the hub, or its folder")
    name, loaders = parser.parse_args(argv).model, (AutoModelForCausalLM, AutoTokenizer)
    model, tokenizer = [cls.from_pretrained(name) for cls in loaders] if name else tiny_model()
    common = {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no"}
    pairs = [TEXT, TEXT | {"chosen": " left", "rejected": " right"}] * 16
    texts = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    results = {}
    for trainer, config, rows in ((DPOTrainer, DPOConfig, pairs), (SFTTrainer, SFTConfig, texts)):
        run = (trainer, config(tempfile.mkdtemp(), bf16=False, **common), model, rows, tokenizer)
        usual = losses_of(*run)
        # Changed: this one name. In a script of your own, assign it once at the top.
        with mock.patch.object(trl.trainer.utils, "_ChunkedLogProbFunction", KernelLogprobs):
            results[trainer.__name__] = usual, losses_of(*run)
    for name, losses in results.items():
        for one, other in zip(*losses, strict=True):
            print(f"{name}  usual {one:.6f}  kernel {other:.6f}")
    return results


if __name__ == "__main__":
    main()
