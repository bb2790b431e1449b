"""How long a micro-batch takes, by arithmetic: an estimate to choose by, not a measurement."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fastdpo.modeling import nf4
from fastdpo.modeling.activations import KEEP, KEEP_ATTENTION, OFFLOAD
from fastdpo.planner.activations import MicroBatchShape
from fastdpo.planner.architecture import Architecture
from fastdpo.planner.gpus import HOST_GB_PER_S, GPUSpec, efficiency_of
from fastdpo.planner.terms import Training, runs_fused

LAYER_LAUNCHES = {"eager": 330, "fused": 189}
"""Launches of a recomputed layer's forward, recompute and backward, by `--kernels`: those of
Llama-3.1-8B with NF4 weights as `bench.layers` counts them."""

LAUNCH_SECONDS = 5e-6
"""Seconds that the host takes for a launch: assumed, not measured."""


def update_flops(
    architecture: Architecture,
    training: Training,
    shape: MicroBatchShape,
    *,
    kept_layers: int,
    kept_attentions: int,
    tiled: bool,
    group_tokens: float,
) -> float:
    """FLOPs of the matrix products that must be done for one micro-batch.

    Per token 2 FLOPs a weight in the forward and as many for the gradient of the input, again for
    that of a trained weight, and again where a layer is recomputed (of a kept layer with a tiled
    MLP, the MLP). Attention: a query sees half of its group on average; backward is 2.5 forwards,
    and layers that keep their attention do not run it again. A layer with a state convolves and
    scans in its place, in time that grows with the tokens alone.
    The head: 4 N H V, 6 where it is trained.
    """
    passes = 2 if training.trains_adapter else 3
    kept = kept_layers / architecture.layers
    again = (1 - kept) * architecture.linear_parameters
    again += kept * architecture.mlp_parameters if tiled else 0
    weights = 2 * shape.tokens * (passes * architecture.linear_parameters + again)
    seen = min(group_tokens, shape.tokens) / 2
    states = architecture.states
    attending = architecture.layers - (states.count if states else 0)
    attention = 4 * architecture.query_width * seen * shape.tokens * attending
    if states:
        weights += (3 + 1 - kept) * states.flops * states.count * shape.tokens
    head = 2 * architecture.hidden * architecture.vocabulary * shape.scored_tokens
    attended_again = 1 - kept - kept_attentions / architecture.layers
    return weights + attention * (3.5 + attended_again) + head * passes


@dataclass(frozen=True)
class MicroBatchTimes:
    """Seconds of one micro-batch, by part.

    Attributes:
        forward: of the computation of the forward.
        backward: of that of the backward, recomputation included.
        offloaded: that layer inputs take to the host, and as long back.
        copied: that the base takes from host memory in the forward, and as long in the backward.
        launches: that the host takes to launch all kernels.
    """

    forward: float
    backward: float
    offloaded: float
    copied: float
    launches: float

    @property
    def total(self) -> float:
        """All of it, what runs side by side counted once."""
        computed = self.forward + self.backward
        if self.copied:  # inputs leave in the forward, and come back with the base in the backward
            computed = max(self.forward, self.copied)
            computed += max(self.backward, self.copied + self.offloaded)
        return max(computed, 2 * self.offloaded, self.launches)

    @property
    def copies_hide(self) -> bool:
        """Tells whether the copies of the base cost no time."""
        return self.copied <= self.forward and self.copied + self.offloaded <= self.backward


def forward_share(
    architecture: Architecture, shape: MicroBatchShape, flops: float, group_tokens: float
) -> float:
    """The share of an update's FLOPs that its forward has."""
    seen = min(group_tokens, shape.tokens) / 2
    attention = 2 * architecture.query_width * seen * architecture.layers
    head = architecture.hidden * architecture.vocabulary * shape.scored_tokens
    weights = architecture.linear_parameters * shape.tokens
    return min(1.0, 2 * (weights + attention * shape.tokens + head) / flops)


def micro_batch_times(
    architecture: Architecture,
    training: Training,
    shape: MicroBatchShape,
    gpu: GPUSpec,
    *,
    activation_plan: Sequence[str],
    input_bytes: int,
    group_tokens: float,
    mlp_tile_tokens: int | None,
    dequantize_once: bool = False,
    copied_bytes: int = 0,
) -> MicroBatchTimes:
    """The time of forward and backward of one micro-batch, by part.

    Products at `efficiency_of` the GPU's dense rate, dequantization at its memory's (tile by tile
    where MLPs are tiled), copies at the assumed rate of the host's link: of a base in host memory
    `copied_bytes` in the forward, and as many in the backward.
    """
    counts = Counter(activation_plan)
    kept = counts[KEEP]
    tiled = mlp_tile_tokens is not None and mlp_tile_tokens < shape.tokens
    flops = update_flops(
        architecture,
        training,
        shape,
        kept_layers=kept,
        kept_attentions=counts[KEEP_ATTENTION],
        tiled=tiled,
        group_tokens=group_tokens,
    )
    seconds = flops / (gpu.tflops * 1e12 * efficiency_of(gpu))
    if training.tuning == "qlora":
        mlp = architecture.mlp_parameters
        others = architecture.linear_parameters - mlp
        # A kept layer's weights are wanted twice, not thrice; one dequantization may do for two.
        fewer = 1.0 if dequantize_once else kept / architecture.layers
        tiles = -(-shape.tokens // mlp_tile_tokens) if mlp_tile_tokens else 1
        read = others * (3 - fewer) + mlp * tiles * (3 if tiled else 3 - fewer)
        seconds += read * (nf4.ENTRY_BYTES + 2 * training.entry_bytes) / (gpu.gb_per_s * 1e9)
    forward = seconds * forward_share(architecture, shape, flops, group_tokens)
    kernels = "fused" if runs_fused(architecture, training) else "eager"
    rate = HOST_GB_PER_S * 1e9
    return MicroBatchTimes(
        forward,
        seconds - forward,
        offloaded=counts[OFFLOAD] * input_bytes / rate,
        copied=copied_bytes / rate,
        launches=LAYER_LAUNCHES[kernels] * architecture.layers * LAUNCH_SECONDS,
    )
