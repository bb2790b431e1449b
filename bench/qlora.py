"""QLoRA updates under a memory plan, on models of real shapes with random weights.

The contender is ours at its barest: a synthetic 4-bit model, the plan for a card of the given size,
and updates of one pair whose rows share nothing, the longest there is of its length.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from bench.contest import Turns
from bench.harness import SEED
from bench.measuring import MIB, PeakMemory, Stopwatch
from bench.synthetic import aliased_config, random_model
from bench.trainers import LORA_ALPHA, LORA_RANK, limit_memory
from fastdpo.batching import MicroBatch, PromptGroup, pack_update
from fastdpo.modeling.adapters import adapters_disabled, add_adapter, lora_config
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.fused import choose_kernels
from fastdpo.modeling.head import unwrap_model
from fastdpo.modeling.layout import ExecutionLayout
from fastdpo.modeling.logprobs import packed_logprobs
from fastdpo.planner import (
    Plan,
    Workload,
    architecture_of,
    gpu_spec,
    make_plan,
    pinnable_host_bytes,
    training_of,
)
from fastdpo.planner.terms import CONTEXT_BYTES, GIB

BETA, LEARNING_RATE = 0.1, 1e-5


def contend(case: Mapping[str, Any], turns: Turns) -> None:
    """One update a turn; the facts are what the plan predicts.

    The case: model (an alias), row_tokens (L), card_gib, dtype, device; optional config (values
    that differ from the alias's).
    """
    device = torch.device(case["device"])
    if device.type == "cuda":
        limit_memory(device, case["card_gib"] - CONTEXT_BYTES / GIB)
    base = random_model(
        aliased_config(case["model"], **case.get("config", {})),
        dtype=getattr(torch, case["dtype"]), device=case["device"], load_in_4bit=True,
    )  # fmt: skip
    torch.manual_seed(SEED)
    model = add_adapter(base, lora_config(LORA_RANK, LORA_ALPHA, 0.0, None)).train()
    made = planned(model, case)
    carry_out(model, made)
    optimizer = adam(model, made.optimizer)
    micro_batch = one_pair(case["row_tokens"], made.micro_batch_tokens).to(device)
    watch, memory = Stopwatch(device), PeakMemory(device)
    facts = {"predicted_mib": made.allocated_bytes / MIB, "plan": made.as_json()}
    turns.ready(facts)
    for _ in turns:
        memory.start()
        watch.start()
        loss = update(model, micro_batch, optimizer)
        figures = watch.stop() | memory.over_start() | {"loss": loss}
        if device.type == "cuda":
            figures["peak_mib"] = torch.cuda.max_memory_allocated() / MIB
        turns.answer(figures | {"tokens": micro_batch.num_tokens})


def planned(model: torch.nn.Module, case: Mapping[str, Any]) -> Plan:
    """The plan of one pair of two rows on a card of the case's size."""
    tokens = 2 * case["row_tokens"]
    return make_plan(
        architecture_of(model, case["model"]),
        training_of(model, "adamw_torch_fused"),
        gpu_spec(str(case["card_gib"])),
        Workload(tokens, tokens),
        host_bytes=pinnable_host_bytes(),
        change_optimizer=True,
    )


def carry_out(model: torch.nn.Module, made: Plan) -> None:
    """Set the model up as the plan says."""
    ExecutionLayout(
        made.micro_batch_tokens,
        made.activation_plan,
        made.mlp_tile_tokens,
        made.norm_tile_tokens,
        made.embeddings_on_host,
        kernels=choose_kernels(model, "auto"),
        dequantize_once=made.dequantize_once,
        base_buffers=made.base_buffers,
    ).apply(model)


def update(
    model: torch.nn.Module, micro_batch: MicroBatch, optimizer: torch.optim.Optimizer
) -> float:
    """The reference's log-probs, forward, backward, clip, step; the loss."""
    with packed_attention(unwrap_model(model).config):
        with adapters_disabled(model), torch.no_grad():
            reference = packed_logprobs(model, micro_batch).logps
        logps = packed_logprobs(model, micro_batch).logps
        logratios = (logps - reference).view(-1, 2)
        loss = -logsigmoid(BETA * (logratios[:, 0] - logratios[:, 1])).mean()
        loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(
        set_to_none=False
    )  # as between micro-batches: gradients stay where they are
    return float(loss.detach())


def adam(model: torch.nn.Module, name: str) -> torch.optim.Optimizer:
    """AdamW over what is trained, in 8 bits where its name says so."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if "8bit" in name:
        import bitsandbytes as bnb

        return bnb.optim.AdamW8bit(trained, lr=LEARNING_RATE)
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)


def one_pair(seq_lens: int, micro_batch_tokens: int) -> MicroBatch:
    """Two rows of L tokens that share one, all others scored."""
    draw = np.random.default_rng(SEED)
    chosen, rejected = (draw.integers(3, 200, seq_lens, dtype=np.int32) for _ in range(2))
    chosen[0], rejected[0] = 3, 4
    group = PromptGroup(np.array([1], dtype=np.int32), (chosen, rejected))
    return pack_update([group], micro_batch_tokens)[0]
