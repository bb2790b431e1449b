"""Bytes by term, each a formula of shapes: what lies on the GPU for the whole run, and weights.

T tokens of a micro-batch, N of them scored, H hidden, I the MLP's width, V vocabulary, d bytes of
an entry of the frozen weights and of the activations (2 in bfloat16).
"""

from dataclasses import dataclass, replace

import torch

from fastdpo.modeling import nf4
from fastdpo.modeling.attention_backends import Capability, select_backend
from fastdpo.modeling.host_blocks import aligned, layers_per_block
from fastdpo.planner.architecture import Architecture, LinearShape

GIB, MIB = 2**30, 2**20

CONTEXT_BYTES = int(0.6 * GIB)
"""Bytes that CUDA itself takes of a GPU before the first tensor: context and kernels."""

WORKSPACE_BYTES = 32 * MIB
"""Workspace that torch hands to cuBLAS, from its own allocator (8 MiB before Hopper)."""

SLACK_SHARE = 0.02
"""Share of the allocated bytes that the allocator holds in gaps besides."""

EIGHT_BIT_BLOCK, EIGHT_BIT_LEAST = 256, 4096
"""Entries of 8-bit optimizer state that share a scale; tensors of fewer entries than the second
number keep fp32 state."""

TUNINGS = ("qlora", "lora", "full")


@dataclass(frozen=True)
class Training:
    """Which weights are trained, in which precision, and how.

    Attributes:
        tuning: one of `TUNINGS`.
        entry_bytes: d, bytes of an entry of whatever is not 4-bit; full fine-tuning keeps fp32
            weights and computes in this.
        lora_r: rank of the adapters.
        target_modules: names of the adapted linear layers; None: all but the head.
        optimizer: `--optim`, as transformers names it.
        attention: as `--attention` takes it; `make_plan` puts the backend that attends in its
            place, which the formulas of bytes need.
        kernels: as `--kernels` takes it; `make_plan` puts fused or eager in the place of auto.
        head_buffer_bytes: bound of the buffers of `linear_logprobs`.
        adapter_entries: entries of all adapters where they are known, of a loaded model.
    """

    tuning: str = "qlora"
    entry_bytes: int = 2
    lora_r: int = 16
    target_modules: tuple[str, ...] | None = None
    optimizer: str = "adamw_torch_fused"
    attention: str = "auto"
    kernels: str = "auto"
    head_buffer_bytes: int = 276 * MIB

    adapter_entries: int | None = None

    @property
    def trains_adapter(self) -> bool:
        """Tells whether an adapter is trained and the base is frozen."""
        return self.tuning != "full"


FUSED_CAPABILITY = (8, 0)
"""Compute capability from which `--kernels auto` is fused: the Triton kernels' own."""


def resolve_backends(
    architecture: Architecture, training: Training, capability: Capability
) -> Training:
    """Put what attends, and fused or eager layers, in place of what was requested.

    Args:
        architecture: of the model.
        training: whose `attention` and `kernels` are what the run requests.
        capability: compute capability of the GPU.

    Raises:
        ValueError: the requested backend cannot attend in this model on this GPU.
    """
    selected = select_backend(
        architecture.attention,
        torch.bfloat16 if training.entry_bytes == 2 else torch.float32,
        capability,
        training.attention,
        assume_installed=True,
    )
    kernels = training.kernels
    if kernels == "auto":
        kernels = "fused" if capability >= FUSED_CAPABILITY else "eager"
    return replace(training, attention=selected.backend, kernels=kernels)


def runs_fused(architecture: Architecture, training: Training) -> bool:
    """Tell whether the layers run fused ops."""
    return training.kernels == "fused" and architecture.has_fused_layers


def dequantized_bytes(linear: LinearShape, training: Training) -> int:
    """Bytes of the dense copy of one 4-bit weight while it is used, its fp32 scales included."""
    if training.tuning != "qlora":
        return 0
    return linear.weights * training.entry_bytes + 4 * -(-linear.weights // nf4.BLOCK)


def adapter_parameters(architecture: Architecture, training: Training) -> int:
    """Entries of all adapter matrices, A (r, in) and B (out, r)."""
    if not training.trains_adapter:
        return 0
    if training.adapter_entries is not None:
        return training.adapter_entries
    return sum(
        training.lora_r * (linear.inputs + linear.outputs) * linear.count
        for linear in architecture.targets(training.target_modules)
    )


def optimizer_bytes(parameters: int, optimizer: str) -> int:
    """Bytes of optimizer state on the GPU for fp32 parameters in tensors of 4096 entries or more.

    AdamW: two fp32 moments; in 8 bits two bytes and two fp32 scales per 256 entries; paged: in
    host memory whenever the GPU wants its own, so nothing is counted. What is not known by name
    is counted as AdamW.
    """
    if optimizer.startswith("paged_"):
        return 0
    if "8bit" in optimizer or "bnb_8bit" in optimizer:
        return 2 * parameters + 2 * 4 * -(-parameters // EIGHT_BIT_BLOCK)
    moments = {"sgd": 0, "adafactor": 0, "rmsprop": 1, "adagrad": 1, "lion_32bit": 1, "lion": 1}
    return 4 * parameters * moments.get(optimizer, 2)


@dataclass(frozen=True)
class BaseBlocks:
    """The frozen matrices of the decoder layers as blocks of host memory.

    Attributes:
        count: how many blocks.
        bytes: of all blocks.
        largest: bytes of the largest block, and of a buffer on the GPU.
    """

    count: int
    bytes: int
    largest: int


def base_blocks(architecture: Architecture, training: Training) -> BaseBlocks:
    """The blocks in which a frozen base lies in host memory; exact where all layers are alike."""
    entry = training.entry_bytes
    size = aligned(entry * architecture.stacked_parameters)
    for linear in architecture.linears:
        in_4bit = training.tuning == "qlora"
        parts = nf4.nf4_parts(linear.weights) if in_4bit else [entry * linear.weights]
        size += linear.count * sum(aligned(part) for part in parts)
    layer = size // architecture.layers
    together = layers_per_block(int(layer * architecture.largest_layer))
    largest = int(together * layer * architecture.largest_layer)
    return BaseBlocks(-(-architecture.layers // together), size, min(size, largest))


def resident_bytes(
    architecture: Architecture,
    training: Training,
    *,
    embeddings_on_host: bool,
    base_buffers: int = 0,
) -> dict[str, int]:
    """Bytes that lie on the GPU from the first update to the last, by term.

    Args:
        architecture: of the model.
        training: what is trained.
        embeddings_on_host: whether the embeddings lie in host memory.
        base_buffers: on how many buffers the decoder layers' matrices come from host memory; with 0
            they lie on the GPU.
    """
    full = not training.trains_adapter
    entry = 4 if full else training.entry_bytes
    if training.tuning == "qlora":
        linears = sum(nf4.nf4_bytes(each.weights) * each.count for each in architecture.linears)
    else:
        linears = entry * architecture.linear_parameters
    others, buffers = architecture.other_parameters, 0
    if base_buffers:
        # The tables of 4-bit weights stay on the GPU.
        tables = nf4.TABLE_BYTES if training.tuning == "qlora" else 0
        linears = tables * sum(each.count for each in architecture.linears)
        others -= architecture.stacked_parameters
        buffers = base_buffers * base_blocks(architecture, training).largest
    trained = architecture.parameters if full else adapter_parameters(architecture, training)
    return {
        "linear layers": linears,
        "buffers of the base": buffers,
        "embeddings": 0 if embeddings_on_host else entry * architecture.embedding_parameters,
        "head": entry * architecture.head_parameters,
        "norms and other weights": entry * others,
        "other towers": architecture.tower_bytes,
        "adapters": 0 if full else 4 * trained,
        "gradients": 4 * trained,
        "optimizer state": optimizer_bytes(trained, training.optimizer),
        "cuBLAS workspace": WORKSPACE_BYTES,
    }


def binary_size(size_bytes: float) -> str:
    """Write a number of bytes as "3.25 GiB", "12.0 MiB" or "0.5 KiB"."""
    if abs(size_bytes) >= 2**30:
        return f"{size_bytes / 2**30:.2f} GiB"
    if 0 < abs(size_bytes) < 2**20:
        return f"{size_bytes / 2**10:.1f} KiB"
    return f"{size_bytes / 2**20:.1f} MiB"
