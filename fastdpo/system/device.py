"""Capabilities of the GPU that this process uses."""

import torch

BF16_CAPABILITY = (8, 0)
"""Compute capability from which on GPUs have bfloat16 units; older ones only emulate them."""


def cuda_has_bf16() -> bool:
    """Tell whether there is a CUDA GPU with bfloat16 units; T4 and RTX 20 only emulate them."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
