"""TRL's cache of reference log-probs beside ours: two options changed, who computes, who is right?

    python -m bench.trl_reference_cache

1. Only learning_rate changes: nothing that a reference log-prob depends on. TRL computes all of
   them again; we find them.
2. Only ld_alpha changes (max_length none): what a stored sum of LD-DPO depends on. TRL finds the
   old sums and trains on them; from our token log-probs any alpha is formed exactly.
"""

import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

PAIRS = 24
CONFIG = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def model() -> Any:
    """The same weights every time."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG)).eval()


def write_pairs(path: Path) -> None:
    """Pairs whose completions differ in length, so that ld_alpha matters."""
    draw = np.random.default_rng(0)
    words = ["good", "bad", "fine", "sunny", "calm", "loud"]

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice(words, draw.integers(low, high)))

    rows = [
        {
            "prompt": f"Day: {text(1, 4)}.",
            "chosen": f" {text(4, 9)}!",
            "rejected": f" {text(1, 4)}?",
        }
        for _ in range(PAIRS)
    ]
    Dataset.from_list(rows).to_json(path)


def with_trl(folder: Path, **options: Any) -> tuple[int, np.ndarray]:
    """(pairs whose reference was computed, (n, 2) reference log-probs it would train on)."""
    import trl

    computed = 0

    class Counting(trl.DPOTrainer):
        def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
            nonlocal computed
            computed += len(inputs["input_ids"]) // 2
            return super().compute_ref_log_probs(model, inputs)

    rows = load_dataset(
        "json", data_files=str(folder / "pairs.jsonl"), cache_dir=str(folder / "hf"), split="train"
    )
    config = trl.DPOConfig(
        output_dir=str(folder / "trl"), precompute_ref_log_probs=True, report_to="none",
        use_cpu=True, bf16=False, per_device_train_batch_size=4, **options,
    )  # fmt: skip
    trainer = Counting(model(), args=config, train_dataset=rows, processing_class=tokenizer())
    columns = ("ref_chosen_logps", "ref_rejected_logps")
    return computed, np.stack([np.array(trainer.train_dataset[c]) for c in columns], axis=1)


def with_fastdpo(folder: Path, **options: Any) -> tuple[int, np.ndarray, Any]:
    """(pairs computed for use, (n, 2) sums, the trainer)."""
    from fastdpo import DPOConfig, DPOTrainer
    from fastdpo.modeling.adapters import lora_config
    from fastdpo.ref_cache import compute

    computed, real = 0, compute.score_groups

    def score_groups(model: Any, groups: Any, **given: Any) -> Any:
        nonlocal computed
        computed += len(groups)
        return real(model, groups, **given)

    compute.score_groups = score_groups
    try:
        trainer = DPOTrainer(
            model(),
            args=DPOConfig(
                str(folder / "ours"), ref_cache=str(folder / "store"), use_cpu=True,
                report_to="none", disable_tqdm=True, **options,
            ),
            train_dataset=load_dataset(
                "json", data_files=str(folder / "pairs.jsonl"), split="train",
                cache_dir=str(folder / "hf"),
            ),
            processing_class=tokenizer(),
            peft_config=lora_config(4, 8, 0.0, None),
        )  # fmt: skip
        trainer.compute_references()
    finally:
        compute.score_groups = real
    return computed, np.array(trainer.train_groups.ref_logps), trainer


def length_desensitised(trainer: Any, alpha: float) -> np.ndarray:
    """(n, 2) sums of LD-DPO from the stored token log-probs: the tail beyond the shorter x alpha.

    Source: arXiv:2409.06411.
    """
    from fastdpo.ref_cache.store import group_keys

    store = trainer.reference.store(trainer.reference.folder)
    sums = []
    for group in trainer.train_groups:
        both = [tokens.astype(np.float64) for tokens in store.token_logps(group_keys(group))]
        shared = min(map(len, both))
        sums.append([t[:shared].sum() + alpha * t[shared:].sum() for t in both])
    return np.array(sums)


def main() -> None:
    """Both experiments, one line each and library."""
    logging.getLogger("fastdpo").setLevel(logging.WARNING)
    report: list[str] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder / "pairs.jsonl")
        for rate in (1e-6, 2e-6):
            theirs, _ = with_trl(folder, learning_rate=rate, max_length=200)
            ours, _, _ = with_fastdpo(folder, learning_rate=rate, max_length=200)
            report.append(
                f"learning_rate {rate:g}: TRL computed {theirs} of {PAIRS} pairs, ours {ours}"
            )
        alphas = (1.0, 0.5)
        found = [with_trl(folder, ld_alpha=alpha, max_length=None) for alpha in alphas]
        with TemporaryDirectory() as other:  # without a cache: what TRL itself thinks is right
            fresh = Path(other)
            write_pairs(fresh / "pairs.jsonl")
            _, right = with_trl(fresh, ld_alpha=alphas[1], max_length=None)
        ours = [with_fastdpo(folder, max_length=None) for _ in alphas]
        ld = length_desensitised(ours[1][2], alphas[1])
        report += [
            f"ld_alpha {alphas[0]:g} -> {alphas[1]:g}, max_length none: TRL computed "
            f"{found[0][0]}, then {found[1][0]} of {PAIRS} pairs; its sums at {alphas[1]:g} are up "
            f"to {np.abs(found[1][1] - right).max():.3f} nats from what TRL computes without cache",
            f"ours computed {ours[0][0]}, then {ours[1][0]}; its sums at {alphas[1]:g} are up to "
            f"{np.abs(ld - right).max():.2g} nats from them",
        ]
    print("\n".join(report))


if __name__ == "__main__":
    main()
