"""From an architecture and a GPU to a plan: T, what each layer leaves, what goes to the host.

Recomputing less is the cheapest speed there is, so as many of the last layers are kept whole as
fit: their backward comes first, and each is gone when the one below it begins. The first kept
layer costs nothing, for a recomputed one is whole in its own backward too. Where pairs are long,
layers that keep their attention's results beside their input are faster for their bytes.

An update goes through phases, and the plan's peak is the highest of them. What lies on the GPU
besides weights, with two recomputed layers (R1, R2) below two kept ones (K3, K4):

              forward             |         backward
    R1    R2    K3    K4    head  |  K4    K3    R2    R1
    in1   in1   in1   in1   in1   |  in1   in1   in1   in1   inputs of recomputed layers
          in2   in2   in2   in2   |  in2   in2   in2
                s3    s3    s3    |  s3    s3    s2    s1    all that a layer saves; of a recomputed
                      s4    s4    |  s4                      one it exists during its own backward
                            h     |  b     b     b     b     the head's buffers; gradients
                          "head"     "backward of a layer"

After the named two every step holds less, so only they, and the reference pass before all updates,
can be the highest. In full fine-tuning gradients of weights grow while saved layers go, so both
ends of the backward count, and the copies of weights that autocast makes (`_full_phases`).
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Self

from fastdpo.modeling.activations import ACTIVATIONS, KEEP, KEEP_ATTENTION, OFFLOAD, RECOMPUTE
from fastdpo.modeling.attention_backends import BACKENDS
from fastdpo.planner.activations import (
    OFFLOADED_ON_GPU,
    LayerBytes,
    MicroBatchShape,
    head_bytes,
    layer_bytes,
    scoring_bytes,
    table_bytes,
)
from fastdpo.planner.advice import notes_on
from fastdpo.planner.architecture import Architecture
from fastdpo.planner.gpus import GPUSpec
from fastdpo.planner.plan import Plan, offloaded_bytes, pinned_bytes
from fastdpo.planner.speed import update_seconds
from fastdpo.planner.terms import (
    CONTEXT_BYTES,
    SLACK_SHARE,
    Training,
    resident_bytes,
    resolve_backends,
    runs_fused,
)

ROUNDING_TOKENS = 128
"""Micro-batch lengths are multiples of it."""

TILES_TOKENS = (8192, 2048)
"""Tokens of a tile of an MLP, where MLPs are tiled: enough that matrix products stay full."""

NORM_TILE_TOKENS = 2048
"""Tokens of a tile of a norm: some 200 MB of fp32 tensors at H = 4096."""

MIN_SPEEDUP = 1.02
"""A strategy that saves more memory than is needed is taken for at least this much speed."""

EIGHT_BIT = "adamw_8bit"

TRAINING_ONLY = ("gradients", "optimizer state")
"""Terms that the reference pass, before the first update, does not see."""


@dataclass(frozen=True)
class Workload:
    """The pairs of a data set in numbers, from which full micro-batches of any length follow.

    Attributes:
        longest_group_tokens: tokens of the longest pair, its shared prefix counted once.
        update_tokens: tokens of an update; a micro-batch of more gains nothing.
        mean_group_tokens: tokens of the pair that a token belongs to, on average over the tokens;
            None: those of the longest.
        scored_share: scored tokens over all tokens.
        repeated_share: prefix tokens over all tokens, of groups with a second completion.
    """

    longest_group_tokens: int
    update_tokens: int
    scored_share: float = 1.0
    repeated_share: float = 0.0
    mean_group_tokens: float | None = None

    @property
    def usual_group_tokens(self) -> float:
        """Tokens of the pair that a token belongs to, which its attention takes time for."""
        return self.mean_group_tokens or self.longest_group_tokens

    def shape(self, tokens: int) -> MicroBatchShape:
        """A full micro-batch of this many tokens."""
        scored = min(tokens, int(tokens * self.scored_share) + 1)
        return MicroBatchShape(tokens, scored, int(tokens * self.repeated_share))

    @classmethod
    def of(
        cls,
        group_tokens: Sequence[int],
        pairs_per_update: int,
        *,
        computed_tokens: int | None = None,
        scored_tokens: int,
        repeated_tokens: int = 0,
    ) -> Self:
        """The workload of a data set, by the tokens of its pairs.

        An update is taken to have `pairs_per_update` pairs of average length.

        Args:
            group_tokens: tokens of every pair, its shared prefix counted once.
            pairs_per_update: B.
            computed_tokens: tokens that are computed for all pairs; None: the sum of theirs.
            scored_tokens: how many of those are scored.
            repeated_tokens: how many of those are prefixes, by each completion but the first.
        """
        total = sum(group_tokens) if computed_tokens is None else computed_tokens
        return cls(
            max(group_tokens),
            int(total / len(group_tokens) * pairs_per_update),
            scored_share=scored_tokens / total,
            repeated_share=repeated_tokens / total,
            mean_group_tokens=sum(n * n for n in group_tokens) / sum(group_tokens),
        )

    def lengths(self) -> list[int]:
        """Values of T to choose from: from the longest group's length to a whole update's."""
        least, most = _rounded(self.longest_group_tokens), _rounded(self.update_tokens)
        lengths = [least]
        while lengths[-1] < most:
            lengths.append(min(_rounded(int(lengths[-1] * 1.125)), most))
        return lengths


def _rounded(tokens: int) -> int:
    return -(-tokens // ROUNDING_TOKENS) * ROUNDING_TOKENS


@dataclass(frozen=True)
class MemoryStrategy:
    """One combination of the ways to save memory besides the layers' activation plan."""

    optimizer: str
    embeddings_on_host: bool = False
    norm_tile_tokens: int | None = None
    mlp_tile_tokens: int | None = None
    dequantize_once: bool = False


@dataclass(frozen=True)
class MemoryLayout:
    """One way to run micro-batches of T tokens, with its bytes."""

    architecture: Architecture
    training: Training
    shape: MicroBatchShape
    strategy: MemoryStrategy
    recompute: bool = True

    @cached_property
    def layer(self) -> LayerBytes:
        """Bytes of one decoder layer."""
        return layer_bytes(
            self.architecture,
            self.training,
            self.shape,
            mlp_tile_tokens=self.strategy.mlp_tile_tokens,
            norm_tile_tokens=self.strategy.norm_tile_tokens,
        )

    @cached_property
    def resident(self) -> dict[str, int]:
        """Bytes that lie on the GPU all the time, by term."""
        training = replace(self.training, optimizer=self.strategy.optimizer)
        return resident_bytes(
            self.architecture, training, embeddings_on_host=self.strategy.embeddings_on_host
        )

    @cached_property
    def tables(self) -> int:
        """Bytes of the tables and indices, which depend on T alone."""
        return table_bytes(self.architecture, self.training, self.shape)

    @cached_property
    def head(self) -> int:
        """Bytes of the last norm and the head."""
        return head_bytes(
            self.architecture, self.training, self.shape, self.strategy.norm_tile_tokens
        )

    def phases(self, activation_plan: Sequence[str]) -> dict[str, dict[str, int]]:
        """Bytes by term of every phase that may be the highest of an update, by its name."""
        counts = {what: activation_plan.count(what) for what in ACTIVATIONS}
        spared = self.layer.first_spared if activation_plan[0] == KEEP else 0
        kept = self.layer.kept * counts[KEEP] - spared
        layer, inputs = self.layer, self.layer.input
        with_input = counts[RECOMPUTE] + counts[KEEP_ATTENTION]
        on_gpu = inputs * max(with_input, min(OFFLOADED_ON_GPU, counts[OFFLOAD]))
        shared = inputs if layer.holds_input and not counts[KEEP] else 0
        results = layer.attention_results * counts[KEEP_ATTENTION]
        if counts[KEEP_ATTENTION] and not counts[KEEP]:
            shared += layer.attention_results
        others, waiting = max(0, kept - layer.kept), 0
        if self.strategy.dequantize_once and counts[KEEP] < len(activation_plan):
            waiting = max(0, layer.dense_weights - others)  # where the kept layers are gone
        before = {
            "tables and indices": self.tables, "layer inputs": on_gpu, "kept attention": results,
        }  # fmt: skip
        backward = {
            "kept layers": others,
            "one layer, saved": layer.kept - shared,
            "dequantized weight": layer.dequantized,
            "dequantized, recomputed layer": waiting,
            "one layer, backward": layer.backward - layer.dequantized,
        }
        resident = self.resident
        if not self.training.trains_adapter:
            return self._full_phases(before, backward, kept, counts[KEEP])
        scoring = {name: resident[name] for name in resident if name not in TRAINING_ONLY}
        return {
            "head": resident | before | {"kept layers": kept, "head and its buffers": self.head},
            "backward of a layer": resident | before | backward,
            "reference pass": scoring | {
                "tables and indices": self.tables,
                "one layer, forward": scoring_bytes(self.architecture, self.training, self.shape),
            },
        }  # fmt: skip

    def _full_phases(
        self, before: dict[str, int], backward: dict[str, int], kept: int, kept_layers: int
    ) -> dict[str, dict[str, int]]:
        """The phases of full fine-tuning, whose gradients come to be during the backward.

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

    def peak(self, activation_plan: Sequence[str]) -> int:
        """Allocated bytes in the highest phase."""
        return max(sum(terms.values()) for terms in self.phases(activation_plan).values())

    def pinned(self, activation_plan: tuple[str, ...]) -> int:
        """Bytes of pinned host memory."""
        table = self.training.entry_bytes * self.architecture.embedding_parameters
        embeddings = pinned_bytes(table) if self.strategy.embeddings_on_host else 0
        return embeddings + offloaded_bytes(activation_plan, self.layer.input)

    def activation_plans(self) -> Iterator[list[tuple[str, ...]]]:
        """Activation plans by what saves memory, in each the fastest first.

        Between keeping nothing and keeping whole layers, or between keeping attention and either,
        time and bytes change by the same from layer to layer. So the fastest plan that fits is the
        fastest of one of these, but for a layer's rest. Offloading comes last.
        """
        if not self.recompute:
            yield [(KEEP,) * self.architecture.layers]
            return
        yield self._graded(RECOMPUTE, KEEP)
        if BACKENDS[self.training.attention].returns_results:
            yield self._graded(KEEP_ATTENTION, KEEP)
            yield self._graded(RECOMPUTE, KEEP_ATTENTION)
        yield self._graded(OFFLOAD, RECOMPUTE)

    def _graded(self, first: str, last: str) -> list[tuple[str, ...]]:
        """All plans in which the first layers do one thing and the last ones another."""
        layers = self.architecture.layers
        return [(first,) * n + (last,) * (layers - n) for n in range(layers + 1)]

    def best_activation_plan(
        self, allocatable: int, host_bytes: int, seconds: Callable[[tuple[str, ...]], float]
    ) -> tuple[str, ...] | None:
        """The fastest activation plan within the GPU's and the host's bytes, or None.

        Args:
            allocatable: bytes that tensors may take on the GPU.
            host_bytes: most pinned host memory.
            seconds: the time of a micro-batch by the plan.
        """
        best: tuple[str, ...] | None = None
        for plans in self.activation_plans():
            if best is not None and plans[-1][0] == OFFLOAD:
                break  # slower than all that keeps its inputs
            first = bisect_left(plans, True, key=lambda plan: self.peak(plan) <= allocatable)
            if first == len(plans) or self.pinned(plans[first]) > host_bytes:
                continue
            if best is None or seconds(plans[first]) * MIN_SPEEDUP < seconds(best):
                best = plans[first]
        return best


def allocatable_bytes(gpu_bytes: int) -> int:
    """Bytes that tensors may take of a GPU: less CUDA's context, less the allocator's gaps."""
    return int((gpu_bytes - CONTEXT_BYTES) / (1 + SLACK_SHARE))


def strategies(
    architecture: Architecture, training: Training, *, change_optimizer: bool
) -> list[MemoryStrategy]:
    """Strategies, each of which saves in one way more than the last.

    The second takes more memory than the first, for speed; it is not built upon.
    """
    found = [MemoryStrategy(training.optimizer)]
    if training.trains_adapter:
        if architecture.plain_embeddings and not architecture.tied:
            found.append(replace(found[-1], embeddings_on_host=True))
        if not runs_fused(architecture, training):  # those hold nothing that tiles would bound
            found.append(replace(found[-1], norm_tile_tokens=NORM_TILE_TOKENS))
        found += [replace(found[-1], mlp_tile_tokens=tokens) for tokens in TILES_TOKENS]
    if change_optimizer and "8bit" not in training.optimizer:
        found.append(replace(found[-1], optimizer=EIGHT_BIT))
    if training.tuning == "qlora":
        found.insert(1, replace(found[0], dequantize_once=True))
    return found


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
    """
    training = resolve_backends(architecture, training, gpu.capability)
    lengths = workload.lengths()
    if micro_batch_tokens is not None:
        lengths = [_rounded(max(micro_batch_tokens, workload.longest_group_tokens))]
    allocatable = allocatable_bytes(gpu.memory_bytes)
    best: tuple[float, MemoryLayout, tuple[str, ...]] | None = None
    layout = None
    for strategy in strategies(architecture, training, change_optimizer=change_optimizer):
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
            saves = best is not None and best[1].strategy != strategy
            saves = saves and not strategy.dequantize_once
            if best is None or per_token * (MIN_SPEEDUP if saves else 1.0) < best[0]:
                best = (per_token, layout, activation_plan)
    if best is None:
        assert layout is not None, "there is a length and a strategy"
        *_, smallest = layout.activation_plans()
        return _finished(layout, smallest[-1], gpu, workload, host_bytes)
    return _finished(best[1], best[2], gpu, workload, host_bytes)


def _seconds(
    layout: MemoryLayout, gpu: GPUSpec, workload: Workload, activation_plan: tuple[str, ...]
) -> float:
    return update_seconds(
        layout.architecture,
        layout.training,
        layout.shape,
        gpu,
        activation_plan=activation_plan,
        input_bytes=layout.layer.input,
        group_tokens=workload.usual_group_tokens,
        mlp_tile_tokens=layout.strategy.mlp_tile_tokens,
        dequantize_once=layout.strategy.dequantize_once,
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
