"""Hybrid models: packed with a shared prompt, and padded, which is what they had to be before.

Forward and backward of all weights of a small stack of random weights; tokens a pair, seconds and
CPU seconds. On CUDA with flash-linear-attention first one update of a Qwen3.5 shape beside TRL's.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench import step
from bench.contest import Turns, contest
from bench.harness import MEASURED, MISSING, SEED, Recorder
from bench.layers import CONTENDERS, STACKS, groups_of
from bench.measuring import Stopwatch
from fastdpo.batching import pack_update
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.logprobs import packed_logprobs

SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
LINEAR = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {
        "layer_types": LINEAR, "head_dim": 32, "linear_num_key_heads": 4,
        "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "mamba", "mamba", "attention"], "mamba_n_heads": 8,
        "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 32, "num_local_experts": 0,
        "shared_intermediate_size": 256,
    },
    "lfm2": {
        "layer_types": ["conv", "conv", "conv", "full_attention"], "conv_L_cache": 3,
        "block_ff_dim": 256, "block_auto_adjust_ff_dim": False,
    },
}  # fmt: skip
"""Three layers that carry a state to one of full attention, as most hybrids have them."""

BESIDE_TRL = ("fastdpo", "trl accumulation 4", "trl")
"""Contenders of `bench.step`."""


def contend(case: Mapping[str, Any], turns: Turns) -> None:
    """One contender; each turn is one step."""
    torch.manual_seed(SEED)
    device, chosen = torch.device(case["device"]), CONTENDERS[case["contender"]]
    sizes = SIZES | {"vocab_size": STACKS[case["device"]]["vocab_size"]}
    config = AutoConfig.for_model(case["model"], **sizes | MODELS[case["model"]])
    model = AutoModelForCausalLM.from_config(config).to(device).train()
    groups = groups_of(case)
    made = pack_update(groups, case["micro_batch_tokens"], **chosen["layout"])
    micro_batches = [micro_batch.to(device) for micro_batch in made]
    turns.ready({"tokens": sum(micro_batch.input_ids.numel() for micro_batch in made)})
    watch = Stopwatch(device)

    def step() -> None:
        model.zero_grad()
        with packed_attention(model.config, chosen["attention"]):
            for micro_batch in micro_batches:
                packed_logprobs(model, micro_batch).logps.sum().backward()

    for _ in turns:
        turns.answer(watch.measure(step))


def beside_trl(recorder: Recorder) -> None:
    """One update of a Qwen3.5 shape with an adapter; missing without the kernels that it needs."""
    case = {
        "tuning": "lora", "checkpointing": True, "model": "qwen3.5-0.8b", "dtype": "bfloat16",
        "device": "cuda", "pairs": 16, "longest_row_tokens": 1024,
    }  # fmt: skip
    if find_spec("fla") is None:
        for each in BESIDE_TRL:
            note = "flash-linear-attention is not installed"
            recorder.add(case, each, "update_s", outcome=MISSING, note=note)
        return
    step.measure(recorder, case, BESIDE_TRL, rounds=5)


def main(recorder: Recorder, *, quick: bool) -> None:
    """A case for every model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        beside_trl(recorder)
    for name in list(MODELS)[: 1 if quick else None]:
        case = {
            "model": name, "device": device, "pairs": 8, "row_tokens": 256, "prompt_share": 0.5,
            "micro_batch_tokens": 2048,
        }  # fmt: skip
        functions = dict.fromkeys(CONTENDERS, "bench.hybrids:contend")
        given = {each: {**case, "contender": each} for each in CONTENDERS}
        rounds = 3 if quick else 7
        results = contest(functions, given, warm_up=1, rounds=rounds, alone=device == "cuda")
        for each, result in results:
            if result.outcome != MEASURED:
                recorder.add(case, each, "step_s", outcome=result.outcome, note=result.note)
                continue
            recorder.add(case, each, "step_s", result.column("wall_s"))
            recorder.add(case, each, "step_cpu_s", result.column("cpu_s"))
            tokens = result.facts["tokens"] / case["pairs"]
            recorder.add(case, each, "pair_tokens", [tokens])


if __name__ == "__main__":
    from bench.command import run

    run("hybrids")
