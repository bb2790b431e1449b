"""The bytes of one way to run micro-batches of T tokens, phase by phase.

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
from functools import cached_property

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
from fastdpo.planner.architecture import Architecture
from fastdpo.planner.plan import offloaded_bytes, pinned_bytes
from fastdpo.planner.terms import BaseBlocks, Training, base_blocks, resident_bytes

MIN_SPEEDUP = 1.02
"""A strategy that saves more memory than is needed is taken for at least this much speed."""

TRAINING_ONLY = ("gradients", "optimizer state")
"""Terms that the reference pass, before the first update, does not see."""


@dataclass(frozen=True)
class MemoryStrategy:
    """One combination of the ways to save memory besides the layers' activation plan."""

    optimizer: str
    embeddings_on_host: bool = False
    norm_tile_tokens: int | None = None
    mlp_tile_tokens: int | None = None
    dequantize_once: bool = False
    base_buffers: int = 0


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
            self.architecture,
            training,
            embeddings_on_host=self.strategy.embeddings_on_host,
            base_buffers=self.strategy.base_buffers,
        )

    @cached_property
    def base_on_host(self) -> BaseBlocks:
        """The blocks in which the base lies in host memory; none of 0 bytes where it does not."""
        if not self.strategy.base_buffers:
            return BaseBlocks(0, 0, 0)
        return base_blocks(self.architecture, self.training)

    @cached_property
    def copied_bytes(self) -> int:
        """Bytes of the base that a forward fetches from host memory, and a backward again.

        What the buffers hold at the end of the one is not fetched for the other.
        """
        blocks = self.base_on_host
        fetched = max(0, blocks.count - self.strategy.base_buffers)
        return blocks.bytes * fetched // max(1, blocks.count)

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
        offloaded = offloaded_bytes(activation_plan, self.layer.input)
        return self.base_on_host.bytes + embeddings + offloaded

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
