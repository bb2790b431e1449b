"""GPUs by size and by name: what they hold, how fast they compute and copy."""

import re
from dataclasses import dataclass, replace

from fastdpo.modeling.attention_backends import Capability
from fastdpo.planner.terms import CONTEXT_BYTES, GIB

SIZES_GIB = (6, 8, 12, 16, 24, 32, 48, 80)
"""GPU sizes in the table of longest pairs, GiB."""

HOST_GB_PER_S = 20.0
"""Bandwidth between pinned memory and the GPU, one way, 1e9 bytes a second: assumed of PCIe 4
x 16, and measured nowhere; half of it with 8 lanes, as an RTX 4060 has."""

EFFICIENCY = {"H100": 0.41, "H200": 0.41, "RTX 4090": 0.61}
"""Share of the dense rate that a whole update is taken to reach, kernels between the matrix
products included, where it was counted: from the bytes and FLOPs of all operations of a layer of
Llama-3.1-8B at T = 8192, with eager norms (an H200 computes as an H100 does)."""

USUAL_EFFICIENCY = 0.6
"""`EFFICIENCY` of any other GPU. With it every speed that a plan states is an estimate."""


@dataclass(frozen=True)
class GPUSpec:
    """A GPU as its data sheet describes it, with the memory that torch sees of it.

    Attributes:
        name: the GPU's name, or that of the one that its size stands for.
        memory_bytes: memory that a run may use, CUDA's own context included.
        tflops: dense bfloat16 (float16 where there is none) products with fp32 sums, 1e12 FLOPs a
            second.
        gb_per_s: bandwidth of its own memory, 1e9 bytes a second.
        capability: compute capability; a GPU given by its size alone is taken to have bfloat16.
        sold_gib: what is printed on the box; a driver, and error correction, keep some of it.
    """

    name: str
    memory_bytes: int
    tflops: float
    gb_per_s: float
    capability: Capability = (8, 0)
    sold_gib: int = 0


def efficiency_of(gpu: GPUSpec) -> float:
    """The share of its dense rate that an update is taken to reach on a GPU."""
    named = (share for name, share in EFFICIENCY.items() if _plain(name) in _plain(gpu.name))
    return next(named, USUAL_EFFICIENCY)


def _gpu(
    name: str, sold: int, seen: float, tflops: float, gb_per_s: float, capability: Capability
) -> GPUSpec:
    return GPUSpec(name, int(seen * GIB), tflops, gb_per_s, capability, sold)


KNOWN = (
    # GiB as sold, and about what a driver leaves to torch (from public messages for some, else
    # estimated); TFLOP/s and GB/s as data sheets have them.
    _gpu("RTX 2060", 6, 5.79, 26, 336, (7, 5)),
    _gpu("RTX 2080 Ti", 11, 10.75, 54, 616, (7, 5)),
    _gpu("RTX 3060", 12, 11.75, 25, 360, (8, 6)),
    _gpu("RTX 3070", 8, 7.78, 41, 448, (8, 6)),
    _gpu("RTX 3080", 10, 9.77, 60, 760, (8, 6)),
    _gpu("RTX 3080 Ti", 12, 11.75, 68, 912, (8, 6)),
    _gpu("RTX 3090", 24, 23.68, 71, 936, (8, 6)),
    _gpu("RTX 3090 Ti", 24, 23.68, 80, 1008, (8, 6)),
    _gpu("RTX 4060", 8, 7.75, 30, 272, (8, 9)),
    _gpu("RTX 4060 Ti", 16, 15.6, 44, 288, (8, 9)),
    _gpu("RTX 4070", 12, 11.7, 58, 504, (8, 9)),
    _gpu("RTX 4070 SUPER", 12, 11.7, 71, 504, (8, 9)),
    _gpu("RTX 4070 Ti", 12, 11.7, 80, 504, (8, 9)),
    _gpu("RTX 4070 Ti SUPER", 16, 15.7, 88, 672, (8, 9)),
    _gpu("RTX 4080", 16, 15.7, 97, 717, (8, 9)),
    _gpu("RTX 4080 SUPER", 16, 15.7, 104, 736, (8, 9)),
    _gpu("RTX 4090", 24, 23.64, 165, 1008, (8, 9)),
    _gpu("RTX 5070", 12, 11.6, 62, 672, (12, 0)),
    _gpu("RTX 5070 Ti", 16, 15.5, 88, 896, (12, 0)),
    _gpu("RTX 5080", 16, 15.5, 113, 960, (12, 0)),
    _gpu("RTX 5090", 32, 31.36, 209, 1792, (12, 0)),
    _gpu("T4", 16, 14.56, 65, 320, (7, 5)),
    _gpu("V100", 16, 15.77, 125, 900, (7, 0)),
    _gpu("L4", 24, 22.0, 121, 300, (8, 9)),
    _gpu("A10", 24, 22.0, 125, 600, (8, 6)),
    _gpu("A10G", 24, 22.0, 70, 600, (8, 6)),
    _gpu("A30", 24, 23.5, 165, 933, (8, 0)),
    _gpu("A4000", 16, 15.6, 77, 448, (8, 6)),
    _gpu("A5000", 24, 23.6, 111, 768, (8, 6)),
    _gpu("A6000", 48, 47.4, 155, 768, (8, 6)),
    _gpu("A40", 48, 44.4, 150, 696, (8, 6)),
    _gpu("6000 Ada", 48, 47.4, 364, 960, (8, 9)),
    _gpu("L40", 48, 44.4, 181, 864, (8, 9)),
    _gpu("L40S", 48, 44.4, 362, 864, (8, 9)),
    _gpu("A100", 80, 79.1, 312, 2039, (8, 0)),
    _gpu("H100", 80, 79.1, 989, 3350, (9, 0)),
    _gpu("H200", 141, 139.8, 989, 4800, (9, 0)),
)

_OF_SIZE = {
    6: "RTX 2060", 8: "RTX 4060", 12: "RTX 4070", 16: "RTX 4080", 24: "RTX 4090", 32: "RTX 5090",
    48: "A6000", 80: "A100",
}  # fmt: skip


_UNNAMED = r"nvidia|geforce|tesla|quadro|rtx|gtx|gpu|generation|pcie|sxm\d?|hbm\d?e?"
"""Words that people and nvidia-smi write around the name of a GPU."""

MOST_GIB = 512
"""No GPU has more; a larger bare number is a name that is not known."""


def gpu_spec(text: str) -> GPUSpec:
    """Look up the GPU of a size ("24GiB", "24GB", "24") or of a name as people and nvidia-smi say.

    A name is "RTX 4090", "NVIDIA GeForce RTX 4090", "3090 Ti", "4090" or "A100-40GB"; its memory
    is what torch sees of it. A size is taken as it is, and stands for the rates of a usual GPU of
    that size, or of the next smaller one, and for a GPU that has bfloat16.

    Raises:
        ValueError: it is neither; lists what is known.
    """
    named = _named(text)
    if named is not None:
        return named
    size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(gib|gb|g)?\s*", text.lower())
    if size and 0 < float(size[1]) <= MOST_GIB:
        return gpu_spec_of_bytes(int(float(size[1]) * GIB))
    raise ValueError(
        f"--gpu is {text!r}; it must be auto, a size such as 24GiB, or one of "
        f"{', '.join(gpu.name for gpu in KNOWN)}."
    )


def _named(text: str) -> GPUSpec | None:
    """Look up a GPU by its name, with or without its maker, its socket and its size."""
    size = r"\d+ ?g(?:i?b)?\b"
    words = re.findall(rf"{size}|[a-z0-9]+", re.sub(r"[-_]", " ", text.lower()))
    sizes = [int(re.sub(r"\D", "", word)) for word in words if re.fullmatch(size, word)]
    rest = [word for word in words if not re.fullmatch(rf"{size}|{_UNNAMED}", word)]
    wanted = "".join(rest).removeprefix("nvidia").removeprefix("geforce").removeprefix("rtx")
    for gpu in KNOWN:
        if not wanted or wanted != _plain(gpu.name).removeprefix("rtx"):
            continue
        if not sizes or sizes[0] == gpu.sold_gib:
            return gpu
        seen = int(sizes[0] * gpu.memory_bytes / gpu.sold_gib)  # A100-40GB, RTX 4060 Ti 8GB
        name = f"{gpu.name} {sizes[0]}GB"
        return replace(gpu, name=name, memory_bytes=seen, sold_gib=sizes[0])
    return None


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
