"""Buffers of a call of the Triton kernels: one set inside its bound, and its results."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._configs import LaunchConfig, config_for, is_interpreted, processors_of, rows_in_whole_waves
from ._torch import Request, RowStatistics, extra_metrics

SCORE_BYTES = 16 * 2**20
"""Bound of the partial statistics of a scoring pass."""

LN_2 = math.log(2.0)


@dataclass
class Plan:
    """Facts that all chunks of one call share."""

    request: Request
    config: LaunchConfig = None  # pyrefly: ignore[bad-assignment]
    tiles: int = field(init=False)
    weight: Tensor = field(init=False)  # rows contiguous

    def __post_init__(self) -> None:
        weight = self.request.weight
        self.weight = weight if weight.stride(-1) == 1 else weight.contiguous()
        self.config = self.config or config_for(weight)
        self.tiles = -(-weight.shape[0] // self.config.part_v)

    @property
    def padded_vocabulary(self) -> int:
        return self.tiles * self.config.part_v

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of E. The interpreter keeps bf16 values in fp32, its own bf16 being unsound."""
        return torch.float32 if self.emulates_bf16 else self.weight.dtype

    @property
    def one_scale(self) -> bool:
        """Return True if E has one scale per row; fp16 has too few exponents for it."""
        return self.weight.dtype != torch.float16

    @property
    def skips(self) -> bool:
        return self.request.bounds.skip_mass > 0.0

    @property
    def multiplies(self) -> bool:
        """Return True if torch multiplies E @ W: on one scale, whole, and never rounded to TF32."""
        plain = self.one_scale and not self.skips and not self.config.gradient_in_triton
        return plain and (is_interpreted() or self.weight.dtype == torch.bfloat16)

    @property
    def exponential_scale(self) -> float:
        """fp16 has few exponents: 2^14 keeps probabilities down to 4e-12 of the row's largest."""
        return 1.0 if self.one_scale else 2.0**14

    @property
    def emulates_bf16(self) -> bool:
        return is_interpreted() and self.weight.dtype == torch.bfloat16

    def scratch_entries(self, *, stores_exponentials: bool) -> int:
        """Entries per row of the partial statistics, whose place the product takes after them."""
        product = self.weight.shape[1] if stores_exponentials and self.multiplies else 0
        return max(self.tiles * self.partials, product)

    @property
    def partials(self) -> int:
        """Numbers per row and tile: offset, sum and, for outputs, four moments."""
        return 6 if self.request.outputs else 2

    def row_bytes(self, *, stores_exponentials: bool) -> int:
        """Bytes of all buffers per row."""
        per_row = 4 + 4 * self.scratch_entries(stores_exponentials=stores_exponentials)
        if stores_exponentials:
            per_row += self.padded_vocabulary * self.stored_dtype.itemsize
            per_row += 8 * self.tiles if self.skips else 0  # while the tiles to sum are chosen
        return per_row

    def chunk_rows(self, count: int, *, stores_exponentials: bool) -> int:
        """Rows at a time for `count` of them: what the bound holds, in whole waves of the GPU."""
        bound = self.request.bounds.buffer_bytes if stores_exponentials else SCORE_BYTES
        most = bound // self.row_bytes(stores_exponentials=stores_exponentials)
        if count <= most:
            return count
        return rows_in_whole_waves(most, self.weight.shape[1], processors_of(self.weight))


class Call:
    """The buffers of one call, and what it leaves per row."""

    def __init__(
        self, plan: Plan, hidden_states: Tensor, target_ids: Tensor, gradients: Tensor | None
    ) -> None:
        self.plan = plan
        self.hidden_states = hidden_states
        if hidden_states.stride(-1) != 1:
            self.hidden_states = hidden_states.contiguous()
        self.target_ids = target_ids.contiguous()
        self.gradients = gradients
        count, stores = len(target_ids), gradients is not None
        self.rows_at_once = plan.chunk_rows(count, stores_exponentials=stores)

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=hidden_states.device)

        self.logps, self.mass = buffer(count), buffer(count)
        self.target_logits = buffer(count)
        self.row_offsets, self.row_sums = buffer(count), buffer(count)
        extras = bool(plan.request.outputs)
        self.row_moments = buffer(4, count, dtype=torch.float64) if extras else None
        self.references = buffer(self.rows_at_once)
        self.scratch = buffer(self.rows_at_once * plan.scratch_entries(stores_exponentials=stores))
        self.exponentials = None
        if stores:
            shape = (self.rows_at_once, plan.padded_vocabulary)
            self.exponentials = buffer(*shape, dtype=plan.stored_dtype)

    def slices(self) -> Iterator[slice]:
        """The chunks' rows."""
        count = len(self.target_ids)
        for start in range(0, count, self.rows_at_once):
            yield slice(start, min(start + self.rows_at_once, count))

    def statistics(self) -> RowStatistics:
        extras = {}
        if self.row_moments is not None:
            largest, weighted, plain, squares = self.row_moments
            log_sums = self.row_offsets.double() * LN_2 + self.row_sums.double().log()
            extras = extra_metrics(
                self.plan.request.outputs,
                vocabulary=self.plan.weight.shape[0],
                max_others=largest,
                sum_others=self.row_sums,
                weighted=weighted,
                plain=plain,
                squares=squares,
                target_logits=self.target_logits,
                log_ratio=log_sums - self.target_logits.double(),
            )
        return RowStatistics(
            logps=self.logps,
            target_logits=self.target_logits,
            max_others=self.row_offsets * LN_2,
            sum_others=self.row_sums,
            mass_others=self.mass,
            extras=extras,
        )
