"""Blocks of pinned host memory, buffers for them on the device, and the copies between the two."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LEAST_BUFFERS = 2
"""One holds the block that computes, one takes the next."""

ALIGNMENT = 256
"""Bytes to whose multiples a tensor begins within a block: what GPU kernels read fastest."""

PAGE = 4096

SMALL_BYTES = 2**23
"""Blocks are made of as many layers as reach this size: smaller copies do not fill the link."""


def layers_per_block(layer_bytes: int) -> int:
    """How many consecutive decoder layers of this size share a block."""
    return max(1, -(-SMALL_BYTES // max(1, layer_bytes)))


def aligned(size: int) -> int:
    """Bytes that a tensor of this size takes within a block."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class HostBlock:
    """Uninitialized host memory, pinned where the device is CUDA, for as long as this object lives.

    It is pinned in place: torch's own pinned memory is taken in powers of two, which would waste a
    seventh of an 8B. Tensors made of it may outlive this object, and are then no longer pinned.

    Attributes:
        memory: (size,) uint8 on the CPU.

    Raises:
        MemoryError: it cannot be pinned.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        if device.type != "cuda" or not size:
            self.memory = torch.empty(size, dtype=torch.uint8)
            return
        pages = aligned_to_pages(size)
        taken = torch.empty(pages + PAGE, dtype=torch.uint8)
        begin = -taken.data_ptr() % PAGE
        cudart: Any = torch.cuda.cudart()
        if code := int(cudart.cudaHostRegister(taken.data_ptr() + begin, pages, 0)):
            raise MemoryError(
                f"the host cannot pin {pages:,} bytes for one layer's weights (CUDA error {code}): "
                "free host memory, raise `ulimit -l`, or leave the base on the GPU "
                "(--base_weights gpu; --qlora takes a quarter of the memory)."
            )
        self.memory = taken[begin : begin + size]
        # The finalizer holds the memory: it must not be freed before it is unpinned.
        unpin: Any = weakref.finalize(self, _unpin, cudart, taken, begin, device)
        unpin.atexit = False  # the driver may be gone by then


def aligned_to_pages(size: int) -> int:
    """The size in whole pages."""
    return -(-size // PAGE) * PAGE


def _unpin(cudart: Any, taken: Tensor, begin: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may be on its way
    cudart.cudaHostUnregister(taken.data_ptr() + begin)


def offsets_in_block(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where tensors of these sizes begin within a block, and the size of the block, in bytes."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += aligned(size)
    return offsets, end


class Buffer:
    """Memory of one block on the device.

    Attributes:
        memory: (size,) uint8.
        block: index of the block that it holds, or is being given; None if there is none.
        copied: the CUDA event after that copy, or None.
        is_in_use: whether that block's tensors point to it.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.block: int | None = None
        self.copied: Any = None
        self.is_in_use = False


class Copies:
    """Copies from host memory to the device: beside the computation on CUDA, else at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def own(self, target: Tensor) -> None:
        """Keep the allocator from giving a target's memory away before its copies have ended."""
        if self._stream is not None:
            target.record_stream(self._stream)

    def start(self, target: Tensor, source: Tensor) -> Any:
        """Copy to the beginning of the target once all that is queued has run; its end's event."""
        stream = self._stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.no_grad(), torch.cuda.stream(stream):
            target[: source.nbytes].copy_(source, non_blocking=True)
        return None if stream is None else stream.record_event()

    def wait(self, copied: Any) -> None:
        """Let what is computed next wait for a copy."""
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
