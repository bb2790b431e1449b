"""act(gate) * up of a gated MLP: saves gate and up, and can write their gradients over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ._backend import is_small, rounding, row_tiles, uses_triton

KINDS = ("silu", "gelu_tanh", "gelu")
EAGER_BELOW = 2**23
"""Numbers in gate below which plain autograd is the faster on the CPU: it keeps act(gate)."""

BLOCK, WARPS = 1024, 4


def gated_activation(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    kind: str = "silu",
    overwrite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``act(gate) * up``, saving gate and up and nothing else.

    Args:
        gate: (..., I) bf16, fp16, fp32 or fp64; or (..., 2 I), gate and up side by side.
        up: like gate; None if gate holds both.
        kind: "silu" (SwiGLU), "gelu_tanh" (torch's approximate="tanh") or "gelu".
        overwrite: the backward may write the gradients over gate and up, which saves two tensors of
            their size. For outputs of a linear layer that nothing else reads: their values are gone
            after the backward, and autograd refuses a second one, or another node that had saved
            them, by name. Leaves, and tensors that overlap, are left as they are.
        backend: "triton" (CUDA; on the CPU under TRITON_INTERPRET=1), "torch" (any device), or
            "auto": triton on CUDA where it is installed, else torch, and for small inputs on the
            CPU plain autograd, which is faster there.

    Returns:
        (..., I) in gate's dtype, contiguous; differentiable once in gate and up.

    Raises:
        ValueError: shapes, dtypes or options disagree.
        RuntimeError: backend "triton" cannot run here; says what is missing.

    Numerics: fp32 inside (fp64 for fp64); act(gate), the product and both factors of the gradients
    are rounded to gate's dtype, as transformers' MLPs round them. The torch backend gives their
    values and gradients bit for bit; Triton's exp may tip a rounding.

    Source: GLU variants, arXiv:2002.05202.
    """
    options = options_of(gate, up, kind, overwrite, backend)
    given = (gate,) if up is None else (gate, up)
    with_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if is_small(backend, gate, EAGER_BELOW):
        left, right = gate.chunk(2, dim=-1) if up is None else (gate, up)
        return _act(left, kind) * right
    if with_gradient:
        return _GatedActivation.apply(gate, up, options)
    return options.product(gate, up)


@dataclass(frozen=True, slots=True)
class Options:
    """How a call computes."""

    kind: str
    triton: bool
    overwrite: bool

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """(N, I) of the two (N, I)."""
        out = gate.new_empty(gate.shape)
        if not self.triton:
            for tile in row_tiles(gate):
                torch.mul(_act(gate[tile], self.kind), up[tile], out=out[tile])
        elif out.numel():
            from . import _triton_gated_activation

            launch: Any = _triton_gated_activation.gated_activation_kernel[_grid(gate)]
            strides = gate.stride(0), up.stride(0)
            launch(gate, up, out, *strides, **self._constants(gate))
        return out

    def product(self, gate: Tensor, up: Tensor | None) -> Tensor:
        """(..., I) of gate and up as they are given."""
        return self.forward(*_halves(gate, up)).view(_out_shape(gate, up))

    def gradients(
        self, grad: Tensor, gate: Tensor, up: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of gate and up as they are given, in their place if that is allowed."""
        given = [t for t in (gate, up) if t is not None]
        written = [_rows(t) for t in given]
        if not self.overwrite:
            contiguous = torch.contiguous_format
            written = [torch.empty_like(row, memory_format=contiguous) for row in written]
        into = _halves(*written) if len(written) == 2 else _halves(written[0], None)
        self.backward(_rows(grad), *_halves(gate, up), into)
        if self.overwrite and self.triton:
            torch.autograd.graph.increment_version(written)
        grads = [row.view(t.shape) for row, t in zip(written, given, strict=True)]
        return grads[0], grads[1] if up is not None else None

    def backward(self, grad: Tensor, gate: Tensor, up: Tensor, into: tuple[Tensor, Tensor]) -> None:
        """Both gradients, (N, I), into two tensors, which may be gate and up themselves."""
        if not self.triton:
            for tile in row_tiles(gate):
                grad_up = _act(gate[tile], self.kind).mul_(grad[tile])
                grad_act = grad[tile] * up[tile]
                into[1][tile] = grad_up
                _slope_into(into[0][tile], grad_act, gate[tile], self.kind)
        elif grad.numel():
            from . import _triton_gated_activation

            launch: Any = _triton_gated_activation.gated_activation_gradient_kernel[_grid(gate)]
            tensors = grad, gate, up, *into
            launch(*tensors, *(t.stride(0) for t in tensors), **self._constants(gate))

    def _constants(self, gate: Tensor) -> dict[str, Any]:
        return {
            "KIND": self.kind,
            "ROUND": rounding(gate.dtype),
            "COLUMNS": gate.shape[-1],
            "BLOCK": BLOCK,
            "num_warps": WARPS,
            "enable_fp_fusion": False,
        }


class _GatedActivation(torch.autograd.Function):
    """Saves what it is given."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, options: Options) -> Tensor:
        ctx.options = options
        ctx.save_for_backward(gate, up)
        return options.product(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        gate, up = ctx.saved_tensors
        options: Options = ctx.options
        return *options.gradients(grad_outputs[0], gate, up), None


def options_of(
    gate: Tensor, up: Tensor | None, kind: str, overwrite: bool, backend: str
) -> Options:
    """Validate a call and settle how it computes; raises what `gated_activation` raises."""
    _validate(gate, up, kind)
    return Options(kind, uses_triton(backend, gate), overwrite and _may_overwrite(gate, up))


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gate and up as (N, I) with contiguous rows: views, or copies where the strides forbid it."""
    if up is not None:
        return _rows(gate), _rows(up)
    left, right = _rows(gate).chunk(2, dim=-1)
    return left, right


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _may_overwrite(gate: Tensor, up: Tensor | None) -> bool:
    """Return True if both are results whose elements lie in memory once, and do not overlap."""
    given = [t for t in (gate, up) if t is not None]
    rows = [_rows(t.detach()) for t in given]
    if any(t.grad_fn is None for t in given):
        return False
    if any(_storage(row) != _storage(t) for t, row in zip(given, rows, strict=True)):
        return False  # a copy
    if any(row.stride(0) < row.shape[1] for row in rows):
        return False
    if up is None or _storage(gate) != _storage(up):
        return True
    stride, width = rows[0].stride(0), rows[0].shape[1]
    distance = abs(int(gate.storage_offset()) - int(up.storage_offset())) % max(stride, 1)
    return rows[1].stride(0) == stride and width <= distance <= stride - width


def _storage(x: Tensor) -> int:
    """Which memory x lies in; of a tensor without memory, such as a fake one, too."""
    return x.untyped_storage()._cdata


def _out_shape(gate: Tensor, up: Tensor | None) -> tuple[int, ...]:
    width = gate.shape[-1]
    return (*gate.shape[:-1], width // 2 if up is None else width)


def _grid(gate: Tensor) -> tuple[int]:
    return (gate.shape[0] * -(-gate.shape[1] // BLOCK),)


def _act(x: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def _slope_into(out: Tensor, grad: Tensor, x: Tensor, kind: str) -> None:
    """The slope of act times grad into `out`, which may be x."""
    if kind == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)
    else:
        approximate = "tanh" if kind == "gelu_tanh" else "none"
        torch.ops.aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=out)


def _validate(gate: Tensor, up: Tensor | None, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} does not exist: choose from {KINDS}.")
    if not gate.is_floating_point() or gate.ndim < 1:
        raise ValueError(f"gate {tuple(gate.shape)} {gate.dtype}: need (..., I) of a float dtype.")
    if up is None and gate.shape[-1] % 2:
        raise ValueError(
            f"gate {tuple(gate.shape)} is to hold gate and up side by side, which needs an even "
            "last dimension: pass up, or the product of the stacked gate_up_proj."
        )
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype):
        raise ValueError(
            f"gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} do not "
            "fit: need the same shape and dtype."
        )
