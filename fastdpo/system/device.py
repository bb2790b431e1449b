"""What the GPU of this process can do."""

import torch

BF16_CAPABILITY = (8, 0)
"""Compute capability from which on GPUs have bfloat16 units; older ones only emulate them."""


def cuda_has_bf16() -> bool:
    """Whether there is a CUDA GPU with bfloat16 units, not one that emulates them (T4, RTX 20)."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
