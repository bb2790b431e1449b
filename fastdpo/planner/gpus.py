"""GPUs by size and by name: what they hold, how fast they compute and copy."""

import re
from dataclasses import dataclass

from fastdpo.planner.terms import CONTEXT_BYTES, GIB

SIZES_GIB = (6, 8, 12, 16, 24, 32, 48, 80)
"""The sizes of the table of longest pairs."""

HOST_GB_PER_S = 20.0
"""Pinned memory over PCIe 4 x 16, one way."""

EFFICIENCY = 0.6
"""Share of the dense rate that a whole update is taken to reach, kernels between the matrix
products included. With it every speed that a plan states is an estimate, not a measurement."""


@dataclass(frozen=True)
class GPUSpec:
    """A GPU, as data sheets give it.

    Attributes:
        name: of the GPU, or of the one that its size stands for.
        memory_bytes: that a run may use, CUDA's own context included.
        tflops: dense bfloat16 products with fp32 sums.
        gb_per_s: of its own memory.
    """

    name: str
    memory_bytes: int
    tflops: float
    gb_per_s: float


KNOWN = (
    GPUSpec("RTX 2060", 6 * GIB, 26, 336),
    GPUSpec("RTX 4060", 8 * GIB, 30, 272),
    GPUSpec("RTX 3060", 12 * GIB, 25, 360),
    GPUSpec("RTX 4070", 12 * GIB, 58, 504),
    GPUSpec("RTX 4080", 16 * GIB, 97, 717),
    GPUSpec("RTX 3090", 24 * GIB, 71, 936),
    GPUSpec("RTX 4090", 24 * GIB, 165, 1008),
    GPUSpec("L4", 24 * GIB, 121, 300),
    GPUSpec("A10", 24 * GIB, 125, 600),
    GPUSpec("RTX 5090", 32 * GIB, 209, 1792),
    GPUSpec("A6000", 48 * GIB, 155, 768),
    GPUSpec("L40S", 48 * GIB, 362, 864),
    GPUSpec("A100", 80 * GIB, 312, 2039),
    GPUSpec("H100", 80 * GIB, 989, 3350),
    GPUSpec("H200", 141 * GIB, 989, 4800),
)

_OF_SIZE = {
    6: "RTX 2060", 8: "RTX 4060", 12: "RTX 4070", 16: "RTX 4080", 24: "RTX 4090", 32: "RTX 5090",
    48: "A6000", 80: "A100",
}  # fmt: skip


def gpu_spec(text: str) -> GPUSpec:
    """The GPU of a size ("24GiB", "24GB", "24") or of a name ("RTX 4090", "rtx-4090").

    A GPU sold as 24 GB holds 24 GiB. A size stands for the rates of a usual GPU of that size, or
    of the next smaller one.

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


def gpu_spec_of_bytes(memory_bytes: int, name: str | None = None) -> GPUSpec:
    """A GPU of this size, with the rates of the one that CUDA names so or of a usual one."""
    longest_first = sorted(KNOWN, key=lambda gpu: -len(gpu.name))
    for gpu in longest_first:
        if name and _plain(gpu.name) in _plain(name):
            return GPUSpec(name, memory_bytes, gpu.tflops, gpu.gb_per_s)
    gib = memory_bytes / GIB
    usual = _OF_SIZE[max((size for size in _OF_SIZE if size <= gib), default=min(_OF_SIZE))]
    like = next(gpu for gpu in KNOWN if gpu.name == usual)
    stands = f"{gib:.4g} GiB, rates of an {usual}" if name is None else name
    return GPUSpec(stands, memory_bytes, like.tflops, like.gb_per_s)


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
        min(free, int(share * total)) + CONTEXT_BYTES, torch.cuda.get_device_name()
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
