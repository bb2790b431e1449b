"""rms_norm against fp64: values and gradients of both backends, what is saved, bad input.

The Triton kernels run in the interpreter (tests/conftest.py).
"""

import pytest
import torch
from fastdpo_kernels import _backend, rms_norm
from fastdpo_kernels.oracle import rms_norm_oracle

from tests.fused_ops.layer_ops import BOUNDS, error, normal, saved_by

FORMS = [("llama", False), ("olmo2", False), ("gemma", False), ("olmo2", True)]


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("where there is a GPU tests/gpu/test_layer_ops.py runs the compiled kernels")
    return request.param


def inputs(dtype, strided, shape=(2, 9, 3, 60)):
    """x and the residual, contiguous or a transposed slice."""
    if not strided:
        return normal(*shape, dtype=dtype, scale=3), normal(*shape, dtype=dtype, seed=1)
    wide = normal(*shape[:-1], 2 * shape[-1], dtype=dtype, scale=3)
    x = wide[..., 8 : 8 + shape[-1]].transpose(1, 2)
    return x, normal(*x.shape, dtype=dtype, seed=1)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("form", "centered"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_against_fp64(
    monkeypatch, backend, dtype, form, centered, with_residual, strided
):
    monkeypatch.setattr(_backend, "TILE_ELEMENTS", 60 * 16)
    x, residual = inputs(dtype, strided)
    weight = normal(60, dtype=dtype, seed=2)
    leaves = [t.detach().requires_grad_() for t in (x, weight, residual)]
    options = {"form": form, "centered": centered}
    given = {**options, "residual": leaves[2]} if with_residual else options
    upstream = [normal(*x.shape, dtype=dtype, seed=seed) for seed in (3, 4)]

    found = rms_norm(leaves[0], leaves[1], **given, backend=backend)
    outs = found if with_residual else (found,)
    leaves = leaves if with_residual else leaves[:2]
    found = [*outs, *torch.autograd.grad(outs, leaves, upstream[: len(outs)])]

    truth = [t.detach().double().requires_grad_() for t in leaves]
    given = {**options, "residual": truth[2]} if with_residual else options
    wanted = rms_norm_oracle(truth[0], truth[1], **given)[: len(outs)]
    ups = [t.double() for t in upstream[: len(outs)]]
    wanted = [*wanted, *torch.autograd.grad(wanted, truth, ups)]
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == dtype
        assert error(got, want) <= BOUNDS[dtype]
    assert outs[0].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(("form", "centered"), FORMS)
def test_gradcheck(form, centered):
    x, residual, weight = (normal(*shape, seed=len(shape)) for shape in ((3, 7), (3, 7), (7,)))
    options = {"form": form, "centered": centered, "backend": "torch"}
    leaves = [t.requires_grad_() for t in (x, weight, residual)]
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, residual=r, **options), leaves)


def test_rows_are_independent_and_scoring_gives_the_same_bits(backend):
    x, weight = normal(70, 96, dtype=torch.bfloat16), normal(96, dtype=torch.bfloat16, seed=1)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    whole = rms_norm(x, weight, backend=backend)
    assert torch.equal(rms_norm(x[order], weight, backend=backend), whole[order])
    assert torch.equal(rms_norm(x[5:6], weight, backend=backend), whole[5:6])
    trained = rms_norm(x.clone().requires_grad_(), weight, backend=backend)
    assert torch.equal(trained, whole)


def test_saves_what_is_normalized_and_one_number_a_row(backend):
    x = normal(16, 96, dtype=torch.bfloat16).requires_grad_()
    residual, weight = normal(16, 96, dtype=torch.bfloat16), normal(96, dtype=torch.bfloat16)
    saved = saved_by(lambda: rms_norm(x, weight, backend=backend))
    assert sorted(t.nbytes for t in saved) == [16 * 4, weight.nbytes, x.nbytes]
    assert x.data_ptr() in [t.data_ptr() for t in saved], "the input itself"
    out = []
    saved = saved_by(lambda: out.append(rms_norm(x, weight, residual=residual, backend=backend)))
    assert sorted(t.nbytes for t in saved) == [16 * 4, weight.nbytes, x.nbytes]
    assert out[0][1].data_ptr() in [t.data_ptr() for t in saved], "the sum in place of x"


def test_a_sum_that_alone_is_used_passes_its_gradient_on(backend):
    x, residual = (normal(4, 32, seed=s, dtype=torch.float32).requires_grad_() for s in (0, 1))
    _, total = rms_norm(x, torch.ones(32), residual=residual, backend=backend)
    (total * 3.0).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
    assert torch.equal(residual.grad, x.grad)
    x.grad = None
    rms_norm(x, torch.ones(32), residual=residual.detach(), backend=backend)[0].sum().backward()
    assert x.grad is not None


def test_extremes(backend):
    x = torch.stack([torch.zeros(64), torch.full((64,), 1e4), torch.full((64,), 1e-12)])
    leaf = x.requires_grad_()
    out = rms_norm(leaf, torch.ones(64), backend=backend)
    out.sum().backward()
    assert out[0].eq(0).all()
    assert torch.allclose(out[1], torch.ones(64))
    assert leaf.grad.isfinite().all()
    assert rms_norm(torch.zeros(0, 64), torch.ones(64), backend=backend).shape == (0, 64)
    empty = torch.zeros(0, 64, requires_grad=True)
    weight = torch.ones(64, requires_grad=True)
    rms_norm(empty, weight, backend=backend).sum().backward()
    assert weight.grad.eq(0).all()


def test_small_inputs_run_as_autograd_on_the_cpu():
    x = torch.randn(4, 32, requires_grad=True)
    assert "RMSNorm" not in type(rms_norm(x, torch.ones(32)).grad_fn).__name__
    large = torch.randn(2**13, 32, requires_grad=True)
    assert "RMSNorm" in type(rms_norm(large, torch.ones(32)).grad_fn).__name__


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 9)}, "do not fit"),
        ({"x": torch.zeros(3, 8, dtype=torch.int64)}, "floating"),
        ({"residual": torch.zeros(8)}, "nothing is broadcast"),
        ({"residual": torch.zeros(3, 8).double()}, "same shape and dtype"),
        ({"form": "t5"}, "form 't5' does not exist"),
        ({"backend": "cuda"}, "backend 'cuda' does not exist"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"x": torch.zeros(3, 8), "weight": torch.ones(8)} | change
    with pytest.raises(ValueError, match=message):
        rms_norm(**given)
    with pytest.raises(RuntimeError, match="fp64"):
        rms_norm(torch.zeros(3, 8).double(), torch.ones(8).double(), backend="triton")
