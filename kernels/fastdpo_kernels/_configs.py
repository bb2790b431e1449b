"""Launch configurations of the Triton kernels by GPU and dtype, and how many rows fill a GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LaunchConfig:
    """Tile shapes of both GEMMs. Fixed per capability and dtype, never by the number of rows.

    Attributes:
        block_n: rows, block_v: columns and block_h: inner size of a tile of the first GEMM.
        gradient_block_n: rows, gradient_block_h: hidden columns and gradient_block_k: inner size of
            a tile of the second GEMM where Triton runs it.
        gradient_in_triton: whether Triton runs it even where torch's product could.
        gradient_by_tma: whether it reads its operands through TMA descriptors.
    """

    block_n: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int
    gradient_block_n: int
    gradient_block_h: int
    gradient_block_k: int
    gradient_num_warps: int
    gradient_num_stages: int
    part_v: int = 128
    gradient_in_triton: bool = False
    gradient_by_tma: bool = False


_HALF = LaunchConfig(128, 128, 64, 8, 3, 128, 128, 64, 8, 3)
_SINGLE = LaunchConfig(64, 64, 32, 4, 2, 32, 32, 16, 4, 2, part_v=32)
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
CONFIGS = {
    (capability, size): config
    for capability in CAPABILITIES
    for size, config in ((2, _HALF), (4, _SINGLE))
}
CONFIGS[(9, 0), 2] = replace(
    _HALF, block_v=256, gradient_block_h=256, gradient_num_stages=4, gradient_by_tma=True
)
"""Launch configuration by compute capability and bytes of an operand. Not yet measured: chosen so
that every entry compiles without spills and inside the shared memory of its GPU."""

INTERPRETED = LaunchConfig(16, 32, 16, 4, 1, 16, 16, 16, 4, 1, part_v=16)
"""Small tiles for the interpreter, so that small inputs cross every boundary."""

ROW_TILES_PER_GROUP = 8

WAVE_TILE = 128
"""Rows and hidden columns of the output tile by which the second GEMM's waves are counted."""


def is_interpreted() -> bool:
    """Return True if Triton runs on the CPU (TRITON_INTERPRET=1 when it was first imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def config_for(weight: Tensor) -> LaunchConfig:
    """The configuration of the weight's GPU and dtype; a newer GPU takes the newest entry."""
    if not weight.is_cuda:
        return INTERPRETED
    capability = torch.cuda.get_device_capability(weight.device)
    known = max((c for c in CAPABILITIES if c <= capability), default=None)
    if known is None:
        raise RuntimeError(
            f"the Triton backend needs compute capability 8.0 or later, this GPU has {capability}:"
            " pass backend='torch'."
        )
    return CONFIGS[known, weight.element_size()]


def processors_of(weight: Tensor) -> int:
    """Streaming multiprocessors of the weight's device; one where there are none."""
    if not weight.is_cuda:
        return 1
    return torch.cuda.get_device_properties(weight.device).multi_processor_count


def rows_in_whole_waves(most: int, hidden_size: int, processors: int) -> int:
    """Rows per chunk, at most `most`, that the second GEMM works through fastest per row.

    Its (rows / 128) x (H / 128) output tiles are worked `processors` at a time: most rows per wave
    win, then most rows. Below 128 rows: all that fit, in steps of 16, at least 16.
    """
    if most < WAVE_TILE:
        return max(16, most // 16 * 16)
    columns = -(-hidden_size // WAVE_TILE)
    candidates = range(WAVE_TILE, most + 1, WAVE_TILE)

    def rows_per_wave(rows: int) -> float:
        return rows / -(-(rows // WAVE_TILE * columns) // processors)

    return max(candidates, key=lambda rows: (rows_per_wave(rows), rows))
