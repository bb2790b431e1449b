"""The compiled kernels of a layer's ops on a GPU: against their twins, twice the same, in place."""

import pytest
import torch
from fastdpo_kernels import (
    LoraModule,
    gated_activation,
    lora_linear,
    lora_linears,
    rms_norm,
    rotary,
)

from tests.fused_ops.layer_ops import BOUNDS, error, normal

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TIPPED = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 2e-6}


def on_gpu(*shape, dtype, seed=0, scale=1.0):
    return normal(*shape, dtype=dtype, seed=seed, scale=scale).cuda()


def both(run, dtype):
    """The kernels twice, bit for bit the same; and the torch twin, to rounding."""
    first, second, twin = run("triton"), run("triton"), run("torch")
    for one, other, want in zip(first, second, twin, strict=True):
        assert torch.equal(one, other), "a second run gave other bits"
        assert one.dtype == want.dtype
        assert error(one, want) <= TIPPED[dtype]


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("width", [96, 2560, 4096, 8192, 16384])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype, width, trains):
    x, residual = (on_gpu(517, width, dtype=dtype, seed=s, scale=3) for s in (0, 1))
    weight = on_gpu(width, dtype=dtype, seed=2).requires_grad_(trains)
    upstream = [on_gpu(517, width, dtype=dtype, seed=s) for s in (3, 4)]

    def run(backend, form, centered):
        leaves = [t.detach().requires_grad_() for t in (x, residual)]
        options = {"form": form, "centered": centered, "backend": backend}
        outs = rms_norm(leaves[0], weight, residual=leaves[1], **options)
        return [*outs, *torch.autograd.grad(outs, [*leaves, weight][: 2 + trains], upstream)]

    for form, centered in (("llama", False), ("gemma", False), ("olmo2", True)):
        both(lambda backend, f=form, c=centered: run(backend, f, c), dtype)


@pytest.mark.parametrize("norm", [None, "head", "whole"])
@pytest.mark.parametrize(
    ("heads", "size", "turned"), [((32, 8), 128, 128), ((24, 8), 128, 96), ((8, 4), 256, 256)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(dtype, heads, size, turned, norm):
    half = normal(1, 203, turned // 2, seed=3, scale=4)
    both_halves = torch.cat((half, half), -1)
    cos, sin = both_halves.cos().to("cuda", dtype), both_halves.sin().to("cuda", dtype)
    options = {}
    if norm is not None:
        widths = [size * n if norm == "whole" else size for n in heads]
        names = ("q_weight", "k_weight")
        options = {
            name: on_gpu(width, dtype=dtype, seed=width).requires_grad_(norm == "head")
            for name, width in zip(names, widths, strict=True)
        }

    def run(backend):
        leaves = [on_gpu(1, 203, n * size, dtype=dtype, seed=n).requires_grad_() for n in heads]
        states = [(t * 1.0).unflatten(-1, (-1, size)).transpose(1, 2) for t in leaves]
        outs = rotary(*states, cos, sin, in_place=True, backend=backend, **options)
        upstream = [on_gpu(*out.shape, dtype=dtype, seed=9) for out in outs]
        trained = [t for t in options.values() if t.requires_grad]
        return [*outs, *torch.autograd.grad(outs, [*leaves, *trained], upstream)]

    both(run, dtype)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activation(dtype, kind, packed):
    def run(backend):
        leaf = on_gpu(203, 2 * 8960, dtype=dtype, scale=3).requires_grad_()
        product = leaf * 1.0
        given = (product,) if packed else product.chunk(2, dim=-1)
        out = gated_activation(*given, kind=kind, overwrite=True, backend=backend)
        upstream = on_gpu(203, 8960, dtype=dtype, seed=1)
        return [out, *torch.autograd.grad(out, leaf, upstream)]

    both(run, dtype)


def test_offsets_past_two_to_the_31():
    """Rows behind the 2^31st number are the rows before it."""
    rows, width = 2**31 // 16384 + 8, 16384
    x = torch.empty(rows, width, dtype=torch.bfloat16, device="cuda")
    x[:8] = x[-8:] = on_gpu(8, width, dtype=torch.bfloat16)
    weight = torch.ones(width, dtype=torch.bfloat16, device="cuda")
    out = rms_norm(x, weight, backend="triton")
    assert torch.equal(out[:8], out[-8:])
    out = gated_activation(x[:, :8192], x[:, 8192:], backend="triton")
    assert torch.equal(out[:8], out[-8:])


@pytest.mark.parametrize("rows", [1, 100, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adapters_of_zeros_give_the_bits_of_no_adapter(dtype, rows):
    """What a margin of exactly 0 before the first update rests on."""
    modules = [
        LoraModule(
            on_gpu(out, 1024, dtype=dtype, seed=out),
            on_gpu(16, 1024, dtype=torch.float32, seed=1),
            torch.zeros(out, 16, device="cuda"),
            on_gpu(out, dtype=dtype, seed=2) if biased else None,
            2.0,
        )
        for out, biased in ((1024, False), (256, True), (3584, False))
    ]
    x = on_gpu(rows, 1024, dtype=dtype)
    bare = [m._replace(lora_A=None, lora_B=None) for m in modules]
    wanted = lora_linears(x, bare)
    for got, want, m in zip(lora_linears(x, modules), wanted, modules, strict=True):
        assert torch.equal(got, want)
        alone = lora_linear(x, m.weight, m.lora_A, m.lora_B, bias=m.bias, scaling=m.scaling)
        assert torch.equal(alone, want)
        truth = x.double() @ m.weight.double().T + (0.0 if m.bias is None else m.bias.double())
        assert error(got, truth) <= BOUNDS[dtype]
