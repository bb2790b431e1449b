"""Launches the Triton kernels: configurations per card, buffers inside their bound, row chunks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ._torch import (
    Request,
    RowStatistics,
    empty_statistics,
    extra_figures,
    joined_statistics,
)

SCORE_BYTES = 16 * 2**20
"""Bound of the partial statistics of a scoring pass."""

LN_2 = math.log(2.0)


@dataclass(frozen=True)
class LaunchConfig:
    """Tile shapes of both GEMMs. Fixed per capability and dtype, never by the number of rows."""

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


_HALF = LaunchConfig(128, 128, 64, 8, 3, 128, 128, 64, 8, 3)
_SINGLE = LaunchConfig(64, 64, 32, 4, 2, 32, 32, 16, 4, 2)
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
CONFIGS = {
    (capability, size): config
    for capability in CAPABILITIES
    for size, config in ((2, _HALF), (4, _SINGLE))
}
CONFIGS[(8, 0), 2] = CONFIGS[(12, 0), 2] = replace(_HALF, gradient_block_k=32)
CONFIGS[(8, 6), 2] = CONFIGS[(8, 9), 2] = replace(_HALF, gradient_block_h=64)
CONFIGS[(10, 0), 2] = replace(_HALF, block_n=64)
"""Launch configuration by compute capability and bytes of an operand. Not yet measured: chosen so
that every entry compiles without spills and inside the shared memory of its card."""

INTERPRETED = LaunchConfig(16, 32, 16, 4, 1, 16, 16, 16, 4, 1)
"""Small tiles for the interpreter, so that small inputs cross every boundary."""

ROW_TILES_PER_GROUP = 8


def is_interpreted() -> bool:
    """Whether Triton runs on the CPU (TRITON_INTERPRET=1 when it was first imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def config_for(weight: Tensor) -> LaunchConfig:
    """The configuration of the weight's card and dtype; a newer card takes the newest entry."""
    if not weight.is_cuda:
        return INTERPRETED
    capability = torch.cuda.get_device_capability(weight.device)
    known = max((c for c in CAPABILITIES if c <= capability), default=None)
    if known is None:
        raise RuntimeError(
            f"the Triton backend needs compute capability 8.0 or later, this card has {capability}:"
            " pass backend='torch'."
        )
    return CONFIGS[known, weight.element_size()]


def score(
    hidden_states: Tensor,  # (N, H)
    target_ids: Tensor,  # (N,)
    request: Request,
) -> RowStatistics:
    """One pass over the vocabulary; logits never leave the chip."""
    plan = _Plan(request)
    rows_at_once = plan.rows_within(SCORE_BYTES, stores_exponentials=False)
    chunks = []
    for rows in _chunks(len(target_ids), rows_at_once):
        partial = _Partial(plan, hidden_states[rows], target_ids[rows], stores_exponentials=False)
        partial.run_logits()
        chunks.append(partial.combined())
    return joined_statistics(chunks) if chunks else empty_statistics(hidden_states, request)


def score_with_gradient(
    hidden_states: Tensor,  # (N, H)
    target_ids: Tensor,  # (N,)
    request: Request,
) -> tuple[RowStatistics, Tensor]:
    """The same pass, and U = dlogp/dh, (N, H) in the dtype of the hidden states."""
    plan = _Plan(request)
    rows_at_once = plan.rows_within(request.bounds.buffer_bytes, stores_exponentials=True)
    gradients = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    chunks = []
    for rows in _chunks(len(target_ids), rows_at_once):
        partial = _Partial(plan, hidden_states[rows], target_ids[rows], stores_exponentials=True)
        partial.run_logits()
        chunks.append(partial.combined())
        partial.run_gradient(chunks[-1], gradients[rows])
    statistics = joined_statistics(chunks) if chunks else empty_statistics(hidden_states, request)
    return statistics, gradients


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


@dataclass
class _Plan:
    """What a call's chunks have in common."""

    request: Request
    config: LaunchConfig = field(init=False)
    tiles: int = field(init=False)
    weight: Tensor = field(init=False)  # rows contiguous

    def __post_init__(self) -> None:
        weight = self.request.weight
        self.weight = weight if weight.stride(-1) == 1 else weight.contiguous()
        self.config = config_for(weight)
        self.tiles = -(-weight.shape[0] // self.config.block_v)

    @property
    def padded_vocabulary(self) -> int:
        return self.tiles * self.config.block_v

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of E. The interpreter keeps bf16 values in fp32, its own bf16 being unsound."""
        return torch.float32 if is_interpreted() else self.weight.dtype

    @property
    def exponential_scale(self) -> float:
        """fp16 has few exponents: 2^14 keeps probabilities down to 4e-12 of the row's largest."""
        return 2.0**14 if self.weight.dtype == torch.float16 else 1.0

    @property
    def precision(self) -> str:
        """Products of fp32 operands stay fp32, never TF32."""
        return "ieee"

    def rows_within(self, buffer_bytes: int, *, stores_exponentials: bool) -> int:
        """Rows whose buffers fit the bound: whole row tiles, or at least 16 rows."""
        per_row = self.tiles * 4 * (6 if self.request.outputs else 2)
        if stores_exponentials:
            per_row += self.padded_vocabulary * self.stored_dtype.itemsize
        rows = buffer_bytes // per_row
        step = self.config.block_n if rows >= self.config.block_n else 16
        return max(16, rows // step * step)


class _Partial:
    """The buffers of one chunk of rows."""

    def __init__(
        self, plan: _Plan, hidden_states: Tensor, target_ids: Tensor, *, stores_exponentials: bool
    ) -> None:
        self.plan = plan
        self.hidden_states = hidden_states
        if hidden_states.stride(-1) != 1:
            self.hidden_states = hidden_states.contiguous()
        self.target_ids = target_ids.contiguous()
        self.rows = len(target_ids)

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=hidden_states.device)

        self.offsets = buffer(plan.tiles, self.rows)
        self.sums = buffer(plan.tiles, self.rows)
        self.target_logits = buffer(self.rows)
        self.moments = [
            buffer(plan.tiles, self.rows) for _ in range(4 if plan.request.outputs else 0)
        ]
        self.exponentials = None
        if stores_exponentials:
            shape = (self.rows, plan.padded_vocabulary)
            self.exponentials = buffer(*shape, dtype=plan.stored_dtype)
        self.row_offsets = buffer(self.rows)
        self.row_sums = buffer(self.rows)

    def run_logits(self) -> None:
        """First GEMM: tile statistics, the target's logit and, if kept, E."""
        from . import _triton

        plan, config, weight = self.plan, self.plan.config, self.plan.weight
        transform, bias = plan.request.transform, plan.request.bias
        vocabulary, hidden_size = weight.shape
        unused = self.sums
        moments = self.moments or [unused] * 4
        exponentials = unused if self.exponentials is None else self.exponentials
        grid = (-(-self.rows // config.block_n) * plan.tiles,)
        launch: Any = _triton.logits_kernel[grid]
        launch(
            self.hidden_states,
            weight,
            weight if bias is None else bias.contiguous(),
            self.target_ids,
            self.offsets,
            self.sums,
            self.target_logits,
            exponentials,
            *moments,
            self.rows,
            vocabulary,
            hidden_size,
            self.hidden_states.stride(0),
            weight.stride(0),
            exponentials.stride(0),
            transform.factor,
            transform.softcap or 1.0,
            1.0 / transform.temperature,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=transform.softcap is not None,
            STORE_E=self.exponentials is not None,
            EXTRAS=bool(self.moments),
            EVEN_H=hidden_size % config.block_h == 0,
            E_SCALE=plan.exponential_scale,
            EMULATE_BF16=is_interpreted() and weight.dtype == torch.bfloat16,
            PRECISION=plan.precision,
            BLOCK_N=config.block_n,
            BLOCK_V=config.block_v,
            BLOCK_H=config.block_h,
            GROUP=ROW_TILES_PER_GROUP,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )

    def combined(self) -> RowStatistics:
        """Partial sums to log-probs, tile by tile in order."""
        from . import _triton

        logps, mass = torch.empty_like(self.row_sums), torch.empty_like(self.row_sums)
        launch: Any = _triton.combine_kernel[(-(-self.rows // 128),)]
        launch(
            self.offsets,
            self.sums,
            self.target_logits,
            self.row_offsets,
            self.row_sums,
            logps,
            mass,
            self.rows,
            self.plan.tiles,
            BLOCK=128,
            num_warps=4,
            enable_fp_fusion=True,
        )
        return RowStatistics(
            logps=logps,
            target_logits=self.target_logits,
            max_others=self.row_offsets * LN_2,
            sum_others=self.row_sums,
            mass_others=mass,
            extras=self._extras() if self.moments else {},
        )

    def run_gradient(self, statistics: RowStatistics, gradients: Tensor) -> None:
        """Second GEMM: E @ W with the exact power-of-two shift, U formed in its epilogue."""
        from . import _triton

        plan, config, weight = self.plan, self.plan.config, self.plan.weight
        transform, skip_mass = plan.request.transform, plan.request.bounds.skip_mass
        assert self.exponentials is not None, "the first GEMM has kept E"
        vocabulary, hidden_size = weight.shape
        constant = transform.factor / transform.temperature
        slope = transform.slope(self.target_logits)
        if not isinstance(slope, Tensor):
            slope = torch.full_like(self.target_logits, slope)
        emulates = is_interpreted() and weight.dtype == torch.bfloat16
        grid = (
            -(-self.rows // config.gradient_block_n),
            -(-hidden_size // config.gradient_block_h),
        )
        launch: Any = _triton.gradient_kernel[grid]
        launch(
            self.exponentials,
            weight,
            self.target_ids,
            self.offsets,
            self.sums,
            self.row_offsets,
            self.row_sums,
            statistics.mass_others,
            slope / constant,
            gradients,
            self.rows,
            vocabulary,
            hidden_size,
            plan.tiles,
            self.exponentials.stride(0),
            weight.stride(0),
            gradients.stride(0),
            constant,
            skip_mass,
            SKIPS=skip_mass > 0.0,
            EVEN_H=hidden_size % config.gradient_block_h == 0,
            E_SCALE=plan.exponential_scale,
            EMULATE_BF16=emulates,
            ROUND_OUTPUT=is_interpreted() and gradients.dtype == torch.bfloat16,
            PRECISION=plan.precision,
            BLOCK_N=config.gradient_block_n,
            BLOCK_H=config.gradient_block_h,
            BLOCK_V=config.block_v,
            BLOCK_K=config.gradient_block_k,
            num_warps=config.gradient_num_warps,
            num_stages=config.gradient_num_stages,
            enable_fp_fusion=True,
        )

    def _extras(self) -> dict[str, Tensor]:
        largest, weighted, plain, squares = self.moments
        shifts = torch.exp2(self.offsets - self.row_offsets)
        return extra_figures(
            self.plan.request.outputs,
            vocabulary=self.plan.weight.shape[0],
            max_others=largest.amax(dim=0),
            sum_others=self.row_sums,
            weighted=(weighted * shifts).double().sum(dim=0),
            plain=plain.double().sum(dim=0),
            squares=(squares * shifts**2).double().sum(dim=0),
            target_logits=self.target_logits,
            log_ratio=(self.row_offsets.double() * LN_2 + self.row_sums.double().log())
            - self.target_logits.double(),
        )
