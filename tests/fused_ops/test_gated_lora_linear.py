"""gated_lora_linear against the two ops that it is made of: bits, saved tensors, refusals."""

import pytest
import torch
from fastdpo_kernels import LoraModule, gated_activation, gated_lora_linear, lora_linear

from tests.fused_ops.layer_ops import normal, saved_by


def parts(dtype, adapter=True, wide=24):
    """Leaf of gate and up, and a layer with its adapter."""
    leaf = normal(2, 5, 2 * wide, dtype=dtype, scale=2).requires_grad_()
    a, b = (normal(*shape, seed=3).float().requires_grad_() for shape in ((4, wide), (9, 4)))
    weight, bias = normal(9, wide, dtype=dtype, seed=4), normal(9, dtype=dtype, seed=5)
    return leaf, LoraModule(weight, a if adapter else None, b if adapter else None, bias, 0.7)


def halves(leaf, packed):
    result = leaf * 1.0
    return (result, None) if packed else tuple(t.contiguous() for t in result.chunk(2, -1))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_two_ops_to_the_bit(dtype, dropout, adapter, packed):
    leaf, module = parts(dtype, adapter=adapter)
    upstream = normal(2, 5, 9, dtype=dtype, seed=6)
    options = {"kind": "silu", "overwrite": True, "backend": "torch"}
    leaves = [leaf, *(t for t in module[1:3] if t is not None)]

    def run(whole):
        torch.manual_seed(0)
        gate, up = halves(leaf, packed)
        if whole:
            out = gated_lora_linear(gate, up, module, dropout=dropout, **options)
        else:
            product = gated_activation(gate, up, **options)
            out = lora_linear(product, **module._asdict(), dropout=dropout)
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    for found, wanted in zip(run(True), run(False), strict=True):
        assert torch.equal(found, wanted)


def test_it_saves_gate_and_up_and_the_adapter():
    leaf, module = parts(torch.bfloat16)
    gate, up = halves(leaf, False)
    saved = saved_by(lambda: gated_lora_linear(gate, up, module, backend="torch"))
    wanted = {t.data_ptr() for t in (gate, up, *module[1:3])}
    assert {t.data_ptr() for t in saved} == wanted


def test_what_does_not_fit_is_named():
    leaf, module = parts(torch.float32)
    gate, up = halves(leaf, False)
    with pytest.raises(ValueError, match="does not fit weight"):
        gated_lora_linear(gate[..., 1:], up[..., 1:], module, backend="torch")
    trained = module._replace(weight=module.weight.clone().requires_grad_())
    with pytest.raises(ValueError, match="freeze it"):
        gated_lora_linear(gate, up, trained, backend="torch")
