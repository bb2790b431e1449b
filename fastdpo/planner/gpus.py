"""GPUs by size and by name: what they hold, how fast they compute and copy."""

import re
from dataclasses import dataclass, replace

from fastdpo.modeling.attention_backends import Capability
from fastdpo.planner.terms import CONTEXT_BYTES, GIB

SIZES_GIB = (6, 8, 12, 16, 24, 32, 48, 80)
"""GPU sizes in the table of longest pairs, GiB."""

HOST_GB_PER_S = 20.0
"""Bandwidth between pinned memory and the GPU over PCIe 4 x 16, one way, 1e9 bytes a second."""

EFFICIENCY = 0.6
"""Share of the dense rate that a whole update is taken to reach, kernels between the matrix
products included. With it every speed that a plan states is an estimate, not a measurement."""


@dataclass(frozen=True)
class GPUSpec:
    """A GPU as its data sheet describes it.

    Attributes:
        name: the GPU's name, or that of the one that its size stands for.
        memory_bytes: memory that a run may use, CUDA's own context included.
        tflops: dense bfloat16 products with fp32 sums, 1e12 FLOPs a second.
        gb_per_s: bandwidth of its own memory, 1e9 bytes a second.
        capability: compute capability; a GPU given by its size alone is taken to have bfloat16.
    """

    name: str
    memory_bytes: int
    tflops: float
    gb_per_s: float
    capability: Capability = (8, 0)


KNOWN = (
    GPUSpec("RTX 2060", 6 * GIB, 26, 336, (7, 5)),
    GPUSpec("RTX 4060", 8 * GIB, 30, 272, (8, 9)),
    GPUSpec("RTX 3060", 12 * GIB, 25, 360, (8, 6)),
    GPUSpec("RTX 4070", 12 * GIB, 58, 504, (8, 9)),
    GPUSpec("RTX 4080", 16 * GIB, 97, 717, (8, 9)),
    GPUSpec("RTX 3090", 24 * GIB, 71, 936, (8, 6)),
    GPUSpec("RTX 4090", 24 * GIB, 165, 1008, (8, 9)),
    GPUSpec("L4", 24 * GIB, 121, 300, (8, 9)),
    GPUSpec("A10", 24 * GIB, 125, 600, (8, 6)),
    GPUSpec("RTX 5090", 32 * GIB, 209, 1792, (12, 0)),
    GPUSpec("A6000", 48 * GIB, 155, 768, (8, 6)),
    GPUSpec("L40S", 48 * GIB, 362, 864, (8, 9)),
    GPUSpec("A100", 80 * GIB, 312, 2039, (8, 0)),
    GPUSpec("H100", 80 * GIB, 989, 3350, (9, 0)),
    GPUSpec("H200", 141 * GIB, 989, 4800, (9, 0)),
)

_OF_SIZE = {
    6: "RTX 2060", 8: "RTX 4060", 12: "RTX 4070", 16: "RTX 4080", 24: "RTX 4090", 32: "RTX 5090",
    48: "A6000", 80: "A100",
}  # fmt: skip


def gpu_spec(text: str) -> GPUSpec:
    """The GPU of a size ("24GiB", "24GB", "24") or of a name ("RTX 4090", "rtx-4090").

    A GPU sold as 24 GB holds 24 GiB. A size stands for the rates of a usual GPU of that size, or
    of the next smaller one, and for a GPU that has bfloat16.

    Raises:
        ValueError: it is neither; lists what is known.
    """
    size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(gib|gb|g)?\s*", text.lower())
    if size and float(size[1]) > 0:
        return gpu_spec_of_bytes(int(float(size[1]) * GIB))
    wanted = _plain(text)
    for gpu in KNOWN:
        if wanted and wanted == _plain(gpu.name):
            return gpu
    raise ValueError(
        f"--gpu is {text!r}; it must be auto, a size such as 24GiB, or one of "
        f"{', '.join(gpu.name for gpu in KNOWN)}."
    )


def gpu_spec_of_bytes(
    memory_bytes: int, name: str | None = None, capability: Capability = GPUSpec.capability
) -> GPUSpec:
    """A GPU of this size, with the rates of the one that CUDA names so or of a usual one."""
    longest_first = sorted(KNOWN, key=lambda gpu: -len(gpu.name))
    for gpu in longest_first:
        if name and _plain(gpu.name) in _plain(name):
            return replace(gpu, name=name, memory_bytes=memory_bytes, capability=capability)
    gib = memory_bytes / GIB
    usual = _OF_SIZE[max((size for size in _OF_SIZE if size <= gib), default=min(_OF_SIZE))]
    like = next(gpu for gpu in KNOWN if gpu.name == usual)
    stands = f"{gib:.4g} GiB, rates of an {usual}" if name is None else name
    return GPUSpec(stands, memory_bytes, like.tflops, like.gb_per_s, capability)


def current_gpu() -> GPUSpec:
    """The CUDA device of this process: what is free on it, and what this process holds already.

    Raises:
        ValueError: there is none; says what to pass instead.
    """
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            "--gpu is auto, but torch sees no CUDA GPU here: pass the size of the GPU that you "
            "plan for, for example --gpu 24GiB."
        )
    free, total = torch.cuda.mem_get_info()  # the context is made by this call, if it was not there
    free += torch.cuda.memory_reserved()  # what this process has already
    share = torch.cuda.get_per_process_memory_fraction()
    return gpu_spec_of_bytes(
        min(free, int(share * total)) + CONTEXT_BYTES,
        torch.cuda.get_device_name(),
        torch.cuda.get_device_capability(),
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
