"""The plan of a run: from the model that is loaded, its options and the lengths of its pairs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastdpo.modeling.activations import supports_checkpointing
from fastdpo.modeling.attention_backends import attention_needs
from fastdpo.modeling.base_weights import host_weights, named_weights
from fastdpo.modeling.head import unwrap_model
from fastdpo.planner.architecture import adapted_modules, architecture_of, is_of_adapter
from fastdpo.planner.gpus import GPUSpec, current_gpu
from fastdpo.planner.plan import Plan
from fastdpo.planner.search import make_plan
from fastdpo.planner.terms import GIB, Training
from fastdpo.planner.workload import Workload

if TYPE_CHECKING:
    from fastdpo.config import DPOConfig

HOST_SHARE = 0.6
"""Share of the free host memory that may be pinned: pinned memory cannot be paged out."""


def plan_for_run(
    model: nn.Module,
    config: "DPOConfig",
    group_tokens: Sequence[int],
    *,
    pairs_per_update: int,
    computed_tokens: int | None = None,
    scored_tokens: int,
    repeated_tokens: int = 0,
    max_seqlen: int | None = None,
    gpu: GPUSpec | None = None,
    host_bytes: int | None = None,
) -> Plan | None:
    """Plan a run before its first update.

    Args:
        model: a causal LM or a PeftModel, loaded, with the adapter that it will train.
        config: of the run; `micro_batch_tokens`, `optim`, `attention`, `kernels`, `disable_dropout`
            `base_weights` and activation checkpointing are read.
        group_tokens: tokens of every training pair, its shared prefix counted once.
        pairs_per_update: B.
        computed_tokens: tokens of all pairs, where a completion that several pairs hold is computed
            once; None: the sum of `group_tokens`.
        scored_tokens: how many of those are scored.
        repeated_tokens: how many of those are prefixes, by each completion but the first, among
            whose keys they lie once more.
        max_seqlen: tokens of the longest sequence, a prompt with one completion. Where the longest
            pair does not fit, the plan is for micro-batches of at most this, and its T says which
            pairs are to be split into their completions.
        gpu: to plan for; None: the CUDA device, with what is free on it now and what the model
            holds already; of what else this process holds (a reference model), nothing.
        host_bytes: most pinned memory; None: a share of what the host has free.

    Returns:
        The plan, which may not fit, or None on a CPU: there is no GPU to fill.

    Raises:
        UnplannableError: the model cannot be counted.
        ValueError: `--attention` names a backend that cannot attend in it on this GPU.
    """
    if gpu is None:
        if next(model.parameters()).device.type != "cuda":
            return None
        gpu = current_gpu()
        gpu = replace(gpu, memory_bytes=gpu.memory_bytes - other_allocations(model))
    architecture = architecture_of(model, _name_of(model))
    # Padded sequences run under the model's own attention, whose flash kernels keep as much.
    attention = "auto" if config.packing == "off" else config.attention
    training = training_of(model, config.optim, attention, config.kernels)
    if not config.disable_dropout:
        needs = attention_needs(unwrap_model(model).config.get_text_config(), dropout=True)
        architecture = replace(architecture, attention=needs)
    workload = Workload.of(
        group_tokens,
        pairs_per_update,
        computed_tokens=computed_tokens,
        scored_tokens=scored_tokens,
        repeated_tokens=repeated_tokens,
    )

    on_host = host_weights(model)
    where = config.base_weights if supports_checkpointing(model) else "gpu"
    if host_bytes is None:
        host_bytes = pinnable_host_bytes() + (0 if on_host is None else on_host.host_bytes)

    def planned(longest_tokens: int) -> Plan:
        return make_plan(
            architecture,
            training,
            gpu,
            replace(workload, longest_group_tokens=longest_tokens),
            host_bytes=host_bytes,
            micro_batch_tokens=config.micro_batch_tokens,
            recompute=config.activation_checkpointing is not False,
            base_weights=where if on_host is None else "host",
        )

    made = planned(workload.longest_group_tokens)
    if made.fits or max_seqlen is None:
        return made
    split = planned(max_seqlen)
    if not split.fits:
        return made
    note = (
        f"Pairs of more than {split.micro_batch_tokens:,} tokens do not fit as a whole: their "
        "completions run one by one, which costs one more forward."
    )
    return replace(split, notes=(note, *split.notes))


def training_of(
    model: nn.Module, optimizer: str, attention: str = "auto", kernels: str = "auto"
) -> Training:
    """How a loaded model is trained, from its weights and adapters.

    Args:
        model: a causal LM or a PeftModel on it.
        optimizer: `--optim`.
        attention: `--attention`.
        kernels: `--kernels`.
    """
    ranks = [
        a.weight.shape[0]
        for part in model.modules()
        for a in (getattr(part, "lora_A", None) or {}).values()
        if hasattr(a, "weight")
    ]
    four_bit = any(hasattr(weight, "quant_state") for _, weight in named_weights(model))
    half = unwrap_model(model).dtype in (torch.bfloat16, torch.float16)
    has_adapter = hasattr(model, "peft_config")
    tuning = ("qlora" if four_bit else "lora") if has_adapter else "full"
    entries = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Training(
        tuning=tuning,
        entry_bytes=2 if half or tuning == "full" else 4,
        lora_r=max(ranks, default=0),
        optimizer=str(getattr(optimizer, "value", optimizer)),
        attention=attention,
        adapter_entries=entries if has_adapter else None,
        kernels=kernels,
    )


def other_allocations(model: nn.Module) -> int:
    """Bytes that this process holds on the GPU and that no plan of the model counts.

    A frozen adapter, the reference's, is among them.
    """
    counted, device = {}, unwrap_model(model).device
    adapted = adapted_modules(model)
    outside = {
        id(parameter)
        for path, parameter in named_weights(model)
        if not parameter.requires_grad and is_of_adapter(path, adapted)
    }
    if (on_host := host_weights(model)) is not None:
        on_host.release()
    for tensor in (*(weight for _, weight in named_weights(model)), *model.buffers()):
        state = getattr(tensor, "quant_state", None)
        parts = [] if id(tensor) in outside else [tensor]
        while state is not None:  # of 4-bit weights; with double quantization it has one of its own
            parts += [part for part in vars(state).values() if isinstance(part, torch.Tensor)]
            state = getattr(state, "state2", None)
        counted |= {part.data_ptr(): part.nbytes for part in parts if part.device == device}
    return max(0, torch.cuda.memory_allocated() - sum(counted.values()))


def pinnable_host_bytes() -> int:
    """Bytes of host memory that may be pinned, by /proc/meminfo; 8 GiB where there is none."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 8 * GIB
    line = next(x for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable"))
    return int(int(line.split()[1]) * 1024 * HOST_SHARE)


def _name_of(model: nn.Module) -> str:
    base = unwrap_model(model)
    return str(getattr(base, "name_or_path", "") or type(base).__name__)
