"""Capabilities of the GPU that this process uses."""

import sys

import torch

BF16_CAPABILITY = (8, 0)
"""Compute capability from which on GPUs have bfloat16 units; older ones only emulate them."""


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A CPU tensor on `device`; the host does not wait for the copy to a GPU.

    The copy is from pinned memory, which torch keeps until it is done.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def compute_device() -> torch.device:
    """The CUDA device of this process, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def free_device_bytes(device: torch.device) -> int | None:
    """Bytes that are free on a CUDA device, or held by torch for reuse; None on a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + held


def cuda_has_bf16() -> bool:
    """Tell whether there is a CUDA GPU with bfloat16 units; T4 and RTX 20 only emulate them."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def peak_bytes() -> int:
    """The most memory that was in use so far: of the GPU what torch took, else this process's.

    0 where the system does not say (Windows).
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
