"""Where the ops run: Triton on a GPU, their torch twin everywhere else."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "torch")

TILE_ELEMENTS = 1 << 18
"""Bytes of a tile of the torch twins on the CPU: its fp32 temporaries stay near the cache."""

_ROUNDINGS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def uses_triton(backend: str, x: Tensor) -> bool:
    """Return True if the Triton kernels are to run on x; triton is imported only when they do.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: backend "triton" cannot run here; says what is missing.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} does not exist: choose from {BACKENDS}.")
    if backend == "torch" or (backend == "auto" and not x.is_cuda):
        return False
    missing = missing_for_triton(x)
    if missing is None:
        return True
    if backend == "auto":
        _say_fallback(missing)
        return False
    raise RuntimeError(f"backend 'triton' cannot run here: {missing}. Pass backend='torch'.")


def is_small(backend: str, x: Tensor, elements: int) -> bool:
    """Return True if eager code is to run: on the CPU, below the size up to which it is faster."""
    return backend == "auto" and x.device.type == "cpu" and x.numel() < elements


def rounding(dtype: torch.dtype) -> str:
    """How a kernel rounds fp32 to `dtype`. The interpreter truncates to bf16: by hand there."""
    name = _ROUNDINGS.get(dtype, "none")
    return "bf16 by hand" if name == "bf16" and is_interpreted() else name


def is_interpreted() -> bool:
    """Return True if Triton runs on the CPU (TRITON_INTERPRET=1 when it was first imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def row_tiles(rows: Tensor) -> Iterator[slice]:
    """Slices of the rows: tiles that fit the CPU's cache, all rows at once on other devices."""
    count, width = rows.shape
    size = max(1, count)
    if rows.device.type == "cpu":
        size = max(1, TILE_ELEMENTS // max(width, 1))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def missing_for_triton(x: Tensor) -> str | None:
    """The reason why the Triton kernels cannot run on x, in words; None where they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if x.dtype == torch.float64:
        return "it computes in fp32, and the input is fp64"
    if not x.is_cuda and not is_interpreted():
        return f"the input is on {x.device} and TRITON_INTERPRET is not 1"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the GPU's compute capability is below 8.0"
    return None


@cache
def _say_fallback(reason: str) -> None:
    logger.warning(
        "The ops of fastdpo_kernels run their slower torch twins on this GPU: %s.", reason
    )
