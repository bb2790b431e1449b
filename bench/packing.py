"""How full packed rows are, and how many tokens a pair costs against padding: arithmetic only.

On the lengths of real pairs: the sets of the folder of real inputs where it lies beside the
checkout, tokenised with GPT-2's tokenizer, else the histogram in `lengths.json`. Padding is kind:
pairs sorted by length, as many rows as T holds. `pair_tokens` is what the rows of an update hold,
filler and padding too, by pair.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import SEED, Recorder, spread
from bench.inputs import SHARED_DATA, pair_lengths
from fastdpo.batching import MicroBatch, PromptGroup, pack_update

SETS = {
    "stories": "prefs/tinystories/ts_happy_onpolicy_train.jsonl",
    "llamafactory": "prefs/norm/llamafactory_dpo_en_demo_conv.jsonl",
    "rasbt": "prefs/norm/rasbt_alpaca_pref.jsonl",
}
TOKENS = (2048, 4096, 8192)
PAIRS = (8, 32, 128)
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Bounds of the bins of prompt share: the prompt's part of both rows, unshared."""

CONTENDERS: dict[str, dict[str, Any]] = {
    "fastdpo": {},
    "fastdpo unshared": {"shared_prefix": False},
    "padded": {"packing": False},
}


def real_groups(folder: Path = SHARED_DATA) -> dict[str, list[PromptGroup]]:
    """The pairs of every set and of all; without the folder, random ones as long as real ones."""
    if not folder.is_dir():
        draw = np.random.default_rng(SEED)
        return {"histogram": [_random_group(draw, lengths) for lengths in pair_lengths(1400)]}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizers" / "gpt2")
    tokenizer.model_max_length = 10**9

    def tokens(content: Any) -> np.ndarray:
        text = content if isinstance(content, str) else "\n".join(t["content"] for t in content)
        return np.array(tokenizer(text)["input_ids"] or [0], dtype=np.int32)

    sets: dict[str, list[PromptGroup]] = {}
    for name, path in SETS.items():
        with (folder / path).open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        sets[name] = [
            PromptGroup(tokens(row["prompt"]), (tokens(row["chosen"]), tokens(row["rejected"])))
            for row in rows
            if row["chosen"] != row["rejected"]
        ]
    return sets | {"all": [group for groups in sets.values() for group in groups]}


def _random_group(draw: np.random.Generator, lengths: Sequence[int]) -> PromptGroup:
    prompt, *completions = (draw.integers(0, 50257, n, dtype=np.int32) for n in lengths)
    return PromptGroup(prompt, tuple(completions))


def updates_of(groups: Sequence[PromptGroup], pairs: int, count: int) -> list[list[PromptGroup]]:
    """Updates of so many pairs, drawn without replacement where there are enough."""
    draw = np.random.default_rng(SEED)
    picks = (draw.choice(len(groups), pairs, replace=len(groups) < pairs) for _ in range(count))
    return [[groups[i] for i in pick] for pick in picks]


def cells(micro_batches: Sequence[MicroBatch]) -> int:
    """What the rows hold, filler and padding too."""
    return sum(m.input_ids.numel() for m in micro_batches)


def fill(micro_batches: Sequence[MicroBatch]) -> float:
    """Real tokens over all."""
    return sum(m.num_tokens for m in micro_batches) / cells(micro_batches)


def prompt_share(group: PromptGroup) -> float:
    """The prompt's part of the tokens of all rows."""
    prompts = len(group.completions) * len(group.prompt_ids)
    return prompts / (prompts + sum(map(len, group.completions)))


def main(recorder: Recorder, *, quick: bool) -> None:
    """Fill by set, T and B; tokens a pair by prompt share."""
    sets = real_groups()
    for name, groups in sets.items():
        for tokens in TOKENS[:1] if quick else TOKENS:
            for pairs in PAIRS:
                case = {"set": name, "micro_batch_tokens": tokens, "pairs": pairs}
                updates = updates_of(groups, pairs, 4 if quick else 20)
                for contender, layout in CONTENDERS.items():
                    laid = [pack_update(update, tokens, **layout) for update in updates]
                    recorder.add(case, contender, "fill_relative", [fill(m) for m in laid])
                    costs = [cells(m) / pairs for m in laid]
                    recorder.add(case, contender, "pair_tokens", costs)
    pool = sets.get("all", next(iter(sets.values())))
    for low, high in pairwise(SHARES):
        some = [group for group in pool if low <= prompt_share(group) < high]
        if len(some) < 32:
            continue
        case = {"share_from": low, "share_to": high, "micro_batch_tokens": 8192, "pairs": 32}
        updates = updates_of(some, 32, 4 if quick else 20)
        costs = {
            contender: [cells(pack_update(update, 8192, **layout)) / 32 for update in updates]
            for contender, layout in CONTENDERS.items()
        }
        for contender, cost in costs.items():
            ratio = spread(costs["padded"])[1] / spread(cost)[1]
            recorder.add(case, contender, "pair_tokens", cost, note=f"padded / this: {ratio:.2f}")


if __name__ == "__main__":
    from bench.command import run

    run("packing")
