"""A tensor as rows of its last dimension, in the order in which they lie in memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowOrder:
    """How (..., H) becomes (N, H) and back without a copy where the strides allow it.

    Rows are independent, so a transposed tensor is worked in its own order, and what comes out has
    its strides, as elementwise ops of torch have it.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]  # the leading axes, the one with the largest stride first

    @classmethod
    def of(cls, x: Tensor) -> RowOrder:
        """The order of x's own memory."""
        leading = range(x.ndim - 1)
        return cls(tuple(x.shape), tuple(sorted(leading, key=lambda axis: -x.stride(axis))))

    @property
    def count(self) -> int:
        """N."""
        count = 1
        for size in self.shape[:-1]:
            count *= size
        return count

    def rows(self, x: Tensor) -> Tensor:
        """(N, H) with contiguous rows: a view, or a copy where x has no single stride for them."""
        rows = x.permute(*self.axes, -1).reshape(self.count, x.shape[-1])
        return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()

    def restored(self, rows: Tensor) -> Tensor:
        """(..., H) from (N, H), a view."""
        permuted = rows.view(*(self.shape[axis] for axis in self.axes), rows.shape[-1])
        inverse = sorted(range(len(self.axes)), key=lambda place: self.axes[place])
        return permuted.permute(*inverse, -1)
