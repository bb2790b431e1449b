"""What is measured on: generators of hidden states, of preference batches and of models.

Everything is a function of a seed. The lengths of synthetic pairs are drawn from `lengths.json`, a
histogram of real pairs: the 300 of LLaMA-Factory's English DPO demo (multi-turn, contents joined)
and the 1,100 of rasbt's instruction preferences, tokenised with GPT-2's tokenizer, in bins of 32
tokens of (prompt, chosen, rejected) jointly. `python -m bench.inputs FOLDER` counts them again.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from bench.harness import ROOT, SEED

LENGTHS = Path(__file__).with_name("lengths.json")
LENGTH_SETS = ("llamafactory_dpo_en_demo_conv.jsonl", "rasbt_alpaca_pref.jsonl")
BIN_TOKENS = 32

SHARED_DATA = ROOT.parent / "shared" / "data"
STORY_MODEL = SHARED_DATA / "hf" / "stories260K"
STORY_PAIRS = SHARED_DATA / "prefs" / "tinystories" / "ts_happy_onpolicy_train.jsonl"

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


@dataclass(frozen=True)
class HeadInputs:
    """What the head op is given."""

    hidden_states: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    target_ids: Tensor  # (N,) int64


def head_inputs(
    kind: str, tokens: int, hidden: int, vocabulary: int, *, dtype: torch.dtype, device: str
) -> HeadInputs:
    """Hidden states, head and targets.

    Args:
        kind: "random": states, rows of W and targets are independent, every distribution is nearly
            flat. "peaked": as in a trained model, each state points at one row of W, at some tokens
            hardly and at most strongly, and the target is drawn from the softmax.
        tokens: N.
        hidden: H.
        vocabulary: V.
        dtype: of states and head.
        device: where they lie.
    """
    draw = torch.Generator(device=device).manual_seed(SEED)
    weight = torch.randn(vocabulary, hidden, generator=draw, device=device) / math.sqrt(hidden)
    states = torch.randn(tokens, hidden, generator=draw, device=device)
    targets = torch.randint(vocabulary, (tokens,), generator=draw, device=device)
    if kind == "peaked":
        # The favourite's logit is the sharpness, the others' about N(0, 1): log V is a tie.
        sharpness = torch.rand(tokens, 1, generator=draw, device=device) * 2.0 + 0.6
        towards = weight[targets] / weight[targets].norm(dim=1, keepdim=True)
        states = states + towards * sharpness * math.log(vocabulary)
    states, weight = states.to(dtype), weight.to(dtype)
    if kind == "peaked":
        for rows in torch.arange(tokens, device=device).split(256):
            probabilities = torch.softmax(states[rows].float() @ weight.float().T, dim=1)
            targets[rows] = torch.multinomial(probabilities, 1, generator=draw).squeeze(1)
    return HeadInputs(states, weight, targets)


def peakedness(inputs: HeadInputs) -> dict[str, float]:
    """Mean probability of the likeliest token, and mean entropy in nats."""
    top1 = entropy = 0.0
    for rows in inputs.hidden_states.split(256):
        logps = torch.log_softmax(rows.float() @ inputs.weight.float().T, dim=1)
        top1 += float(logps.amax(dim=1).exp().sum())
        entropy -= float((logps.exp() * logps).sum())
    count = len(inputs.hidden_states)
    return {"mean_top1_probability": round(top1 / count, 4), "entropy_nat": round(entropy / count, 3)}


def pair_lengths(pairs: int, *, seed: int = SEED, longest: int | None = None) -> list[list[int]]:
    """Lengths (prompt, chosen, rejected) of synthetic pairs, in tokens.

    Args:
        pairs: how many.
        seed: of the draw.
        longest: cut rows of prompt and completion to this many tokens, the prompt first.
    """
    table = json.loads(LENGTHS.read_text())
    bins, counts = np.array(table["bins"]), np.array(table["counts"], dtype=float)
    draw = np.random.default_rng(seed)
    chosen = bins[draw.choice(len(bins), pairs, p=counts / counts.sum())]
    lengths = (chosen * BIN_TOKENS + draw.integers(1, BIN_TOKENS + 1, chosen.shape)).tolist()
    for triple in lengths if longest else []:
        triple[1:] = [min(length, longest - 16) for length in triple[1:]]
        triple[0] = max(8, min(triple[0], longest - max(triple[1:])))
    return lengths


def word_rows(lengths: list[list[int]], vocabulary: int, *, seed: int = SEED) -> list[dict]:
    """Preference rows of random words, one token of `word_tokenizer` each."""
    draw = np.random.default_rng(seed)
    fields = ("prompt", "chosen", "rejected")
    return [
        {
            name: ("" if name == "prompt" else " ")
            + " ".join(f"w{i}" for i in draw.integers(3, vocabulary, length))
            for name, length in zip(fields, triple, strict=True)
        }
        for triple in lengths
    ]


@cache
def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerBase:
    """A tokenizer whose every word is one token, so that rows are as long as they are said to be."""
    from tokenizers import Tokenizer, models, pre_tokenizers

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

    Its `model` is "stories260K", which brings its real pairs, or one of `MODEL_SIZES`. `pair_tokens`
    makes all synthetic pairs that long: half prompt, a quarter each completion.
    """
    dtype, device = getattr(torch, case["dtype"]), case["device"]
    if case["model"] == "stories260K":
        tokenizer = AutoTokenizer.from_pretrained(STORY_MODEL)
        tokenizer.eos_token = tokenizer.pad_token = "<s>"
        model = AutoModelForCausalLM.from_pretrained(STORY_MODEL, dtype=dtype).to(device)
        with STORY_PAIRS.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        wanted = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows]
        return model, tokenizer, (wanted * -(-case["rows"] // len(wanted)))[: case["rows"]]
    model = random_llama(case["model"], dtype=dtype, device=device)
    vocabulary = model.config.vocab_size
    if tokens := case.get("pair_tokens"):
        completion = tokens // 4
        lengths = [[tokens - 2 * completion, completion - 1, completion - 1]] * case["rows"]
    else:
        lengths = pair_lengths(case["rows"], longest=case.get("longest_row_tokens"))
    return model, word_tokenizer(vocabulary), word_rows(lengths, vocabulary)


def story_model_or(size: str) -> str:
    """The real tiny model where it lies beside the checkout, else a random one."""
    return "stories260K" if STORY_MODEL.is_dir() else size


def count_lengths(folder: Path) -> dict[str, Any]:
    """The histogram of the real sets in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizers" / "gpt2")

    def tokens(content: Any) -> int:
        turns = [content] if isinstance(content, str) else [turn["content"] for turn in content]
        return len(tokenizer("\n".join(turns))["input_ids"])

    bins: Counter[tuple[int, ...]] = Counter()
    for name in LENGTH_SETS:
        with (folder / "prefs" / "norm" / name).open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                lengths = [tokens(row[part]) for part in ("prompt", "chosen", "rejected")]
                bins[tuple(max(0, length - 1) // BIN_TOKENS for length in lengths)] += 1
    ordered = sorted(bins.items())
    return {
        "of": list(LENGTH_SETS),
        "tokenizer": "gpt2",
        "bin_tokens": BIN_TOKENS,
        "axes": ["prompt", "chosen", "rejected"],
        "bins": [list(found) for found, _ in ordered],
        "counts": [count for _, count in ordered],
    }


if __name__ == "__main__":
    LENGTHS.write_text(json.dumps(count_lengths(Path(sys.argv[1])), separators=(",", ":")) + "\n")
