"""From an architecture and a GPU to a plan: T, what each layer leaves, what goes to the host.

Recomputing less is the cheapest speed there is, so as many of the last layers are kept whole as
fit: their backward comes first, and each is gone when the one below it begins. The first kept
layer costs nothing, for a recomputed one is whole in its own backward too. Where pairs are long,
layers that keep their attention's results beside their input are faster for their bytes.
"""

from dataclasses import replace
from functools import partial

from fastdpo.modeling.activations import KEEP
from fastdpo.modeling.host_blocks import LEAST_BUFFERS
from fastdpo.options.passes import check_base_weights
from fastdpo.planner.advice import note_on_base, notes_on
from fastdpo.planner.architecture import Architecture
from fastdpo.planner.gpus import GPUSpec
from fastdpo.planner.memory_layout import MIN_SPEEDUP, MemoryLayout, MemoryStrategy
from fastdpo.planner.plan import Plan
from fastdpo.planner.speed import MicroBatchTimes, micro_batch_times
from fastdpo.planner.terms import (
    CONTEXT_BYTES,
    SLACK_SHARE,
    Training,
    base_blocks,
    resolve_backends,
    runs_fused,
)
from fastdpo.planner.workload import ROUNDING_TOKENS, Workload, rounded

TILES_TOKENS = (8192, 2048)
"""Tokens of a tile of an MLP, where MLPs are tiled: enough that matrix products stay full."""

NORM_TILE_TOKENS = 2048
"""Tokens of a tile of a norm: some 200 MB of fp32 tensors at H = 4096."""

EIGHT_BIT = "adamw_8bit"

STREAMED_SPEEDUP = 1.1
"""A base that fits on the GPU comes from host memory for at least this much speed: how fast it
comes is assumed."""


def allocatable_bytes(gpu_bytes: int) -> int:
    """Bytes that tensors may take of a GPU: less CUDA's context, less the allocator's gaps."""
    return int((gpu_bytes - CONTEXT_BYTES) / (1 + SLACK_SHARE))


def strategies(
    architecture: Architecture,
    training: Training,
    *,
    change_optimizer: bool,
    base_weights: str = "gpu",
) -> list[MemoryStrategy]:
    """Strategies, each of which saves in one way more than the last.

    The second takes more memory than the first, for speed; it is not built upon. Those with the
    base in host memory follow those with it on the GPU, and again each saves more than the last.

    Raises:
        ValueError: `base_weights` is host, and all weights are trained.
    """
    check_base_weights(base_weights, trains_adapter=training.trains_adapter)
    found = [MemoryStrategy(training.optimizer)]
    if training.trains_adapter:
        if architecture.plain_embeddings and not architecture.tied:
            found.append(replace(found[-1], embeddings_on_host=True))
        if not runs_fused(architecture, training):  # those hold nothing that tiles would bound
            found.append(replace(found[-1], norm_tile_tokens=NORM_TILE_TOKENS))
        found += [replace(found[-1], mlp_tile_tokens=tokens) for tokens in TILES_TOKENS]
    smallest = [found[-1]]
    if training.tuning == "qlora":
        found.insert(1, replace(found[0], dequantize_once=True))
    if base_weights != "gpu" and training.trains_adapter:
        streamed = [
            replace(each, base_buffers=buffers)
            for each in found
            for buffers in buffer_counts(architecture, training)
        ]
        smallest = [*smallest, streamed[-1]] if base_weights == "auto" else [streamed[-1]]
        found = [*found, *streamed] if base_weights == "auto" else streamed
    if change_optimizer and "8bit" not in training.optimizer:
        found += [replace(each, optimizer=EIGHT_BIT) for each in smallest]
    return found


def buffer_counts(architecture: Architecture, training: Training) -> list[int]:
    """Numbers of buffers to choose from for a base in host memory, the most first.

    More of them stand for blocks that stay on the GPU, whose copies are spared.
    """
    blocks = base_blocks(architecture, training).count
    counts = {min(LEAST_BUFFERS, blocks), blocks // 4, blocks // 2, 3 * blocks // 4}
    return sorted((each for each in counts if each >= min(LEAST_BUFFERS, blocks)), reverse=True)


def make_plan(
    architecture: Architecture,
    training: Training,
    gpu: GPUSpec,
    workload: Workload,
    *,
    host_bytes: int,
    micro_batch_tokens: int | None = None,
    change_optimizer: bool = False,
    recompute: bool = True,
    base_weights: str = "gpu",
) -> Plan:
    """Choose T, the activation plan and a strategy so that the GPU is nearly full.

    The fastest by estimate of all combinations that fit is taken; a strategy that saves more than
    is needed only where it gains 2 %. Where nothing fits, the plan is the smallest one and says
    what is missing.

    Args:
        architecture: of the model.
        training: what is trained.
        gpu: where; `memory_bytes` includes what CUDA's context takes.
        workload: what the micro-batches are filled with.
        host_bytes: most pinned host memory.
        micro_batch_tokens: T if the user chose it; a longer group raises it.
        change_optimizer: whether an 8-bit optimizer may take the place of the requested one, as
            the last strategy.
        recompute: whether layers may be recomputed or offloaded; else all are kept.
        base_weights: where the frozen base lies, as `--base_weights` says it. With auto, in host
            memory where nothing fits else, or where that is a tenth faster.

    Raises:
        ValueError: `base_weights` is host, and all weights are trained; or the attention backend
            that is requested cannot attend in this model on this GPU.
    """
    training = resolve_backends(architecture, training, gpu.capability)
    lengths = workload.lengths()
    if micro_batch_tokens is not None:
        lengths = [rounded(max(micro_batch_tokens, workload.longest_group_tokens))]
    allocatable = allocatable_bytes(gpu.memory_bytes)
    best: tuple[float, MemoryLayout, tuple[str, ...]] | None = None
    layout, on_gpu = None, None
    found = strategies(
        architecture, training, change_optimizer=change_optimizer, base_weights=base_weights
    )
    for strategy in found:
        if best is not None and strategy.optimizer != training.optimizer:
            break  # it changes the updates: only where nothing else fits
        for tokens in reversed(lengths):
            shape = workload.shape(tokens)
            layout = MemoryLayout(architecture, training, shape, strategy, recompute)
            seconds = partial(_seconds, layout, gpu, workload)
            activation_plan = layout.best_activation_plan(allocatable, host_bytes, seconds)
            if activation_plan is None:
                continue
            per_token = seconds(activation_plan) / tokens
            if not strategy.base_buffers:
                on_gpu = per_token if on_gpu is None else min(per_token, on_gpu)
            if best is None or per_token * _least_gain(strategy, best[1].strategy) < best[0]:
                best = (per_token, layout, activation_plan)
    if best is None:
        assert layout is not None, "there is a length and a strategy"
        *_, smallest = layout.activation_plans()
        return _finished(layout, smallest[-1], gpu, workload, host_bytes)
    made = _finished(best[1], best[2], gpu, workload, host_bytes)
    if not training.trains_adapter or base_weights == "gpu":
        return made
    times = _times(best[1], gpu, workload, best[2])
    gain = None if on_gpu is None else on_gpu / best[0]
    note = note_on_base(best[1], times, made, requested=base_weights, gain=gain)
    return replace(made, notes=(note, *made.notes))


def _least_gain(strategy: MemoryStrategy, taken: MemoryStrategy) -> float:
    """How much faster a strategy must be than the one taken so far, which saves less memory."""
    if strategy.base_buffers and not taken.base_buffers:
        return STREAMED_SPEEDUP
    return 1.0 if strategy == taken or strategy.dequantize_once else MIN_SPEEDUP


def _seconds(
    layout: MemoryLayout, gpu: GPUSpec, workload: Workload, activation_plan: tuple[str, ...]
) -> float:
    return _times(layout, gpu, workload, activation_plan).total


def _times(
    layout: MemoryLayout, gpu: GPUSpec, workload: Workload, activation_plan: tuple[str, ...]
) -> MicroBatchTimes:
    return micro_batch_times(
        layout.architecture,
        layout.training,
        layout.shape,
        gpu,
        activation_plan=activation_plan,
        input_bytes=layout.layer.input,
        group_tokens=workload.usual_group_tokens,
        mlp_tile_tokens=layout.strategy.mlp_tile_tokens,
        dequantize_once=layout.strategy.dequantize_once,
        copied_bytes=layout.copied_bytes,
    )


def _finished(
    layout: MemoryLayout,
    activation_plan: tuple[str, ...],
    gpu: GPUSpec,
    workload: Workload,
    host_bytes: int,
) -> Plan:
    phases = layout.phases(activation_plan)
    sums = {name: sum(terms.values()) for name, terms in phases.items()}
    highest = max(sums, key=lambda name: sums[name])
    allocated = sums[highest]
    gaps = int(allocated * SLACK_SHARE)
    made = Plan(
        micro_batch_tokens=layout.shape.tokens,
        activation_plan=activation_plan,
        embeddings_on_host=layout.strategy.embeddings_on_host,
        mlp_tile_tokens=layout.strategy.mlp_tile_tokens,
        norm_tile_tokens=layout.strategy.norm_tile_tokens,
        dequantize_once=layout.strategy.dequantize_once
        and any(what != KEEP for what in activation_plan),
        base_buffers=layout.strategy.base_buffers,
        optimizer=layout.strategy.optimizer,
        terms=phases[highest] | {"allocator's gaps": gaps, "CUDA context": CONTEXT_BYTES},
        phases=sums,
        pinned_host_bytes=layout.pinned(activation_plan),
        allocated_bytes=allocated,
        peak_bytes=allocated + gaps + CONTEXT_BYTES,
        gpu_bytes=gpu.memory_bytes,
        host_bytes=host_bytes,
        tokens_per_second=layout.shape.tokens / _seconds(layout, gpu, workload, activation_plan),
    )
    return replace(made, notes=notes_on(made, layout.architecture, layout.training))


def longest_pair(
    architecture: Architecture,
    training: Training,
    gpu: GPUSpec,
    *,
    host_bytes: int,
    change_optimizer: bool = True,
    base_weights: str = "gpu",
) -> Plan | None:
    """The plan of the longest pair 2 x L that fits, found by bisection; None where none does.

    Assumes that the two sequences share nothing, so that the pair is 2 x L tokens, all of them
    scored: a pair with a prompt of P tokens takes 2 x L - P, and fits where this one does.
    """

    def fitting(steps: int) -> Plan | None:
        tokens = steps * ROUNDING_TOKENS
        workload = Workload(tokens, tokens)
        made = make_plan(
            architecture, training, gpu, workload, host_bytes=host_bytes,
            change_optimizer=change_optimizer, base_weights=base_weights,
        )  # fmt: skip
        return made if made.fits else None

    low, best = 0, None
    high = 1
    while (found := fitting(high)) is not None and high < 2**16:
        low, best, high = high, found, high * 2
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        found = fitting(middle)
        if found is None:
            high = middle
        else:
            low, best = middle, found
    return best
