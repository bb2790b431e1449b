"""Rotary position embedding of q and k together, with the norms before it folded in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._backend import is_small, uses_triton
from .rms_norm import FORMS, rms_norm

EAGER_BELOW = 2**16
"""Numbers in q below which plain autograd is the faster on the CPU."""


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    form: str = "llama",
    interleaved: bool = False,
    upcast: bool = False,
    in_place: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``x * cos + rotate_half(x) * sin`` of q and of k, after their RMSNorm where they have one.

    Saves cos and sin, and q and k only if they are normalized.

    Args:
        q: (B, heads, T, D) bf16, fp16, fp32 or fp64; any strides, a transposed projection as well.
        k: (B, key heads, T, D), same dtype.
        cos: (B or 1, T, R) of a float dtype, R even and at most D; the first R columns are turned,
            the others passed on.
        sin: like cos.
        q_weight: (D,) for an RMSNorm of every head (Qwen3, Gemma 3), (heads * D,) for one of all
            heads of a token (OLMo2), or None for no norm. Frozen or trained.
        k_weight: likewise of k; both or neither.
        eps: of the norms.
        form: of the norms, as in `rms_norm`.
        interleaved: turn columns 2 i and 2 i + 1 against each other (Cohere) in place of i and
            i + R / 2.
        upcast: form the products in fp32 and round once, as Cohere does, in the gradients too.
        in_place: q and k may be overwritten, and so may the gradients of what is returned: for
            results of a linear layer that nothing else reads, handed to attention alone. On CUDA,
            without norm; autograd refuses, by name, a node that had saved q or k.
        backend: "triton" (CUDA; on the CPU under TRITON_INTERPRET=1), "torch" (any device), or
            "auto": triton on CUDA where it is installed, else torch, and for small inputs on the
            CPU plain autograd, which is faster there.

    Returns:
        q and k turned, of their shapes, dtype and order in memory; differentiable once in q, k and
        the weights. cos and sin get no gradient.

    Raises:
        ValueError: shapes, dtypes or options disagree.
        RuntimeError: backend "triton" cannot run here; says what is missing.

    Numerics: products are formed in the wider dtype of q and cos and rounded to it, the sum is
    rounded to q's; gradients likewise, their products rounded to q's dtype. That is transformers'
    order, so bf16 values and gradients equal its own bit for bit without a norm.

    Source: RoFormer, arXiv:2104.09864.
    """
    _validate(q, k, cos, sin, q_weight, k_weight, form)
    triton = uses_triton(backend, q)
    weights = [t for t in (q_weight, k_weight) if t is not None]
    options = _Options(eps, form, interleaved, upcast, triton, in_place)
    if weights and not (triton and _can_fold(q, weights, options)):
        q, k = (
            _normalized(x, w, eps, form, backend)
            for x, w in zip((q, k), weights, strict=True)
        )  # fmt: skip
        weights = []
    if is_small(backend, q, EAGER_BELOW):
        return _eager(q, cos, sin, options), _eager(k, cos, sin, options)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, *weights)):
        return _Rotary.apply(q, k, cos.detach(), sin.detach(), *(weights or (None, None)), options)
    return options.forward(q, k, cos, sin, weights)


@dataclass(frozen=True, slots=True)
class _Options:
    eps: float
    form: str
    interleaved: bool
    upcast: bool
    triton: bool
    in_place: bool

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, weights: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        if not self.triton:
            return self._torch(q, cos, sin, False), self._torch(k, cos, sin, False)
        from . import _rotary_launch

        free = self.in_place and not weights and _is_free(q) and _is_free(k)
        return _rotary_launch.turned(q, k, cos, sin, weights, self, in_place=free)

    def backward(
        self, grad_q: Tensor, grad_k: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The rotation's transpose."""
        if not self.triton:
            return self._torch(grad_q, cos, sin, True), self._torch(grad_k, cos, sin, True)
        from . import _rotary_launch

        free = self.in_place and _is_dense(grad_q) and _is_dense(grad_k)
        return _rotary_launch.turned(
            grad_q, grad_k, cos, sin, [], self, in_place=free, transposed=True
        )

    def _torch(self, x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
        """The twin: eager's products and sums without its copies."""
        width = cos.shape[-1]
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        turned = x[..., :width]
        if self.upcast:
            turned = turned.to(torch.promote_types(x.dtype, torch.float32))
        product = turned * cos
        rounds = transposed and not self.upcast
        product = product.to(x.dtype) if rounds else product
        low, high = self._halves(turned)
        sin_low, sin_high = self._halves(sin)
        new_low, new_high = self._halves(product)
        if transposed:
            crossed = high * sin_high, low * sin_low
            new_low += crossed[0].to(x.dtype) if rounds else crossed[0]
            new_high -= crossed[1].to(x.dtype) if rounds else crossed[1]
        else:
            new_low -= high * sin_low
            new_high += low * sin_high
        product = product.to(x.dtype)
        return product if width == x.shape[-1] else torch.cat((product, x[..., width:]), dim=-1)

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.interleaved:
            return x[..., ::2], x[..., 1::2]
        low, high = x.chunk(2, dim=-1)
        return low, high


class _Rotary(torch.autograd.Function):
    """Saves cos and sin, and q, k and the weights where the norms are folded in."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor]:
        ctx.options = options
        weights = [t for t in (q_weight, k_weight) if t is not None]
        ctx.save_for_backward(cos, sin, *((q, k, *weights) if weights else ()))
        return options.forward(q, k, cos, sin, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        cos, sin, *normalized = ctx.saved_tensors
        options: _Options = ctx.options
        if not normalized:
            grads = options.backward(grad_outputs[0], grad_outputs[1], cos, sin)
            return *grads, None, None, None, None, None
        from . import _rotary_launch

        q, k, *weights = normalized
        needs = ctx.needs_input_grad[4:6]
        grads = _rotary_launch.norm_gradients(
            grad_outputs, (q, k), cos, sin, weights, needs, options
        )
        return *grads[:2], None, None, *grads[2:], None


def _eager(x: Tensor, cos: Tensor, sin: Tensor, options: _Options) -> Tensor:
    """The definition, under autograd: transformers' own ops in their order."""
    width, dtype = cos.shape[-1], x.dtype
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = x[..., :width], x[..., width:]
    if options.upcast:
        turned = turned.to(torch.promote_types(dtype, torch.float32))
    if options.interleaved:
        crossed = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        low, high = turned.chunk(2, dim=-1)
        crossed = torch.cat((-high, low), dim=-1)
    turned = (turned * cos + crossed * sin).to(dtype)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _normalized(x: Tensor, weight: Tensor, eps: float, form: str, backend: str) -> Tensor:
    """RMSNorm of (B, heads, T, D), of each head or of all heads of a token."""
    if weight.shape[0] == x.shape[-1]:
        return rms_norm(x, weight, eps=eps, form=form, backend=backend)
    rows = rms_norm(x.transpose(1, 2).flatten(2), weight, eps=eps, form=form, backend=backend)
    return rows.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)


def _can_fold(q: Tensor, weights: list[Tensor], options: _Options) -> bool:
    """Return True if the kernels compute the norms too.

    They do not for a norm of all heads that is trained: its gradient needs a sum over tokens.
    """
    whole = weights[0].shape[0] != q.shape[-1]
    trained = torch.is_grad_enabled() and any(w.requires_grad for w in weights)
    wider = any(torch.promote_types(w.dtype, q.dtype) != q.dtype for w in weights)
    if options.interleaved or options.upcast or (whole and trained):
        return False
    return not (options.form == "llama" and wider) and (not whole or weights[0].shape[0] <= 8192)


def _is_free(x: Tensor) -> bool:
    """Return True if x may be overwritten: it is no leaf, and no element lies in memory twice."""
    return not (x.requires_grad and x.is_leaf) and _is_dense(x)


def _is_dense(x: Tensor) -> bool:
    """Return True if no two elements overlap, by strides that each exceed the extent inside."""
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < extent:
            return False
        extent = max(extent, stride * size)
    return True


def _validate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    form: str,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit: need (B, heads, T, D) and "
            "(B, key heads, T, D). Transpose projections of (B, T, heads, D) before the call."
        )
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"q is {q.dtype} and k {k.dtype}: need one floating dtype.")
    batch, _, length, size = q.shape
    fits = cos.ndim == 3 and cos.shape[0] in (1, batch) and cos.shape[1] == length
    if cos.shape != sin.shape or cos.dtype != sin.dtype or not fits:
        raise ValueError(
            f"cos {tuple(cos.shape)} {cos.dtype} and sin {tuple(sin.shape)} {sin.dtype} do not fit "
            f"q {tuple(q.shape)}: need (B or 1, T, R) both."
        )
    if cos.shape[-1] % 2 or not 0 < cos.shape[-1] <= size:
        raise ValueError(
            f"cos has {cos.shape[-1]} columns: need an even number, at most the {size} of a head."
        )
    if (q_weight is None) != (k_weight is None):
        raise ValueError("only one of q_weight and k_weight was given: pass both, or neither.")
    if form not in FORMS:
        raise ValueError(f"form {form!r} does not exist: choose from {FORMS}.")
    if q_weight is not None and k_weight is not None:
        lengths = (q_weight.numel(), k_weight.numel())
        whole = (q.shape[1] * size, k.shape[1] * size)
        if q_weight.ndim != 1 or k_weight.ndim != 1 or lengths not in ((size, size), whole):
            raise ValueError(
                f"q_weight {tuple(q_weight.shape)} and k_weight {tuple(k_weight.shape)} do not "
                f"fit: need ({size},) for a norm of every head, or {whole} for one of all heads."
            )
