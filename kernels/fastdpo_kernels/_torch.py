"""The torch twin: the fused log-prob in tiles of plain torch operations, on any device and dtype.

Notation: h (R, H) rows, W (V, H), t targets, z logits after the transform, and, over the columns
other than the target, m their largest z, s = sum exp(z - m), lse_o = m + log s. With
d = lse_o - z_t the log-prob is -softplus(d) and 1 - p = sigmoid(d).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

ROWS_CPU, ROWS_CUDA = 256, 1024
"""Rows per chunk. One fixed size, the last chunk padded: GEMM kernels differ by row count, so a
row's bits would otherwise depend on how many neighbours it has."""

TILE_BYTES = 32 * 2**20
"""Bound of one logits tile, and of one upcast tile of W on the CPU."""


@dataclass(frozen=True)
class LogitTransform:
    """z = cap(factor * a) / temperature of the raw logits a = h @ W.T + bias."""

    softcap: float | None = None
    factor: float = 1.0
    temperature: float = 1.0

    def logits(self, raw: Tensor) -> Tensor:
        """Raw logits to z, same shape and dtype."""
        z = raw if self.factor == 1.0 else raw * self.factor
        if self.softcap is not None:
            z = torch.tanh(z / self.softcap) * self.softcap
        return z if self.temperature == 1.0 else z / self.temperature

    def slope(self, z: Tensor) -> Tensor | float:
        """Dz / da, from z itself."""
        constant = self.factor / self.temperature
        if self.softcap is None:
            return constant
        return (1.0 - (z * (self.temperature / self.softcap)) ** 2) * constant


@dataclass(frozen=True)
class Bounds:
    """How much a pass that forms gradients may hold and drop.

    Attributes:
        buffer_bytes: of temporary buffers; what takes the hidden states' place is not counted.
        skip_mass: most probability mass whose gradient a row may leave out; 0 is exact.
    """

    buffer_bytes: int = 276 * 2**20
    skip_mass: float = 0.0


@dataclass(frozen=True)
class Request:
    """Arguments of a call that hold for every row of it.

    Attributes:
        weight: (V, H).
        bias: (V,) or None.
        transform: from raw logits to z.
        outputs: names of the extra metrics.
        bounds: what a pass that forms gradients may hold and drop.
    """

    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform
    outputs: tuple[str, ...] = ()
    bounds: Bounds = Bounds()

    def bias_of(self, start: int, stop: int) -> Tensor | None:
        """The bias of a column range."""
        return None if self.bias is None else self.bias[start:stop]


@dataclass
class RowStatistics:
    """Statistics of one pass over the vocabulary; (R,) each, in the accumulation dtype."""

    logps: Tensor
    target_logits: Tensor
    max_others: Tensor
    sum_others: Tensor
    mass_others: Tensor  # sigmoid(d) = 1 - p of the target
    mean_weights: Tensor | None = None  # (R, H): sum over v != t of p_v dz_v/da_v W_v, over 1 - p
    extras: dict[str, Tensor] = field(default_factory=dict)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; everything else is accumulated in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_per_chunk(device: torch.device) -> int:
    """How many rows are worked at a time."""
    return ROWS_CUDA if device.type == "cuda" else ROWS_CPU


def vocabulary_tiles(weight: Tensor) -> list[tuple[int, int]]:
    """Column ranges [start, stop) of V; they depend on the weight and its device alone."""
    vocabulary, hidden = weight.shape
    columns = TILE_BYTES // (4 * rows_per_chunk(weight.device))
    if not weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16):
        columns = min(columns, max(1, TILE_BYTES // (4 * hidden)))
    return [(start, min(start + columns, vocabulary)) for start in range(0, vocabulary, columns)]


def row_chunks(count: int, device: torch.device) -> Iterator[slice]:
    """Slices that cover `count` rows, of the fixed size but for the last."""
    size = rows_per_chunk(device)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def padded(rows: Tensor, size: int) -> Tensor:
    """`rows` with zero rows appended up to `size`."""
    if rows.shape[0] == size:
        return rows
    out = rows.new_zeros((size, *rows.shape[1:]))
    out[: rows.shape[0]] = rows
    return out


def matmul(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """The product with sums in fp32 (fp64 for fp64), on CUDA from operands of right's dtype."""
    dtype = accumulation_dtype(right.dtype)
    with torch.autocast(right.device.type, enabled=False):  # it would round fp32 operands to bf16
        if right.is_cuda and right.dtype != dtype:
            return torch.mm(left.to(right.dtype), right, out_dtype=dtype, out=out)
        return torch.mm(left.to(dtype), right.to(dtype), out=out)


def score(
    hidden_states: Tensor,  # (N, H)
    target_ids: Tensor,  # (N,)
    request: Request,
    *,
    with_mean_weights: bool = False,
) -> RowStatistics:
    """One pass over the vocabulary for all rows, chunk by chunk."""
    size = rows_per_chunk(hidden_states.device)
    chunks = []
    for rows in row_chunks(hidden_states.shape[0], hidden_states.device):
        states, targets = padded(hidden_states[rows], size), padded(target_ids[rows], size)
        chunk = _score_chunk(states, targets, request, with_mean_weights)
        chunks.append(_first_rows(chunk, rows.stop - rows.start))
    return joined_statistics(chunks) if chunks else empty_statistics(hidden_states, request)


def score_with_gradient(
    hidden_states: Tensor,  # (N, H)
    target_ids: Tensor,  # (N,)
    request: Request,
) -> tuple[RowStatistics, Tensor]:
    """Score, and return U = dlogp/dh = sigmoid(d) (slope_t W_t - E_o[slope W]) too, (N, H).

    Its tiles are small whatever the bounds allow, and it drops nothing.
    """
    gradients = torch.empty_like(hidden_states)
    chunks = []
    for rows in row_chunks(hidden_states.shape[0], hidden_states.device):
        targets = target_ids[rows]
        chunk = score(hidden_states[rows], targets, request, with_mean_weights=True)
        slope = request.transform.slope(chunk.target_logits)
        if isinstance(slope, Tensor):
            slope = slope[:, None]
        toward_target = request.weight[targets].to(chunk.logps.dtype) * slope
        assert chunk.mean_weights is not None, "asked for above"
        gradients[rows] = chunk.mass_others[:, None] * (toward_target - chunk.mean_weights)
        chunk.mean_weights = None
        chunks.append(chunk)
    statistics = joined_statistics(chunks) if chunks else empty_statistics(hidden_states, request)
    return statistics, gradients


def _score_chunk(
    hidden_states: Tensor,  # (R, H)
    target_ids: Tensor,  # (R,)
    request: Request,
    with_mean_weights: bool,
) -> RowStatistics:
    weight, transform, outputs = request.weight, request.transform, request.outputs
    dtype = accumulation_dtype(hidden_states.dtype)
    count = hidden_states.shape[0]
    maximum = hidden_states.new_full((count,), -torch.inf, dtype=dtype)
    sum_others = torch.zeros_like(maximum)
    target_logits = torch.zeros_like(maximum)
    mean_weights = hidden_states.new_zeros(hidden_states.shape, dtype=dtype)
    moments = _Moments(outputs, maximum)
    for start, stop in vocabulary_tiles(weight):
        tile = weight[start:stop]
        z = logits_tile(hidden_states, tile, request.bias_of(start, stop), transform)
        target_logits += take_target(z, target_ids, start)
        new_maximum = torch.maximum(maximum, z.amax(dim=1))
        # No other column seen yet: exp(-inf - -inf) would be NaN.
        pivot = new_maximum.clamp_min(torch.finfo(dtype).min)
        rescale = torch.exp(maximum - pivot)
        slope = transform.slope(z) if with_mean_weights else 1.0
        # In place where nothing else wants the logits: the tile is most of the memory traffic.
        exponentials = torch.exp(z - pivot[:, None]) if outputs else z.sub_(pivot[:, None]).exp_()
        sum_others = sum_others * rescale + exponentials.sum(dim=1)
        moments.add(z, exponentials, rescale)
        if with_mean_weights:
            if isinstance(slope, Tensor):  # the target column holds -inf: its slope is not one
                weighted = matmul(exponentials * torch.where(exponentials > 0, slope, 0.0), tile)
            else:
                weighted = matmul(exponentials, tile).mul_(slope)
            mean_weights = mean_weights * rescale[:, None] + weighted
        maximum = new_maximum
    log_ratio = (maximum + torch.log(sum_others) - target_logits).double()
    logps = (-softplus(log_ratio)).to(dtype)
    mass_others = torch.sigmoid(log_ratio).to(dtype)
    extras = extra_metrics(
        outputs,
        vocabulary=weight.shape[0],
        max_others=maximum,
        sum_others=sum_others,
        weighted=moments.weighted,
        plain=moments.plain,
        squares=moments.squares,
        target_logits=target_logits,
        log_ratio=log_ratio,
    )
    return RowStatistics(
        logps,
        target_logits,
        maximum,
        sum_others,
        mass_others,
        mean_weights / sum_others.clamp_min(torch.finfo(dtype).tiny)[:, None]
        if with_mean_weights
        else None,
        extras,
    )


def logits_tile(
    hidden_states: Tensor,  # (R, H)
    weight_tile: Tensor,  # (C, H)
    bias_tile: Tensor | None,  # (C,)
    transform: LogitTransform,
) -> Tensor:
    """Logits z of one tile, (R, C), in the accumulation dtype."""
    raw = matmul(hidden_states, weight_tile.T)
    if bias_tile is not None:
        raw += bias_tile
    return transform.logits(raw)


def take_target(z: Tensor, target_ids: Tensor, start: int) -> Tensor:
    """The target's logit where it lies in this tile, else 0; its column in z becomes -inf."""
    columns = target_ids - start
    inside = (columns >= 0) & (columns < z.shape[1])
    columns = torch.where(inside, columns, 0)[:, None]
    values = z.gather(1, columns)
    taken = torch.where(inside, values.squeeze(1), 0.0)
    z.scatter_(1, columns, torch.where(inside[:, None], -torch.inf, values))
    return taken


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) to the last bits; torch's own is the identity above 20."""
    return x.clamp_min(0) + torch.log1p(torch.exp(-x.abs()))


class _Moments:
    """Running sums over the vocabulary for the extra outputs, nothing when none is asked for."""

    def __init__(self, outputs: tuple[str, ...], like: Tensor) -> None:
        self.outputs = outputs
        self.weighted = torch.zeros_like(like)
        self.plain = torch.zeros_like(like)
        self.squares = torch.zeros_like(like)

    def add(self, z: Tensor, exponentials: Tensor, rescale: Tensor) -> None:
        """Take in one tile whose target column is -inf."""
        if "entropy" in self.outputs:
            products = torch.where(exponentials > 0, exponentials * z, 0.0)
            self.weighted = self.weighted * rescale + products.sum(dim=1)
        if "mean_logits" in self.outputs:
            self.plain = self.plain + torch.where(z == -torch.inf, 0.0, z).sum(dim=1)
        if "log_sum_sq_probs" in self.outputs:
            self.squares = self.squares * rescale**2 + (exponentials**2).sum(dim=1)


def extra_metrics(
    outputs: tuple[str, ...],
    *,
    vocabulary: int,
    max_others: Tensor,
    sum_others: Tensor,
    weighted: Tensor,  # sum of exp(z - m) z
    plain: Tensor,  # sum of z
    squares: Tensor,  # sum of exp(z - m)^2
    target_logits: Tensor,
    log_ratio: Tensor,  # d, fp64
) -> dict[str, Tensor]:
    """The asked metrics, (R,) each, over the whole vocabulary, target included."""
    dtype = target_logits.dtype
    mass, target_mass = torch.sigmoid(log_ratio), torch.sigmoid(-log_ratio)
    safe_sum = sum_others.clamp_min(torch.finfo(sum_others.dtype).tiny).double()
    metrics: dict[str, Tensor] = {}
    if "entropy" in outputs:
        lse = target_logits + softplus(log_ratio)
        expected = mass * weighted / safe_sum + target_mass * target_logits
        metrics["entropy"] = (lse - expected).to(dtype)
    if "mean_logits" in outputs:
        metrics["mean_logits"] = ((plain + target_logits) / vocabulary).to(dtype)
    if "is_top1" in outputs:
        metrics["is_top1"] = target_logits >= max_others
    if "log_sum_sq_probs" in outputs:
        others = mass**2 * squares / safe_sum**2
        metrics["log_sum_sq_probs"] = torch.log(others + target_mass**2).to(dtype)
    return metrics


def _first_rows(rows: RowStatistics, count: int) -> RowStatistics:
    """The statistics without the padding rows."""
    return RowStatistics(
        rows.logps[:count],
        rows.target_logits[:count],
        rows.max_others[:count],
        rows.sum_others[:count],
        rows.mass_others[:count],
        None if rows.mean_weights is None else rows.mean_weights[:count],
        {name: metric[:count] for name, metric in rows.extras.items()},
    )


def empty_statistics(like: Tensor, request: Request) -> RowStatistics:
    """The statistics of no rows."""
    empty = like.new_empty((0,), dtype=accumulation_dtype(like.dtype))
    extras = {name: empty.bool() if name == "is_top1" else empty for name in request.outputs}
    return RowStatistics(empty, empty, empty, empty, empty, extras=extras)


def joined_statistics(chunks: list[RowStatistics]) -> RowStatistics:
    """The statistics of all chunks' rows, in order; mean weights stay with their chunk."""
    first, *others = chunks
    if not others:
        return first
    return RowStatistics(
        torch.cat([chunk.logps for chunk in chunks]),
        torch.cat([chunk.target_logits for chunk in chunks]),
        torch.cat([chunk.max_others for chunk in chunks]),
        torch.cat([chunk.sum_others for chunk in chunks]),
        torch.cat([chunk.mass_others for chunk in chunks]),
        extras={name: torch.cat([chunk.extras[name] for chunk in chunks]) for name in first.extras},
    )
