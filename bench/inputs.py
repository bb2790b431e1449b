"""What is measured on: generators of hidden states and of preference batches.

Everything is a function of a seed. The lengths of synthetic pairs are drawn from `lengths.json`, a
histogram of real pairs: the 300 of LLaMA-Factory's English DPO demo (multi-turn, contents joined)
and the 1,100 of rasbt's instruction preferences, tokenised with GPT-2's tokenizer, in bins of 32
tokens of (prompt, chosen, rejected) jointly. `python -m bench.inputs FOLDER` counts them again.
"""

import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.harness import ROOT, SEED

LENGTHS = Path(__file__).with_name("lengths.json")
LENGTH_SETS = ("llamafactory_dpo_en_demo_conv.jsonl", "rasbt_alpaca_pref.jsonl")
BIN_TOKENS = 32

SHARED_DATA = ROOT.parent / "shared" / "data"
STORY_MODEL = SHARED_DATA / "hf" / "stories260K"
STORY_PAIRS = SHARED_DATA / "prefs" / "tinystories" / "ts_happy_onpolicy_train.jsonl"


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
    return {
        "mean_top1_probability": round(top1 / count, 4),
        "entropy_nat": round(entropy / count, 3),
    }


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


def story_model_or(size: str) -> str:
    """The real tiny model where it lies beside the checkout, else a random one."""
    return "stories260K" if STORY_MODEL.is_dir() else size


def count_lengths(folder: Path) -> dict[str, Any]:
    """The histogram of the real sets in `folder`."""
    from transformers import AutoTokenizer

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
