"""A plan: how long micro-batches are, what each layer leaves for its backward, what that takes.

It is chosen before the run; what follows from it is kept in the checkpoints (`ExecutionLayout` of
the trainer), so that a resumed run repeats it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastdpo.modeling.activations import OFFLOAD, PAGE_BYTES
from fastdpo.planner.terms import binary_size


@dataclass(frozen=True)
class Plan:
    """How a run uses the memory of its GPU and host, and how much that is.

    Attributes:
        micro_batch_tokens: T, the most tokens of a micro-batch.
        activation_plan: for each decoder layer, first to last: one of `ACTIVATIONS`.
        embeddings_on_host: whether the embeddings are served from pinned host memory.
        mlp_tile_tokens: tokens of a tile of the MLPs; None runs them over all tokens at once.
        norm_tile_tokens: likewise of the norms.
        dequantize_once: whether a recomputed layer's 4-bit weights are dequantized once for its
            recomputation and backward.
        optimizer: `--optim` that the bytes are for.
        terms: bytes in the highest phase, by term.
        phases: bytes allocated in every phase that may be the highest, by name.
        pinned_host_bytes: pinned host memory for layer inputs, embeddings and a base that lies
            there.
        allocated_bytes: predicted peak of torch.cuda.max_memory_allocated().
        peak_bytes: that with the allocator's gaps and CUDA's context: what the GPU must have.
        gpu_bytes: memory of the GPU that the run may use.
        host_bytes: most host memory that the run may pin.
        tokens_per_second: estimated from the GPU's data sheet, or None without one.
        base_buffers: on how many buffers the frozen base comes from host memory; 0: it lies on the
            GPU.
        notes: what the reader should know: assumptions, and what would make it fit.
    """

    micro_batch_tokens: int
    activation_plan: tuple[str, ...]
    embeddings_on_host: bool
    mlp_tile_tokens: int | None
    norm_tile_tokens: int | None
    dequantize_once: bool
    optimizer: str
    terms: Mapping[str, int]
    phases: Mapping[str, int]
    pinned_host_bytes: int
    allocated_bytes: int
    peak_bytes: int
    gpu_bytes: int
    host_bytes: int
    tokens_per_second: float | None = None
    base_buffers: int = 0
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Tells whether GPU and host have the memory that the plan takes."""
        return self.peak_bytes <= self.gpu_bytes and self.pinned_host_bytes <= self.host_bytes

    @property
    def activation_counts(self) -> dict[str, int]:
        """How many layers do each of `ACTIVATIONS`, by these words."""
        return dict(Counter(self.activation_plan))

    def describe(self) -> str:
        """A few lines for the log."""
        layers = ", ".join(f"{count} {what}" for what, count in self.activation_counts.items())
        lines = [
            f"Memory plan: {binary_size(self.peak_bytes)} of {binary_size(self.gpu_bytes)}, "
            f"micro-batches of up to {self.micro_batch_tokens:,} tokens; layers: {layers}."
        ]
        largest = sorted(self.terms.items(), key=lambda term: -term[1])[:4]
        lines.append(
            "Largest terms: "
            + ", ".join(f"{name} {binary_size(size)}" for name, size in largest)
            + "."
        )
        extras = []
        if self.embeddings_on_host:
            extras.append("embeddings come from host memory")
        tiles = {"norms": self.norm_tile_tokens, "MLPs": self.mlp_tile_tokens}
        extras += [
            f"{what} run in tiles of {tokens:,} tokens" for what, tokens in tiles.items() if tokens
        ]
        if self.pinned_host_bytes:
            extras.append(f"{binary_size(self.pinned_host_bytes)} of pinned host memory")
        if extras:
            lines.append(f"To save memory: {'; '.join(extras)}.")
        if not self.fits:
            lines.append("It does not fit.")
        return "\n".join([*lines, *self.notes])

    def as_json(self) -> dict[str, Any]:
        """The plan as `python -m fastdpo.plan --json` prints it: its fields by name."""
        return asdict(self)


def compare(predicted: Plan, measured_bytes: int) -> str:
    """One sentence on the predicted and the measured peak of allocated memory."""
    off = predicted.allocated_bytes / measured_bytes - 1 if measured_bytes else 0.0
    return (
        f"Peak memory: {binary_size(measured_bytes)} measured, "
        f"{binary_size(predicted.allocated_bytes)} predicted ({off:+.1%})."
    )


def offloaded_bytes(activation_plan: tuple[str, ...], input_bytes: int) -> int:
    """Bytes of pinned memory that the offloaded layers' inputs take."""
    return activation_plan.count(OFFLOAD) * pinned_bytes(input_bytes)


def pinned_bytes(size: int) -> int:
    """Bytes of pinned memory that a tensor of this size takes.

    It is taken in pages, the rest rounded up to a power of two, as torch does with each piece.
    """
    rest = size % PAGE_BYTES
    return size - rest + (1 << (rest - 1).bit_length() if rest else 0)
