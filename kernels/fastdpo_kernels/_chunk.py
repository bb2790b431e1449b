"""The kernel launches that work one chunk of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._buffers import Call
from ._configs import ROW_TILES_PER_GROUP, is_interpreted
from ._torch import matmul

PRECISION = "ieee"
"""Precision of products in Triton: those of fp32 operands stay fp32, never TF32."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch: everything that decides what is compiled, and what runs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3

    def run(self) -> None:
        """Launch it on the current stream."""
        self.kernel[self.grid](**self.arguments, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """Compile options beside the arguments."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**options, "enable_fp_fusion": True}


class Chunk:
    """One slice of a call's rows, and the launches that work it."""

    def __init__(self, call: Call, rows: slice) -> None:
        self.plan = plan = call.plan
        self.rows = rows.stop - rows.start
        self.hidden_states, self.target_ids = call.hidden_states[rows], call.target_ids[rows]
        self.logps, self.mass = call.logps[rows], call.mass[rows]
        self.target_logits = call.target_logits[rows]
        self.row_offsets, self.row_sums = call.row_offsets[rows], call.row_sums[rows]
        self.references = call.references[: self.rows]
        partials = call.scratch[: plan.partials * plan.tiles * self.rows]
        partials = partials.view(plan.partials, plan.tiles, self.rows)
        self.offsets, self.sums, *self.moments = partials
        self.row_moments = None if call.row_moments is None else call.row_moments[:, rows]
        self.exponentials = self.product = self.gradients = None
        if call.gradients is not None and call.exponentials is not None:
            self.exponentials = call.exponentials[: self.rows]
            self.gradients = call.gradients[rows]
            if plan.multiplies:  # in the partial statistics' place: they are done with by then
                hidden_size = plan.weight.shape[1]
                product = call.scratch[: self.rows * hidden_size]
                self.product = product.view(self.rows, hidden_size)

    def scoring(self) -> Iterator[Launch]:
        """Targets' logits, first GEMM and fold: the same for a score and for a gradient."""
        yield self.target()
        yield self.logits()
        yield self.combine()

    def _head(self) -> dict[str, Any]:
        """Arguments of the kernels that turn hidden states into logits."""
        weight, bias = self.plan.weight, self.plan.request.bias
        return {
            "hidden_ptr": self.hidden_states,
            "weight_ptr": weight,
            "bias_ptr": weight if bias is None else bias.contiguous(),
            "target_ptr": self.target_ids,
            "rows": self.rows,
            "hidden_size": weight.shape[1],
            "hidden_stride": self.hidden_states.stride(0),
            "weight_stride": weight.stride(0),
            "factor": float(self.plan.request.transform.factor),
            **self._cap(),
            "HAS_BIAS": bias is not None,
        }

    def _cap(self) -> dict[str, Any]:
        transform = self.plan.request.transform
        return {
            "softcap": float(transform.softcap or 1.0),
            "inverse_temperature": 1.0 / transform.temperature,
            "HAS_SOFTCAP": transform.softcap is not None,
        }

    def target(self) -> Launch:
        """The target's logit, and from it the row's offset."""
        from . import _triton

        block_n = 4
        arguments = {
            **self._head(),
            "target_logit_ptr": self.target_logits,
            "reference_ptr": self.references,
            "BLOCK_N": block_n,
            "BLOCK_H": 512,
        }
        return Launch(_triton.target_kernel, (-(-self.rows // block_n),), arguments)

    def logits(self) -> Launch:
        """First GEMM: tile statistics and, if kept, E."""
        from . import _triton

        plan, config = self.plan, self.plan.config
        maxima, weighted, plain, squares = self.moments or [self.sums] * 4
        exponentials = self.sums if self.exponentials is None else self.exponentials
        arguments = {
            **self._head(),
            "reference_ptr": self.references,
            "offset_ptr": self.offsets,
            "sum_ptr": self.sums,
            "exponential_ptr": exponentials,
            "max_ptr": maxima,
            "weighted_ptr": weighted,
            "plain_ptr": plain,
            "square_ptr": squares,
            "vocabulary": plan.weight.shape[0],
            "exponential_stride": exponentials.stride(0),
            "ONE_SCALE": plan.one_scale,
            "STORE_E": self.exponentials is not None,
            "EXTRAS": bool(self.moments),
            "EVEN_H": plan.weight.shape[1] % config.block_h == 0,
            "E_SCALE": plan.exponential_scale,
            "EMULATE_BF16": plan.emulates_bf16,
            "PRECISION": PRECISION,
            "BLOCK_N": config.block_n,
            "BLOCK_V": config.block_v,
            "BLOCK_H": config.block_h,
            "PART_V": config.part_v,
            "GROUP": ROW_TILES_PER_GROUP,
        }
        columns = -(-plan.weight.shape[0] // config.block_v)
        grid = (-(-self.rows // config.block_n) * columns,)
        return Launch(_triton.logits_kernel, grid, arguments, config.num_warps, config.num_stages)

    def combine(self) -> Launch:
        """Partial sums to log-probs, in a fixed order."""
        from . import _triton

        maxima, weighted, plain, squares = self.moments or [self.sums] * 4
        row_moments = self.row_sums[None] if self.row_moments is None else self.row_moments
        block_n = 16
        arguments = {
            "offset_ptr": self.offsets,
            "sum_ptr": self.sums,
            "target_logit_ptr": self.target_logits,
            "row_offset_ptr": self.row_offsets,
            "row_sum_ptr": self.row_sums,
            "logp_ptr": self.logps,
            "mass_ptr": self.mass,
            "max_ptr": maxima,
            "weighted_ptr": weighted,
            "plain_ptr": plain,
            "square_ptr": squares,
            "row_moment_ptr": row_moments,
            "rows": self.rows,
            "tiles": self.plan.tiles,
            "moment_stride": row_moments.stride(0),
            "EXTRAS": bool(self.moments),
            "BLOCK_N": block_n,
            "AT_ONCE": 64,
        }
        return Launch(_triton.combine_kernel, (-(-self.rows // block_n),), arguments)

    def rescale(self) -> Launch:
        """Rows with tiles on a scale of their own brought to one; the others are left alone."""
        from . import _triton_gradient

        assert self.exponentials is not None, "the first GEMM has kept E"
        arguments = {
            "exponential_ptr": self.exponentials,
            "reference_ptr": self.references,
            "offset_ptr": self.offsets,
            "row_offset_ptr": self.row_offsets,
            "rows": self.rows,
            "tiles": self.plan.tiles,
            "exponential_stride": self.exponentials.stride(0),
            "EMULATE_BF16": self.plan.emulates_bf16,
            "BLOCK_V": self.plan.config.part_v,
        }
        return Launch(_triton_gradient.rescale_kernel, (self.rows,), arguments)

    def multiply(self) -> None:
        """Second GEMM by torch: E @ W with fp32 sums, into the product's buffer."""
        assert self.exponentials is not None, "the first GEMM has kept E"
        matmul(self.exponentials[:, : self.plan.weight.shape[0]], self.plan.weight, self.product)

    def _ending(self) -> dict[str, Any]:
        """Arguments of the kernel that turns E @ W into U."""
        plan, gradients = self.plan, self.gradients
        assert gradients is not None, "a call with gradient"
        transform = plan.request.transform
        return {
            "weight_ptr": plan.weight,
            "target_ptr": self.target_ids,
            "target_logit_ptr": self.target_logits,
            "row_sum_ptr": self.row_sums,
            "mass_ptr": self.mass,
            "gradient_ptr": gradients,
            "hidden_size": plan.weight.shape[1],
            "weight_stride": plan.weight.stride(0),
            "gradient_stride": gradients.stride(0),
            "constant": transform.factor / transform.temperature,
            **self._cap(),
            "E_SCALE": plan.exponential_scale,
            "ROUND_OUTPUT": is_interpreted() and gradients.dtype == torch.bfloat16,
        }

    def finish(self) -> Launch:
        """U from the product."""
        from . import _triton_gradient

        block_h = 1024
        arguments = {**self._ending(), "product_ptr": self.product, "BLOCK_H": block_h}
        grid = (self.rows, -(-self.plan.weight.shape[1] // block_h))
        return Launch(_triton_gradient.finish_kernel, grid, arguments)

    def gradient(self) -> Launch:
        """Second GEMM by Triton, U formed in its epilogue."""
        from . import _triton_gradient

        plan, config, weight = self.plan, self.plan.config, self.plan.weight
        vocabulary, hidden_size = weight.shape
        block_h = config.gradient_block_h
        if not plan.one_scale:  # shifted sums take a second accumulator: half the width
            block_h = min(block_h, 128)
        stages = config.gradient_num_stages + 2 * plan.skips  # each load waits for another
        assert self.exponentials is not None, "the first GEMM has kept E"
        wanted, count = self._wanted_tiles() if plan.skips else (self.target_ids,) * 2
        descriptors = self._descriptors(block_h)
        arguments = {
            **self._ending(),
            "exponential_ptr": self.exponentials,
            "exponential_desc": descriptors[0],
            "weight_desc": descriptors[1],
            "offset_ptr": self.offsets,
            "row_offset_ptr": self.row_offsets,
            "wanted_ptr": wanted,
            "wanted_count_ptr": count,
            "rows": self.rows,
            "vocabulary": vocabulary,
            "tiles": plan.tiles,
            "exponential_stride": self.exponentials.stride(0),
            "SKIPS": plan.skips,
            "SHIFTS": not plan.one_scale,
            "TMA": descriptors[0] is not None,
            "EVEN_H": hidden_size % block_h == 0,
            "EMULATE_BF16": plan.emulates_bf16,
            "PRECISION": PRECISION,
            "BLOCK_N": config.gradient_block_n,
            "BLOCK_H": block_h,
            "BLOCK_V": config.part_v,
            "BLOCK_K": config.gradient_block_k,
        }
        grid = (-(-self.rows // config.gradient_block_n), -(-hidden_size // block_h))
        warps = config.gradient_num_warps
        return Launch(_triton_gradient.gradient_kernel, grid, arguments, warps, stages)

    def _descriptors(self, block_h: int) -> tuple[Any, Any]:
        """E and W for TMA, or None twice where it is not wanted or W is not 16-byte aligned."""
        config, weight, e = self.plan.config, self.plan.weight, self.exponentials
        aligned = weight.data_ptr() % 16 == 0 and weight.stride(0) * weight.itemsize % 16 == 0
        if not (config.gradient_by_tma and aligned) or e is None:
            return None, None
        from triton.tools.tensor_descriptor import TensorDescriptor

        block_n, block_k = config.gradient_block_n, config.gradient_block_k
        return (
            TensorDescriptor(e, list(e.shape), [e.stride(0), 1], [block_n, block_k]),
            TensorDescriptor(weight, list(weight.shape), [weight.stride(0), 1], [block_k, block_h]),
        )

    def _wanted_tiles(self) -> tuple[Tensor, Tensor]:
        """Per block of rows the tiles to sum, (blocks, tiles) in order, and how many, (blocks,).

        The tiles that hold least are left out, as many as hold at most `skip_mass` together, each
        counted by the row of the block that has most in it.
        """
        block, tiles = self.plan.config.gradient_block_n, self.plan.tiles
        share = self.mass / self.row_sums.clamp_min(1e-37)
        held = (self.offsets - self.row_offsets).exp2_().mul_(self.sums).mul_(share)
        held = torch.nn.functional.pad(held, (0, -self.rows % block))
        most = held.view(tiles, -1, block).amax(dim=2).T.nan_to_num(nan=torch.inf)
        ascending, order = most.sort(dim=1)
        kept = ascending.cumsum(dim=1) > self.plan.request.bounds.skip_mass
        wanted = torch.empty_like(kept).scatter_(1, order, kept)
        in_order = wanted.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
        return in_order.to(torch.int32), wanted.sum(dim=1, dtype=torch.int32)
