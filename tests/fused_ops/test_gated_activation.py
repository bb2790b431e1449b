"""gated_activation against fp64, what is saved, and gradients written over gate and up."""

import pytest
import torch
from fastdpo_kernels import _backend, gated_activation
from fastdpo_kernels.oracle import gated_activation_oracle

from tests.fused_ops.layer_ops import BOUNDS, error, normal, saved_by

KINDS = ["silu", "gelu_tanh", "gelu"]


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("where there is a GPU tests/gpu/test_layer_ops.py runs the compiled kernels")
    return request.param


def halves(leaf, layout):
    """Gate and up of a leaf (..., 2 I): as one tensor, as views of it, or as two tensors."""
    product = leaf * 1.0  # a result, as of a linear layer
    if layout == "packed":
        return product, None
    gate, up = product.chunk(2, dim=-1)
    return (gate, up) if layout == "views" else (gate.contiguous(), up.contiguous())


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("layout", ["packed", "views", "apart"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_against_fp64(monkeypatch, backend, dtype, kind, layout, overwrite):
    monkeypatch.setattr(_backend, "TILE_ELEMENTS", 2 * 1034)
    leaf = normal(1, 3, 2 * 1034, dtype=dtype, scale=2).requires_grad_()
    upstream = normal(1, 3, 1034, dtype=dtype, seed=1)
    gate, up = halves(leaf, layout)
    out = gated_activation(gate, up, kind=kind, overwrite=overwrite, backend=backend)
    (found,) = torch.autograd.grad(out, leaf, upstream)
    truth = leaf.detach().double().requires_grad_()
    wanted = gated_activation_oracle(*truth.chunk(2, dim=-1), kind=kind)
    (gradient,) = torch.autograd.grad(wanted, truth, upstream.double())
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert error(out, wanted) <= BOUNDS[dtype]
    assert error(found, gradient) <= BOUNDS[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    leaves = [normal(4, 6, seed=seed).requires_grad_() for seed in (0, 1)]
    assert torch.autograd.gradcheck(
        lambda gate, up: gated_activation(gate, up, kind=kind, backend="torch"), leaves
    )


def test_large_arguments_stay_finite(backend):
    gate = torch.tensor([-200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0]).requires_grad_()
    for kind in KINDS:
        out = gated_activation(gate, torch.ones(7), kind=kind, backend=backend)
        (gradient,) = torch.autograd.grad(out.sum(), gate)
        assert torch.allclose(out, gate.clamp_min(0.0), atol=1e-6)
        assert torch.allclose(gradient[[0, 1, 5, 6]], torch.tensor([0.0, 0.0, 1.0, 1.0]), atol=1e-6)
    assert gated_activation(torch.zeros(0, 8), torch.zeros(0, 8), backend=backend).shape == (0, 8)


def test_saves_gate_and_up_and_nothing_else(backend):
    gate, up = (normal(8, 32, seed=s, dtype=torch.bfloat16).requires_grad_() for s in (0, 1))
    saved = saved_by(lambda: gated_activation(gate, up, backend=backend))
    assert {t.data_ptr() for t in saved} == {gate.data_ptr(), up.data_ptr()}


def test_overwrite_puts_the_gradients_where_gate_and_up_were(backend):
    leaf = normal(4, 64, dtype=torch.float32).requires_grad_()
    gate, up = halves(leaf, "apart")
    places, gradients = (gate.data_ptr(), up.data_ptr()), []
    for t in (gate, up):
        t.register_hook(lambda grad: gradients.append(grad.data_ptr()))
    out = gated_activation(gate, up, overwrite=True, backend=backend)
    out.sum().backward(retain_graph=True)
    assert sorted(gradients) == sorted(places)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_another_node_that_had_saved_the_gate_is_not_fooled(backend):
    leaf = normal(4, 64, dtype=torch.float32).requires_grad_()
    gate, up = halves(leaf, "apart")
    other = gate.square().sum()
    gated_activation(gate, up, overwrite=True, backend=backend).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_leaves_and_overlaps_are_not_overwritten(backend):
    gate, up = (normal(4, 32, seed=s, dtype=torch.float32).requires_grad_() for s in (0, 1))
    kept = gate.detach().clone(), up.detach().clone()
    gated_activation(gate, up, overwrite=True, backend=backend).sum().backward()
    assert torch.equal(gate, kept[0])
    assert torch.equal(up, kept[1])
    for pair in (
        lambda t: (t, t),
        lambda t: (t[:, 1:], t[:, :-1]),
        lambda t: (t[:1].expand(4, -1),) * 2,
    ):
        leaf = normal(4, 33, dtype=torch.float32).requires_grad_()
        result = leaf * 1.0
        gated_activation(*pair(result), overwrite=True, backend=backend).sum().backward()
        truth = leaf.detach().double().requires_grad_()
        gated_activation_oracle(*pair(truth)).sum().backward()
        assert error(leaf.grad, truth.grad) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": torch.zeros(2, 6)}, "do not fit"),
        ({"up": torch.zeros(2, 8).double()}, "same shape and dtype"),
        ({"gate": torch.zeros(2, 7), "up": None}, "even last dimension"),
        ({"gate": torch.zeros(2, 8, dtype=torch.int32)}, "float dtype"),
        ({"kind": "relu"}, "kind 'relu' does not exist"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        gated_activation(**{"gate": torch.zeros(2, 8), "up": torch.zeros(2, 8)} | change)
