"""Stacked LoRA against fp64 and `lora_linear`: values, gradients, what is saved, zero adapters."""

import bitsandbytes as bnb
import pytest
import torch
from fastdpo_kernels import LoraModule, lora_linear, lora_linears
from fastdpo_kernels.lora_linear import dense_weight
from fastdpo_kernels.oracle import lora_linear_oracle

from tests.fused_ops.layer_ops import BOUNDS, error, normal, saved_by

SHAPES = [
    # outs, ranks
    ((9, 5, 5), (4, 4, 4)),
    ((20, 20), (4, 2)),
    ((9, 5, 7), (4, None, 3)),  # a module without adapter
    ((9,), (4,)),
    ((9, 5), (None, None)),
]


def group(dtype, adapter, outs, ranks, with_bias=True):
    """Modules on 12 columns."""
    modules = []
    for place, (out, rank) in enumerate(zip(outs, ranks, strict=True)):
        a = b = None
        if rank is not None:
            a = normal(rank, 12, dtype=adapter, seed=place).requires_grad_()
            b = normal(out, rank, dtype=adapter, seed=place + 10).requires_grad_()
        bias = normal(out, dtype=dtype, seed=place + 30) if with_bias and place != 1 else None
        weight = normal(out, 12, dtype=dtype, seed=place + 20)
        modules.append(LoraModule(weight, a, b, bias, 0.5 + place))
    return modules


def adapters_of(modules):
    return [t for m in modules for t in (m.lora_A, m.lora_B) if t is not None]


def as_fp64(modules):
    def twin(t):
        return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

    return [m._replace(**{k: twin(getattr(m, k)) for k in m._fields[:4]}) for m in modules]


@pytest.mark.parametrize(("outs", "ranks"), SHAPES)
@pytest.mark.parametrize("rows", [(7,), (3, 5), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_against_fp64(dtype, rows, outs, ranks):
    adapter = torch.float64 if dtype == torch.float64 else torch.float32
    modules = group(dtype, adapter, outs, ranks)
    x = normal(*rows, 12, dtype=dtype, seed=50).requires_grad_()
    upstream = [normal(*rows, out, dtype=dtype, seed=60 + out) for out in outs]
    found = lora_linears(x, modules)
    found = [*found, *torch.autograd.grad(found, [x, *adapters_of(modules)], upstream)]
    truth, exact = x.detach().double().requires_grad_(), as_fp64(modules)
    wanted = [
        lora_linear_oracle(truth, m.weight, m.lora_A, m.lora_B, bias=m.bias, scaling=m.scaling)
        for m in exact
    ]
    gradients = torch.autograd.grad(
        wanted, [truth, *adapters_of(exact)], [t.double() for t in upstream]
    )
    bound = 1e-14 if dtype == torch.float64 else BOUNDS[dtype] * 2
    for got, want in zip(found, [*wanted, *gradients], strict=True):
        assert got.shape == want.shape
        assert error(got, want) <= bound or want.numel() == 0 or not want.any()
    assert {t.dtype for t in found[len(outs) + 1 :]} <= {adapter}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs_and_gradients(dtype):
    modules = group(dtype, torch.float32, (9, 5), (4, 3))
    x = normal(5, 7, 30, dtype=dtype)[..., 3:27:2].transpose(0, 1)
    upstream = [normal(5, 7, 2 * out, dtype=dtype)[..., ::2].transpose(0, 1) for out in (9, 5)]

    def run(x, upstream):
        leaf = x.detach().requires_grad_()
        outs = lora_linears(leaf, modules)
        return [*outs, *torch.autograd.grad(outs, [leaf, *adapters_of(modules)], upstream)]

    wanted = run(x.contiguous(), [t.contiguous() for t in upstream])
    for got, want in zip(run(x, upstream), wanted, strict=True):
        assert error(got, want) <= BOUNDS[dtype]


def test_gradcheck():
    modules = group(torch.float64, torch.float64, (4, 3), (2, 2))
    x = normal(5, 12).requires_grad_()
    leaves = adapters_of(modules)

    def run(x, *adapters):
        given = [m._replace(lora_A=adapters[2 * i], lora_B=adapters[2 * i + 1])
                 for i, m in enumerate(modules)]  # fmt: skip
        return lora_linears(x, given)

    assert torch.autograd.gradcheck(run, (x, *leaves))


def test_equals_lora_linear_module_by_module():
    modules = group(torch.float32, torch.float32, (9, 5), (4, 4))
    x = normal(6, 12, dtype=torch.float32)
    for out, m in zip(lora_linears(x, modules), modules, strict=True):
        alone = lora_linear(x, m.weight, m.lora_A, m.lora_B, bias=m.bias, scaling=m.scaling)
        assert torch.allclose(out, alone, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_of_zeros_give_the_bits_of_no_adapter(dtype):
    modules = group(dtype, torch.float32, (48, 40, 40), (4, 4, 4))
    bare = [m._replace(lora_A=None, lora_B=None) for m in modules]
    zeros = [m._replace(lora_B=torch.zeros_like(m.lora_B)) for m in modules]
    x = normal(33, 12, dtype=dtype)
    wanted = lora_linears(x, bare)
    for got, want, m in zip(lora_linears(x, zeros), wanted, zeros, strict=True):
        assert torch.equal(got, want)
        alone = lora_linear(x, m.weight, m.lora_A, m.lora_B, bias=m.bias, scaling=m.scaling)
        assert torch.equal(alone, want)
        assert torch.equal(lora_linear(x, m.weight, bias=m.bias), want)


def test_saves_x_once_and_the_adapters():
    modules = group(torch.bfloat16, torch.float32, (96, 64, 64), (2, 2, 2))
    x = normal(64, 12, dtype=torch.bfloat16).requires_grad_()
    saved = saved_by(lambda: lora_linears(x, modules))
    large = [t for t in saved if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]
    adapters = {t.data_ptr() for t in adapters_of(modules)}
    assert {t.data_ptr() for t in saved} - {x.data_ptr()} == adapters


def test_outputs_that_nobody_uses_cost_nothing():
    modules = group(torch.float32, torch.float32, (9, 5, 5), (4, 4, 4))
    x = normal(6, 12, dtype=torch.float32).requires_grad_()
    lora_linears(x, modules)[1].sum().backward()
    assert modules[0].lora_A.grad is None
    assert modules[1].lora_A.grad is not None
    m = modules[1]
    alone = [t.detach().clone().requires_grad_() for t in (x, m.lora_A, m.lora_B)]
    lora_linear(alone[0], m.weight, *alone[1:], bias=m.bias, scaling=m.scaling).sum().backward()
    for got, want in zip((x, m.lora_A, m.lora_B), alone, strict=True):
        assert torch.allclose(got.grad, want.grad, atol=1e-5)


def test_x_without_gradient_and_frozen_adapters():
    modules = group(torch.float32, torch.float32, (9, 5), (4, 4))
    x = normal(6, 12, dtype=torch.float32)
    torch.stack([t.sum() for t in lora_linears(x, modules)]).sum().backward()
    assert all(t.grad is not None for t in adapters_of(modules))
    for t in adapters_of(modules):
        t.requires_grad_(False)
    assert not lora_linears(x, modules)[0].requires_grad
    x.requires_grad_()
    saved = saved_by(lambda: lora_linears(x, modules)[0])
    assert x.data_ptr() not in [t.data_ptr() for t in saved]


def test_with_dropout_each_module_has_its_own_mask():
    modules = group(torch.float32, torch.float32, (9, 9), (4, 4))
    modules[1] = modules[0]
    x = normal(40, 12, dtype=torch.float32)
    torch.manual_seed(0)
    one, other = lora_linears(x, modules, dropout=0.5)
    assert not torch.equal(one, other)
    torch.manual_seed(0)
    m = modules[0]
    options = {"bias": m.bias, "scaling": m.scaling, "dropout": 0.5}
    assert torch.equal(one, lora_linear(x, m.weight, m.lora_A, m.lora_B, **options))


def test_four_bit_weights():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(10, 64, generator=draw).requires_grad_()
    modules = []
    for out in (96, 32):
        weight = bnb.nn.Params4bit(
            torch.randn(out, 64, generator=draw), requires_grad=False, quant_type="nf4",
            compress_statistics=True,
        ).to("cpu")  # fmt: skip
        a, b = (torch.randn(*s, generator=draw).requires_grad_() for s in ((4, 64), (out, 4)))
        modules.append(LoraModule(weight, a, b))
    outs = lora_linears(x, modules)
    found = [
        *outs,
        *torch.autograd.grad(outs, [x, *adapters_of(modules)], [o.detach() for o in outs]),
    ]
    dense = [m._replace(weight=dense_weight(m.weight, x.dtype)) for m in modules]
    wanted = [x @ m.weight.T + (x @ m.lora_A.T) @ m.lora_B.T for m in dense]
    gradients = torch.autograd.grad(
        wanted, [x, *adapters_of(modules)], [o.detach() for o in wanted]
    )
    for got, want in zip(found, [*wanted, *gradients], strict=True):
        assert error(got, want) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_B": None}, "only one of"),
        ({"lora_A": torch.zeros(3, 12)}, "do not fit"),
        ({"weight": torch.zeros(9, 11)}, "does not fit weight"),
        ({"weight": torch.zeros(9, 12).double()}, "need one dtype"),
        ({"weight": torch.zeros(9, 12).requires_grad_()}, "weight requires a gradient"),
    ],
)
def test_bad_input_is_named(change, message):
    modules = group(torch.float32, torch.float32, (9, 9), (4, 4), with_bias=False)
    modules[1] = modules[1]._replace(**change)
    with pytest.raises(ValueError, match=message):
        lora_linears(torch.zeros(2, 12), modules)
