"""From an architecture and a GPU to a plan: T, what each layer leaves, what goes to the host.

Recomputing less is the cheapest speed there is, so as many of the last layers are kept whole as
fit: their backward comes first, and each is gone when the one below it begins. The first kept
layer costs nothing, for a recomputed one is whole in its own backward too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from fastdpo.planner.activations import (
    KEEP,
    OFFLOAD,
    OFFLOADED_ON_CARD,
    RECOMPUTE,
    LayerBytes,
    Row,
    head_bytes,
    layer_bytes,
    scoring_bytes,
    table_bytes,
)
from fastdpo.planner.advice import notes_on
from fastdpo.planner.architecture import Architecture
from fastdpo.planner.gpus import GPUSpec
from fastdpo.planner.plan import Plan, host_bytes_of, pinned_bytes
from fastdpo.planner.speed import update_seconds
from fastdpo.planner.terms import CONTEXT_BYTES, SLACK_SHARE, Training, resident_bytes, training_for

ROUNDING_TOKENS = 128
"""Micro-batch lengths are multiples of it."""

TILES_TOKENS = (8192, 2048)
"""Rows of a tile of an MLP, where MLPs are tiled: enough that matrix products stay full."""

NORM_TILE_TOKENS = 2048
"""Rows of a tile of a norm: some 200 MB of fp32 tensors at H = 4096."""

MIN_SPEEDUP = 1.02
"""A means of saving memory is taken, where it is not needed, for at least this much speed."""

EIGHT_BIT = "adamw_8bit"

TRAINING_ONLY = ("gradients", "optimizer state")
"""Terms that the reference pass, before the first update, does not see."""


@dataclass(frozen=True)
class Workload:
    """What the micro-batches are filled with.

    Attributes:
        longest_group_tokens: tokens of the longest pair, what its rows share counted once.
        update_tokens: tokens of an update; a micro-batch of more gains nothing.
        scored_share: scored tokens over all tokens.
        repeated_share: prefix tokens over all tokens, of groups with a second completion.
    """

    longest_group_tokens: int
    update_tokens: int
    scored_share: float = 1.0
    repeated_share: float = 0.0

    def row(self, tokens: int) -> Row:
        """A full micro-batch of this many tokens."""
        scored = min(tokens, int(tokens * self.scored_share) + 1)
        return Row(tokens, scored, int(tokens * self.repeated_share))

    @classmethod
    def of(cls, group_tokens: Sequence[int], pairs_per_update: int, **shares: float) -> Self:
        """Of a data set, by the tokens of its groups: an update is that many average ones."""
        average = sum(group_tokens) / len(group_tokens)
        return cls(max(group_tokens), int(average * pairs_per_update), **shares)

    def lengths(self) -> list[int]:
        """T's to choose from: as short as the longest group allows to as long as is of use."""
        least, most = _rounded(self.longest_group_tokens), _rounded(self.update_tokens)
        lengths = [least]
        while lengths[-1] < most:
            lengths.append(min(_rounded(int(lengths[-1] * 1.125)), most))
        return lengths


def _rounded(tokens: int) -> int:
    return -(-tokens // ROUNDING_TOKENS) * ROUNDING_TOKENS


@dataclass(frozen=True)
class MemoryStrategy:
    """What saves memory besides the layers' policy."""

    optimizer: str
    embeddings_on_host: bool = False
    norm_tile_tokens: int | None = None
    mlp_tile_tokens: int | None = None


@dataclass(frozen=True)
class MemoryLayout:
    """One way to run micro-batches of T tokens, with its bytes."""

    architecture: Architecture
    training: Training
    row: Row
    means: MemoryStrategy
    recompute: bool = True

    @cached_property
    def layer(self) -> LayerBytes:
        """Of one decoder layer."""
        return layer_bytes(
            self.architecture,
            self.training,
            self.row,
            mlp_tile_tokens=self.means.mlp_tile_tokens,
            norm_tile_tokens=self.means.norm_tile_tokens,
        )

    @cached_property
    def resident(self) -> dict[str, int]:
        """What lies on the GPU all the time."""
        training = replace(self.training, optimizer=self.means.optimizer)
        return resident_bytes(
            self.architecture, training, embeddings_on_host=self.means.embeddings_on_host
        )

    @cached_property
    def tables(self) -> int:
        """What depends on T alone."""
        return table_bytes(self.architecture, self.training, self.row)

    @cached_property
    def head(self) -> int:
        """What last norm and head take."""
        return head_bytes(self.architecture, self.training, self.row, self.means.norm_tile_tokens)

    def moments(self, policy: Sequence[str]) -> dict[str, dict[str, int]]:
        """The bytes, by term, of every moment that may be the highest of an update."""
        counts = {what: policy.count(what) for what in (KEEP, RECOMPUTE, OFFLOAD)}
        layer, inputs = self.layer, self.layer.input
        on_gpu = inputs * max(counts[RECOMPUTE], min(OFFLOADED_ON_CARD, counts[OFFLOAD]))
        shared = inputs if layer.holds_input and not counts[KEEP] else 0
        before = {"tables and indices": self.tables, "layer inputs": on_gpu}
        spared = layer.first_spared if policy[0] == KEEP else 0
        kept = layer.kept * counts[KEEP] - spared
        others = max(0, kept - layer.kept)
        backward = {
            "kept layers": others,
            "one layer, saved": layer.kept - shared,
            "dequantized weight": layer.dequantized,
            "one layer, backward": layer.backward - layer.dequantized,
        }
        resident = self.resident
        if not self.training.trains_adapter:
            return self._moments_of_full(before, backward, kept, counts[KEEP])
        scoring = {name: resident[name] for name in resident if name not in TRAINING_ONLY}
        return {
            "head": resident | before | {"kept layers": kept, "head and its buffers": self.head},
            "backward of a layer": resident | before | backward,
            "reference pass": scoring | {
                "tables and indices": self.tables,
                "one layer, forward": scoring_bytes(self.architecture, self.training, self.row),
            },
        }  # fmt: skip

    def _moments_of_full(
        self, before: dict[str, int], backward: dict[str, int], kept: int, kept_layers: int
    ) -> dict[str, dict[str, int]]:
        """Of full fine-tuning, whose gradients come to be during the backward.

        Autocast's copies of the weights, in the compute dtype, live as long as a forward and as
        what a layer saves.
        """
        architecture, without = self.architecture, dict(self.resident)
        gradients = without.pop("gradients")
        casts = self.training.entry_bytes * architecture.linear_parameters
        table = 4 * architecture.vocabulary * architecture.hidden
        first = gradients // architecture.layers
        saved = {"cast weights": casts * max(1, kept_layers) // architecture.layers}
        layer = {name: backward[name] for name in backward if name != "kept layers"}
        return {
            "forward": without | before | {"kept layers": kept, "cast weights": casts},
            "head": without | before | {
                "kept layers": kept, "head and its buffers": self.head, "gradients": table,
            },
            "backward of the last layer": without | before | backward | saved | {
                "gradients": table + first,
            },
            "backward of the first layer": without | layer | {
                "gradients": gradients - table,
                "layer inputs": self.layer.input,
                "cast weights": casts // architecture.layers,
            },
            "optimizer step": self.resident,
        }  # fmt: skip

    def peak(self, policy: Sequence[str]) -> int:
        """Allocated bytes at the highest moment."""
        return max(sum(terms.values()) for terms in self.moments(policy).values())

    def pinned(self, policy: tuple[str, ...]) -> int:
        """Bytes of pinned host memory."""
        rows = self.training.entry_bytes * self.architecture.embedding_parameters
        embeddings = pinned_bytes(rows) if self.means.embeddings_on_host else 0
        return embeddings + host_bytes_of(policy, self.layer.input)

    def policies(self) -> Iterator[tuple[str, ...]]:
        """From the fastest to the most frugal: fewer kept, then fewer inputs on the GPU."""
        layers = self.architecture.layers
        if not self.recompute:
            yield (KEEP,) * layers
            return
        for kept in range(layers, -1, -1):
            yield (RECOMPUTE,) * (layers - kept) + (KEEP,) * kept
        for offloaded in range(1, layers + 1):
            yield (OFFLOAD,) * offloaded + (RECOMPUTE,) * (layers - offloaded)

    def best_policy(self, allocatable: int, host_bytes: int) -> tuple[str, ...] | None:
        """The fastest policy within the GPU's and the host's bytes, or None."""
        for policy in self.policies():
            if self.peak(policy) <= allocatable and self.pinned(policy) <= host_bytes:
                return policy
        return None


def allocatable_bytes(gpu_bytes: int) -> int:
    """What tensors may take of a GPU: less CUDA's context, less the allocator's gaps."""
    return int((gpu_bytes - CONTEXT_BYTES) / (1 + SLACK_SHARE))


def strategies(
    architecture: Architecture, training: Training, *, change_optimizer: bool
) -> list[MemoryStrategy]:
    """Means of saving memory, each one more than the one before."""
    means = [MemoryStrategy(training.optimizer)]
    if training.trains_adapter:
        if architecture.plain_embeddings and not architecture.tied:
            means.append(replace(means[-1], embeddings_on_host=True))
        means.append(replace(means[-1], norm_tile_tokens=NORM_TILE_TOKENS))
        means += [replace(means[-1], mlp_tile_tokens=tokens) for tokens in TILES_TOKENS]
    if change_optimizer and "8bit" not in training.optimizer:
        means.append(replace(means[-1], optimizer=EIGHT_BIT))
    return means


def plan(
    architecture: Architecture,
    training: Training,
    gpu: GPUSpec,
    workload: Workload,
    *,
    host_bytes: int,
    micro_batch_tokens: int | None = None,
    change_optimizer: bool = False,
    recompute: bool = True,
) -> Plan:
    """Choose T, the layers' policy and further means so that the GPU is nearly full.

    Of all ways that fit the fastest by estimate is taken; a means that is not needed is taken only
    where it gains 2 %. Where nothing fits, the plan is the most frugal one and says what is
    missing.

    Args:
        architecture: of the model.
        training: what is trained.
        gpu: where; `memory_bytes` includes what CUDA's context takes.
        workload: what the micro-batches are filled with.
        host_bytes: most pinned host memory.
        micro_batch_tokens: T if the user chose it; a longer group raises it.
        change_optimizer: whether an 8-bit optimizer may take the place of the one asked for, as
            the last means.
        recompute: whether layers may be recomputed or offloaded; else all are kept.
    """
    training = training_for(architecture, training)
    lengths = workload.lengths()
    if micro_batch_tokens is not None:
        lengths = [_rounded(max(micro_batch_tokens, workload.longest_group_tokens))]
    allocatable = allocatable_bytes(gpu.memory_bytes)
    best: tuple[float, MemoryLayout, tuple[str, ...]] | None = None
    layout = None
    for means in strategies(architecture, training, change_optimizer=change_optimizer):
        if best is not None and means.optimizer != training.optimizer:
            break  # other numbers: only where nothing else fits
        for tokens in reversed(lengths):
            layout = MemoryLayout(architecture, training, workload.row(tokens), means, recompute)
            policy = layout.best_policy(allocatable, host_bytes)
            if policy is None:
                continue
            per_token = _seconds(layout, policy, gpu, workload) / tokens
            same = best is not None and best[1].means == means
            if best is None or per_token * (1.0 if same else MIN_SPEEDUP) < best[0]:
                best = (per_token, layout, policy)
    if best is None:
        assert layout is not None, "there is a length and a means"
        *_, smallest = layout.policies()
        return _finished(layout, smallest, gpu, workload, host_bytes)
    return _finished(best[1], best[2], gpu, workload, host_bytes)


def _seconds(
    layout: MemoryLayout, policy: tuple[str, ...], gpu: GPUSpec, workload: Workload
) -> float:
    return update_seconds(
        layout.architecture,
        layout.training,
        layout.row,
        gpu,
        policy=policy,
        input_bytes=layout.layer.input,
        group_tokens=workload.longest_group_tokens,
        mlp_tile_tokens=layout.means.mlp_tile_tokens,
    )


def _finished(
    layout: MemoryLayout,
    policy: tuple[str, ...],
    gpu: GPUSpec,
    workload: Workload,
    host_bytes: int,
) -> Plan:
    moments = layout.moments(policy)
    sums = {name: sum(terms.values()) for name, terms in moments.items()}
    highest = max(sums, key=lambda name: sums[name])
    allocated = sums[highest]
    gaps = int(allocated * SLACK_SHARE)
    made = Plan(
        micro_batch_tokens=layout.row.tokens,
        activation_plan=policy,
        embeddings_on_host=layout.means.embeddings_on_host,
        mlp_tile_tokens=layout.means.mlp_tile_tokens,
        norm_tile_tokens=layout.means.norm_tile_tokens,
        optimizer=layout.means.optimizer,
        terms=moments[highest] | {"allocator's gaps": gaps, "CUDA context": CONTEXT_BYTES},
        moments=sums,
        pinned_host_bytes=layout.pinned(policy),
        allocated_bytes=allocated,
        peak_bytes=allocated + gaps + CONTEXT_BYTES,
        gpu_bytes=gpu.memory_bytes,
        host_bytes=host_bytes,
        tokens_per_second=layout.row.tokens / _seconds(layout, policy, gpu, workload),
    )
    return replace(made, notes=notes_on(made, layout.architecture, layout.training))


def longest_pair(
    architecture: Architecture,
    training: Training,
    gpu: GPUSpec,
    *,
    host_bytes: int,
    change_optimizer: bool = True,
) -> Plan | None:
    """The plan of the longest pair 2 x L that fits, found by bisection; None where none does.

    Assumes that the two rows share nothing, so that the pair is 2 x L tokens, all of them scored:
    a pair with a prompt of P tokens takes 2 x L - P, and fits where this one does.
    """

    def fitting(steps: int) -> Plan | None:
        tokens = steps * ROUNDING_TOKENS
        workload = Workload(tokens, tokens)
        made = plan(
            architecture, training, gpu, workload, host_bytes=host_bytes,
            change_optimizer=change_optimizer,
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
