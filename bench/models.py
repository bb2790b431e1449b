"""The models that are trained: the real tiny one, and random Llamas of known shapes."""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from bench.harness import SEED
from bench.inputs import STORY_MODEL, STORY_PAIRS, pair_lengths, word_rows
from bench.real import load_real
from bench.synthetic import aliased_config, random_model
from fastdpo.options import MODEL_ALIASES

MODEL_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5,
             "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512},
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
              "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 16384},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
}  # fmt: skip
"""Shapes of random Llamas: of stories260K, one for the CPU, of Llama-3.2-1B and Llama-2-7B."""


@cache
def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerBase:
    """A tokenizer of one token a word, so that rows are as long as they are said to be."""
    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, vocabulary))]
    words = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="</s>",
    )  # fmt: skip


def random_llama(size: str, *, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A Llama of one of `MODEL_SIZES` with random weights."""
    torch.manual_seed(SEED)
    config = LlamaConfig(**MODEL_SIZES[size], max_position_embeddings=131072)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def model_and_rows(
    case: Mapping[str, Any],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[dict]]:
    """The model, tokenizer and `rows` preference rows of a case.

    Its `model` is "stories260K", which brings its real pairs, one of `MODEL_SIZES`, or an alias,
    whose config is bundled; a case with a `folder` takes the real model there, with real pairs.
    Synthetic pairs are all `pair_tokens` long, or as `ladder_tokens` says one by one (half prompt,
    a quarter each completion), or drawn from the histogram.
    """
    if "folder" in case:
        return load_real(case, case.get("seed", SEED))
    dtype, device = getattr(torch, case["dtype"]), case["device"]
    if case["model"] == "stories260K":
        tokenizer = AutoTokenizer.from_pretrained(STORY_MODEL)
        tokenizer.eos_token = tokenizer.pad_token = "<s>"
        model = AutoModelForCausalLM.from_pretrained(STORY_MODEL, dtype=dtype).to(device)
        with STORY_PAIRS.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        wanted = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows]
        return model, tokenizer, (wanted * -(-case["rows"] // len(wanted)))[: case["rows"]]
    if case["model"] in MODEL_ALIASES:
        config = aliased_config(case["model"], **case.get("config", {})).get_text_config()
        four_bit = case.get("load_in_4bit", False)
        model = random_model(config, dtype=dtype, device=device, load_in_4bit=four_bit)
    else:
        model = random_llama(case["model"], dtype=dtype, device=device)
    vocabulary = model.config.vocab_size
    if "pair_tokens" in case or "ladder_tokens" in case:
        wanted = case.get("ladder_tokens") or [case["pair_tokens"]] * case["rows"]
        lengths = [[t - t // 4 * 2, t // 4 - 1, t // 4 - 1] for t in wanted]  # and each an eos
    else:
        lengths = pair_lengths(case["rows"], longest=case.get("longest_row_tokens"))
    return model, word_tokenizer(vocabulary), word_rows(lengths, vocabulary)
