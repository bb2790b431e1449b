"""From the exact sum to the dtype that is written: to the nearest number, or at random.

Where updates are smaller than half the distance between two numbers of the dtype, rounding to
nearest gives back the base. Stochastic rounding takes the upper neighbor with a probability that
makes the mean exact: of many small updates the sum is kept, at the price of some noise.
"""

import hashlib
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

ROUNDED = (torch.bfloat16, torch.float16)
"""The dtypes that can swallow an update; wider ones are rounded to nearest."""

SWALLOWED = 0.5
"""An update counts as swallowed where nearest leaves more than this share of a tensor as it was.

Stochastic rounding has twice the variance of rounding to nearest, so it is used only there.
"""

_AT_ONCE = 2**22


@dataclass(frozen=True, slots=True)
class Rounding:
    """Counts that say what became of a tensor's update, or of the updates of all tensors.

    Attributes:
        weights: how many weights were updated.
        unchanged_nearest: how many of them rounding to nearest leaves as they were.
        unchanged_written: how many are as they were in what was written.
        stochastic: how many lie in tensors that were rounded stochastically.
    """

    weights: int = 0
    unchanged_nearest: int = 0
    unchanged_written: int = 0
    stochastic: int = 0

    def __add__(self, other: "Rounding") -> "Rounding":
        return Rounding(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))


def _values(rounding: Rounding) -> tuple[int, ...]:
    return tuple(asdict(rounding).values())


def round_update(
    before: Tensor, after: Tensor, dtype: torch.dtype, *, stochastic: bool, seed: str
) -> tuple[Tensor, Rounding]:
    """Round an updated tensor, stochastically where nearest would swallow its update.

    Args:
        before: the tensor without the update, of any floating dtype.
        after: the exact tensor, fp32 or fp64, of the same shape.
        dtype: of the result, one of `ROUNDED`.
        stochastic: False rounds to nearest in any case.
        seed: the draws are a function of this text alone.
    """
    start, nearest = before.to(dtype), after.to(dtype)
    weights, unchanged = nearest.numel(), int((nearest == start).sum())
    if not stochastic or unchanged <= SWALLOWED * weights:
        return nearest, Rounding(weights, unchanged, unchanged, 0)
    # What the base loses in this dtype it has lost: drawing that too would only add noise.
    drawn = round_stochastically(after + (start.to(after.dtype) - before), dtype, seed)
    return drawn, Rounding(weights, unchanged, int((drawn == start).sum()), weights)


def round_stochastically(exact: Tensor, dtype: torch.dtype, seed: str) -> Tensor:
    """Round to one of the two neighbors in a 16-bit dtype; the expectation is the exact value.

    A number of the dtype stays as it is, and so does one beyond the largest.

    Args:
        exact: fp32 or fp64, of any shape.
        dtype: one of `ROUNDED`.
        seed: the draws are a function of this text alone.
    """
    digest = hashlib.sha256(seed.encode()).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    rounded = torch.empty(exact.shape, dtype=dtype)
    flat, result = exact.reshape(-1), rounded.view(-1)
    for first in range(0, flat.numel(), _AT_ONCE):
        part = flat[first : first + _AT_ONCE]
        bits = part.to(dtype).view(torch.int16)
        # Of both dtypes the bits, but for the sign, count the numbers up from zero.
        away = bits.view(dtype).to(part.dtype).abs() > part.abs()
        lower = bits - away.to(torch.int16)
        below, above = (each.view(dtype).to(part.dtype).abs() for each in (lower, lower + 1))
        share = (part.abs() - below) / (above - below)
        up = torch.rand(part.shape, generator=draw) < torch.where(above.isfinite(), share, 0.0)
        result[first : first + _AT_ONCE] = (lower + up.to(torch.int16)).view(dtype)
    return rounded
