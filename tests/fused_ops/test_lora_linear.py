"""One node for base + LoRA: values and gradients against autograd, and what it saves."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from fastdpo_kernels import lora_linear
from fastdpo_kernels.lora_linear import dense_weight, dropped


def parts(dtype=torch.float64, adapter=torch.float64, rows=(3, 5)):
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    x = normal(*rows, 12).to(dtype).requires_grad_()
    weight, bias = normal(9, 12).to(dtype), normal(9).to(dtype)
    a, b = (normal(4, 12).to(adapter), normal(9, 4).to(adapter))
    return x, weight, a.requires_grad_(), b.requires_grad_(), bias


@pytest.mark.parametrize("rows", [(7,), (3, 5), (0, 5)])
def test_equals_autograd_in_fp64(rows):
    x, weight, a, b, bias = parts(rows=rows)
    upstream = torch.randn(*rows, 9, dtype=torch.float64)
    out = lora_linear(x, weight, a, b, bias=bias, scaling=0.7)
    found = torch.autograd.grad((out * upstream).sum(), (x, a, b))
    truth = x @ weight.T + bias + 0.7 * (x @ a.T) @ b.T
    wanted = torch.autograd.grad((truth * upstream).sum(), (x, a, b))
    assert torch.allclose(out, truth, atol=1e-12)
    for got, want in zip(found, wanted, strict=True):
        assert torch.allclose(got, want, atol=1e-12)


def test_the_output_may_be_written_into():
    """Falcon adds its attention to it in place."""
    x, weight, a, b, bias = parts()
    out = lora_linear(x, weight, a, b, bias=bias)
    out += x.sum(-1, keepdim=True)
    found = torch.autograd.grad(out.square().sum(), (x, a, b))
    truth = x @ weight.T + bias + (x @ a.T) @ b.T + x.sum(-1, keepdim=True)
    wanted = torch.autograd.grad(truth.square().sum(), (x, a, b))
    for got, want in zip(found, wanted, strict=True):
        assert torch.allclose(got, want, atol=1e-10)


def test_gradcheck():
    x, weight, a, b, bias = parts()
    assert torch.autograd.gradcheck(
        lambda x, a, b: lora_linear(x, weight, a, b, bias=bias, scaling=2.0), (x, a, b)
    )


def test_without_adapter_only_x_gets_a_gradient():
    x, weight, _, _, bias = parts()
    out = lora_linear(x, weight, bias=bias)
    assert torch.equal(out, torch.nn.functional.linear(x, weight, bias))
    out.sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand_as(x))


def test_dropout_mask_is_the_same_in_forward_and_backward():
    x, weight, a, b, _ = parts()
    torch.manual_seed(5)
    out = lora_linear(x, weight, a, b, dropout=0.4)
    out.sum().backward()
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, ()))
    masked = dropped(x.detach().reshape(-1, 12), 0.4, seed)
    leaves = [t.detach().clone().requires_grad_() for t in (a, b)]
    truth = x.detach().reshape(-1, 12) @ weight.T + (masked @ leaves[0].T) @ leaves[1].T
    truth.sum().backward()
    assert torch.allclose(out.reshape(-1, 9), truth)
    assert torch.allclose(a.grad, leaves[0].grad)
    assert torch.allclose(b.grad, leaves[1].grad)
    kept = (dropped(torch.ones(1000, 10), 0.4, 1) > 0).float().mean()
    assert 0.57 < kept < 0.63


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rows", [(40,), (2, 3, 7)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", None])
def test_values_and_gradients_against_dense_fp64(quant_type, dtype, bound, rows, dropout):
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(*rows, 64, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(96, 64, generator=draw).to(dtype)
    a, b = (torch.randn(*shape, generator=draw) for shape in ((8, 64), (96, 8)))
    bias = torch.randn(96, generator=draw).to(dtype)
    upstream = torch.randn(*rows, 96, generator=draw).to(dtype)
    if quant_type is not None:
        weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type=quant_type, compress_statistics=True
        ).to("cpu")
        assert weight.dtype == torch.uint8
    leaves = [x, a.requires_grad_(), b.requires_grad_()]
    torch.manual_seed(5)
    out = lora_linear(x, weight, a, b, bias=bias, scaling=0.5, dropout=dropout)
    found = [out, *torch.autograd.grad(out, leaves, upstream)]

    torch.manual_seed(5)
    seed = int(torch.randint(2**62, ())) if dropout else 0
    mask = dropped(torch.ones(x.numel() // 64, 64), dropout, seed).view_as(x).double()
    x, a, b = (t.detach().double().requires_grad_() for t in leaves)
    truth = x @ dense_weight(weight, dtype).double().T + bias.double()
    truth = truth + 0.5 * ((x * mask) @ a.T) @ b.T
    wanted = [truth, *torch.autograd.grad(truth, (x, a, b), upstream.double())]
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32, torch.float32]
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape
        assert (got.double() - want).norm() <= bound * want.norm()


def test_a_4bit_weight_is_dequantized_straight_into_the_dtype_of_x():
    dense = torch.randn(96, 64)
    for origin in (torch.float32, torch.float16, torch.bfloat16):
        weight = bnb.nn.Params4bit(
            dense.to(origin), requires_grad=False, quant_type="nf4", compress_statistics=True
        ).to("cpu")
        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32
        exact = bnb.functional.dequantize_4bit(weight.data, state)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert torch.equal(dense_weight(weight, dtype), exact.to(dtype))
        assert weight.quant_state.dtype == origin


def test_autocast_changes_nothing():
    x, weight, a, b, bias = parts(torch.float32, torch.float32)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = lora_linear(x, weight, a, b, bias=bias)
            found.append([out, *torch.autograd.grad(out.sum(), (x, a, b))])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_fp32_adapters_on_a_bf16_base_save_only_the_input():
    x, weight, a, b, bias = parts(torch.bfloat16, torch.float32, rows=(64,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = lora_linear(x, weight, a, b, bias=bias, scaling=0.5)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert a.grad.dtype == b.grad.dtype == torch.float32
    inputs = [t for t in saved if t.numel() >= x.numel()]
    assert len(inputs) == 1
    assert inputs[0].dtype == torch.bfloat16
    assert inputs[0].data_ptr() == x.data_ptr(), "the input itself, not a copy"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 11, dtype=torch.float64)}, "does not fit weight"),
        ({"x": torch.zeros(2, 12)}, "need one dtype"),
        ({"lora_B": None}, "only one of"),
        ({"lora_A": torch.zeros(3, 12)}, "do not fit"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"weight": torch.zeros(9, 12).double().requires_grad_()}, "weight requires a gradient"),
        ({"bias": torch.zeros(9).double().requires_grad_()}, "bias requires a gradient"),
    ],
)
def test_bad_input_is_named(change, message):
    x, weight, a, b, _ = parts()
    arguments = {"x": x, "weight": weight, "lora_A": a, "lora_B": b, "dropout": 0.0} | change
    with pytest.raises(ValueError, match=message):
        lora_linear(**arguments)
