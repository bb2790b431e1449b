"""A frozen base in host memory: which pairs fit with it by plan, and what its way to the GPU costs.

The first part needs no GPU: the longest pair and the pinned memory that `fastdpo.planner` predicts
for six models on six sizes of GPU, by the way to hold the base. On CUDA follow updates with the
base in host memory and on the GPU in turns, everything else the same, at several T: seconds,
tokens/s, and peak memory beside the prediction; then GB/s of the copies alone. On the CPU a toy
runs through all of it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from bench.contest import Turns, solo
from bench.harness import OUT_OF_MEMORY, SEED, Recorder
from bench.measuring import MIB, PeakMemory, Stopwatch
from bench.memory import TOY
from bench.qlora import adam, one_pair, update
from bench.synthetic import aliased_config, random_model
from bench.trainers import LORA_ALPHA, LORA_RANK
from fastdpo.modeling.activations import RECOMPUTE
from fastdpo.modeling.adapters import add_adapter, lora_config
from fastdpo.modeling.base_weights import weights_to_host
from fastdpo.modeling.fused import choose_kernels
from fastdpo.modeling.host_blocks import LEAST_BUFFERS, Copies, HostBlock
from fastdpo.modeling.layout import ExecutionLayout
from fastdpo.plan import BASES
from fastdpo.planner import (
    Architecture,
    Training,
    Workload,
    architecture_named,
    architecture_of,
    gpu_spec,
    longest_pair,
    training_of,
)
from fastdpo.planner.architecture import architecture_of_config
from fastdpo.planner.memory_layout import MemoryLayout, MemoryStrategy
from fastdpo.planner.terms import GIB, resolve_backends

CONTENDER = "bench.base_weights:contend"
UPDATES = 3
"""At each T; the first is not counted."""

ALIASES = ("llama-3.2-3b", "llama-3.1-8b", "qwen3-8b", "gemma-3-12b")
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen2.5-32b": Qwen2Config(
        vocab_size=152064, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
        num_attention_heads=40, num_key_value_heads=8,
    ),
    "llama-3.1-70b": LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8,
    ),
}  # fmt: skip
GPUS_GIB = (8, 12, 16, 24, 48, 80)
HOST_GIB = 64
"""Most pinned memory in the table: a host of about 110 GiB by the planner's share."""

COPIES_BYTES = 2**28


def architectures() -> dict[str, Architecture]:
    """The six models of the table, by name."""
    found = {alias: architecture_named(alias) for alias in ALIASES}
    return found | {name: architecture_of_config(CONFIGS[name], name) for name in CONFIGS}


def table(recorder: Recorder, *, gpus_gib: tuple[int, ...] = GPUS_GIB) -> None:
    """The longest pair of every model, GPU and way to hold the base: predictions."""
    for name, architecture in architectures().items():
        for gpu_gib in gpus_gib:
            case = {"model": name, "gpu_gib": gpu_gib, "host_gib": HOST_GIB}
            for way, (tuning, base_weights) in BASES.items():
                best = longest_pair(
                    architecture,
                    Training(tuning),
                    gpu_spec(str(gpu_gib)),
                    host_bytes=HOST_GIB * GIB,
                    change_optimizer=False,
                    base_weights=base_weights,
                )
                contender = f"plan, {way}"
                if best is None:
                    note = f"by plan: more than the GPU, or than {HOST_GIB} GiB of the host"
                    recorder.add(
                        case, contender, "longest_row_tokens", outcome=OUT_OF_MEMORY, note=note
                    )
                    continue
                note = f"{best.pinned_host_bytes / GIB:.1f} GiB pinned"
                tokens = [best.micro_batch_tokens // 2]
                recorder.add(case, contender, "longest_row_tokens", tokens, note=note)


def contend(case: Mapping[str, Any], turns: Turns) -> None:
    """`UPDATES` updates at each of the case's T, all layers recomputed; the facts are predictions.

    The case: model, config, dtype, device, load_in_4bit, base_weights, micro_batch_tokens (a list).
    """
    device, on_host = torch.device(case["device"]), case["base_weights"] == "host"
    base = random_model(
        aliased_config(case["model"], **case["config"]), dtype=getattr(torch, case["dtype"]),
        device=case["device"], load_in_4bit=case["load_in_4bit"],
    )  # fmt: skip
    if on_host:
        weights_to_host(base, device)
    torch.manual_seed(SEED)
    model = add_adapter(base, lora_config(LORA_RANK, LORA_ALPHA, 0.0, None)).train()
    architecture = architecture_of(model, case["model"])
    strategy = MemoryStrategy("adamw_torch_fused", base_buffers=LEAST_BUFFERS if on_host else 0)
    capability = gpu_spec("24").capability
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability()
    training = resolve_backends(architecture, training_of(model, strategy.optimizer), capability)
    plan = (RECOMPUTE,) * architecture.layers
    predicted = {
        tokens: MemoryLayout(
            architecture, training, Workload(tokens, tokens).shape(tokens), strategy
        ).peak(plan)
        for tokens in case["micro_batch_tokens"]
    }
    ExecutionLayout(
        max(predicted), plan, base_buffers=strategy.base_buffers,
        kernels=choose_kernels(model, "auto"),
    ).apply(model)  # fmt: skip
    optimizer = adam(model, strategy.optimizer)
    watch, memory = Stopwatch(device), PeakMemory(device)
    turns.ready({"predicted_mib": {str(t): size / MIB for t, size in predicted.items()}})
    lengths = iter([tokens for tokens in predicted for _ in range(UPDATES)])
    for _ in turns:
        tokens = next(lengths)
        pair = one_pair(tokens // 2, tokens).to(device)
        memory.start()
        watch.start()
        loss = update(model, pair, optimizer)
        found = watch.stop() | memory.over_start() | {"loss": loss, "tokens": tokens}
        if device.type == "cuda":
            found["peak_mib"] = torch.cuda.max_memory_allocated() / MIB
        turns.answer(found)


def updates(recorder: Recorder, case: Mapping[str, Any]) -> None:
    """Updates of one case with the base in host memory and on the device, at each T."""
    lengths = case["micro_batch_tokens"]
    common = {name: value for name, value in case.items() if name != "micro_batch_tokens"}
    for where in ("host", "gpu"):
        contender = f"base on {where}"
        result = solo(CONTENDER, {**case, "base_weights": where}, turns=UPDATES * len(lengths))
        for index, tokens in enumerate(lengths):
            at = {**common, "micro_batch_tokens": tokens}
            done = result.turns[index * UPDATES : (index + 1) * UPDATES]
            if len(done) < UPDATES:
                outcome, note = result.outcome, result.note
                recorder.add(at, contender, "update_s", outcome=outcome, note=note)
                continue
            taken = [turn["wall_s"] for turn in done[1:]]
            recorder.add(at, contender, "update_s", taken)
            recorder.add(at, contender, "useful_tokens_per_s", [tokens / each for each in taken])
            recorder.add(at, contender, "peak_mib", [turn["peak_mib"] for turn in done[1:]])
            predicted = [result.facts["predicted_mib"][str(tokens)]]
            recorder.add(at, f"plan, {contender}", "peak_mib", predicted)


def copies(recorder: Recorder, device: torch.device, size: int, *, repeats: int = 8) -> None:
    """The rate of copies from a pinned block to the device, one after another."""
    block, target = HostBlock(size, device), torch.empty(size, dtype=torch.uint8, device=device)
    line, watch, rates = Copies(device), Stopwatch(device), []
    for _ in range(repeats):
        watch.start()
        line.wait(line.start(target, block.memory))
        rates.append(size / 1e9 / watch.stop()["wall_s"])
    case = {"device": device.type, "block_mib": size // 2**20}
    recorder.add(case, "copies from host memory", "copied_gb_per_s", rates[1:])


def main(recorder: Recorder, *, quick: bool) -> None:
    """The cost of the way to the GPU, then the table of plans; on the CPU a toy."""
    common: dict[str, Any] = {"model": "llama-3.1-8b"}
    if torch.cuda.is_available():
        common |= {"config": {"num_hidden_layers": 16}, "dtype": "bfloat16", "device": "cuda"}
        common["micro_batch_tokens"] = [2048, 4096, 8192, 16384]
        copies(recorder, torch.device("cuda", 0), COPIES_BYTES)
    else:
        common |= {"config": TOY, "dtype": "float32", "device": "cpu"}
        common["micro_batch_tokens"] = [128, 256]
        copies(recorder, torch.device("cpu"), 2**22)
    for in_4bit in (False, True):
        updates(recorder, {**common, "load_in_4bit": in_4bit})
    if not torch.cuda.is_available():
        table(recorder, gpus_gib=(8,) if quick else GPUS_GIB)


if __name__ == "__main__":
    from bench.command import run

    run("base_weights")
