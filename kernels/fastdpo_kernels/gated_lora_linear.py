"""The second half of a gated MLP as one node: act(gate) * up, and the layer that reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._backend import is_small
from .gated_activation import EAGER_BELOW, Options, gated_activation, options_of
from .lora_linear import FrozenPart, input_gradient, lora_linear, scaled_product, validate
from .lora_linears import LoraModule


def gated_lora_linear(
    gate: Tensor,
    up: Tensor | None,
    module: LoraModule,
    *,
    dropout: float = 0.0,
    kind: str = "silu",
    overwrite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``lora_linear(gated_activation(gate, up), ...)``, saving gate and up and nothing else.

    The product of gate and up, which the gradient of A needs, is formed again in the backward: one
    pass over gate and up in place of a saved tensor of their size. A recomputation that stops at
    the last saved tensor (torch.utils.checkpoint does) forms neither that product nor the layer's.

    Args:
        gate: (..., I) bf16, fp16, fp32 or fp64; or (..., 2 I), gate and up side by side.
        up: like gate; None if gate holds both.
        module: the frozen layer (H, I) and its adapter.
        dropout: of the adapter's input, as in `lora_linear`.
        kind: of the activation, as in `gated_activation`.
        overwrite: the backward may write the gradients over gate and up, as there.
        backend: of the activation, as there; the linear layer is torch's.

    Returns:
        (..., H) in gate's dtype; differentiable once in gate, up and the adapter.

    Raises:
        ValueError: shapes, dtypes or options disagree, or a frozen tensor asks for a gradient.
        RuntimeError: backend "triton" cannot run here; says what is missing.

    Numerics: of the two ops, bit for bit.
    """
    matrices = module.lora_A, module.lora_B
    given = [t for t in (gate, up, *matrices) if t is not None]
    with_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if not with_gradient or is_small(backend, gate, EAGER_BELOW):
        product = gated_activation(gate, up, kind=kind, overwrite=overwrite, backend=backend)
        return lora_linear(product, **module._asdict(), dropout=dropout)
    options = options_of(gate, up, kind, overwrite, backend)
    width = gate.shape[-1] // (2 if up is None else 1)
    like = gate.new_empty(()).expand(*gate.shape[:-1], width)
    validate(like, module.weight, *matrices, module.bias, dropout)
    seed = int(torch.randint(2**62, ())) if dropout > 0.0 else 0
    layer = FrozenPart(module.weight, module.bias, module.scaling, dropout, seed)
    with torch.autocast(gate.device.type, enabled=False):
        port = _Gradient.apply(gate, up, *matrices, layer, options)
        detached = (None if t is None else t.detach() for t in (gate, up, *matrices))
        return _Product.apply(port, *detached, layer, options)


class _Gradient(torch.autograd.Function):
    """Saves, and computes every gradient; its output is a port through which dL/dout arrives."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        layer: FrozenPart,
        options: Options,
    ) -> Tensor:
        ctx.layer, ctx.options = layer, options
        ctx.save_for_backward(gate, up, lora_A, lora_B)
        return gate.new_empty(()).expand(*gate.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        grad_out: Tensor = grad_outputs[0]
        gate, up, lora_A, lora_B = ctx.saved_tensors
        layer: FrozenPart = ctx.layer
        options: Options = ctx.options
        with torch.autocast(grad_out.device.type, enabled=False):
            flat_grad = grad_out.reshape(-1, grad_out.shape[-1])
            grad_A = grad_B = grad_down = None
            if lora_B is not None:
                grad_down = scaled_product(flat_grad, lora_B.to(flat_grad.dtype), layer.scaling)
            if grad_down is not None and any(ctx.needs_input_grad[2:4]):
                product = options.product(gate, up)
                inputs = layer.drop(product.reshape(-1, product.shape[-1]))
                del product  # before its gradient is there
                down = inputs @ lora_A.to(inputs.dtype).T
                grad_A = (grad_down.T @ inputs).to(lora_A.dtype)
                grad_B = scaled_product(flat_grad.T, down, layer.scaling).to(lora_B.dtype)
                del inputs
            grad_gate = grad_up = None
            if any(ctx.needs_input_grad[:2]):
                grad_product = input_gradient(layer, flat_grad, grad_down, lora_A)
                grad_gate, grad_up = options.gradients(grad_product, gate, up)
        return grad_gate, grad_up, grad_A, grad_B, None, None


class _Product(torch.autograd.Function):
    """The value. Saves nothing; hands the gradient on to the port."""

    @staticmethod
    def forward(
        ctx: Any,
        port: Tensor,  # (..., H), of `_Gradient`
        gate: Tensor,  # and up and the adapter: detached
        up: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        layer: FrozenPart,
        options: Options,
    ) -> Tensor:
        return layer.product(options.product(gate, up), lora_A, lora_B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]
        return grad_outputs[0], None, None, None, None, None, None
