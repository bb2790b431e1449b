"""Rotary against fp64, norms folded in against norms apart, and what is written in place."""

import pytest
import torch
from fastdpo_kernels import rms_norm, rotary
from fastdpo_kernels.oracle import rms_norm_oracle, rotary_oracle

from tests.fused_ops.layer_ops import BOUNDS, error, normal, saved_by


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("where there is a GPU tests/gpu/test_layer_ops.py runs the compiled kernels")
    return request.param


def angles(turned, dtype, interleaved=False, batch=1, length=11):
    """cos and sin (batch, length, turned)."""
    half = normal(batch, length, turned // 2, seed=7, scale=4)
    both = half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def leaves(heads, size, dtype, batch=2, length=11):
    """Projections (B, T, heads * D) of q and k."""
    return [
        normal(batch, length, n * size, dtype=dtype, seed=n, scale=2).requires_grad_()
        for n in heads
    ]


def as_heads(projected, size):
    """(B, heads, T, D), as an attention layer has it: a transposed view of a result."""
    return (projected * 1.0).unflatten(-1, (-1, size)).transpose(1, 2)


CASES = [
    # heads, head size, turned, options
    ((4, 2), 16, 16, {}),
    ((5, 3), 24, 24, {}),  # nothing a power of two
    ((4, 4), 24, 16, {}),  # partial
    ((4, 2), 16, 16, {"interleaved": True, "upcast": True}),
    ((3, 1), 20, 12, {"interleaved": True}),
]
NORMS = [("head", "llama"), ("head", "gemma"), ("whole", "olmo2")]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_against_fp64(backend, dtype, case, in_place):
    heads, size, turned, options = case
    interleaved = options.get("interleaved", False)
    cos, sin = angles(turned, dtype, interleaved, batch=heads[1] % 2 + 1)
    given = leaves(heads, size, dtype)
    outs = rotary(
        *(as_heads(t, size) for t in given), cos, sin,
        in_place=in_place, backend=backend, **options,
    )  # fmt: skip
    upstream = [normal(*out.shape, dtype=dtype, seed=9) for out in outs]
    found = torch.autograd.grad(outs, given, [t.clone() for t in upstream])
    for out, leaf, up, gradient in zip(outs, given, upstream, found, strict=True):
        truth = leaf.detach().double().requires_grad_()
        wanted = rotary_oracle(as_heads(truth, size), cos, sin, interleaved=interleaved)
        (slope,) = torch.autograd.grad(wanted, truth, up.double())
        assert out.dtype == dtype
        assert error(out, wanted) <= BOUNDS[dtype]
        assert error(gradient, slope) <= BOUNDS[dtype]


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(("norm", "form"), NORMS)
@pytest.mark.parametrize(("heads", "size", "turned"), [((4, 2), 16, 16), ((5, 3), 24, 18)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_folded_in_against_fp64(backend, dtype, heads, size, turned, norm, form, trains):
    cos, sin = angles(turned, torch.float32 if norm == "whole" else dtype)
    given = leaves(heads, size, dtype)
    widths = [n * size if norm == "whole" else size for n in heads]
    weights = [normal(w, dtype=dtype, seed=w + i) for i, w in enumerate(widths)]
    weights = [w.requires_grad_(trains) for w in weights]
    options = {"q_weight": weights[0], "k_weight": weights[1], "form": form, "backend": backend}
    outs = rotary(*(as_heads(t, size) for t in given), cos, sin, **options)
    upstream = [normal(*out.shape, dtype=dtype, seed=9) for out in outs]
    found = torch.autograd.grad(outs, [*given, *weights] if trains else given, upstream)
    for place, (out, leaf, weight, up) in enumerate(
        zip(outs, given, weights, upstream, strict=True)
    ):
        truth, factor = (t.detach().double().requires_grad_() for t in (leaf, weight))
        rows = truth if norm == "whole" else truth.unflatten(-1, (-1, size))
        normed = rms_norm_oracle(rows, factor, form=form)[0].reshape(truth.shape)
        wanted = rotary_oracle(as_heads(normed, size), cos, sin)
        slopes = torch.autograd.grad(wanted, (truth, factor), up.double())
        assert error(out, wanted) <= BOUNDS[dtype]
        assert error(found[place], slopes[0]) <= BOUNDS[dtype]
        if trains:
            assert error(found[2 + place], slopes[1]) <= BOUNDS[dtype]


def test_gradcheck():
    q, k = (normal(1, n, 3, 8, seed=n).requires_grad_() for n in (2, 1))
    cos, sin = angles(6, torch.float64, length=3)
    for options in ({}, {"interleaved": True}, {"upcast": True}):
        assert torch.autograd.gradcheck(
            lambda q, k, given=options: rotary(q, k, cos, sin, backend="torch", **given), (q, k)
        )


def test_saves_the_angles_and_what_is_normalized(backend):
    cos, sin = angles(16, torch.bfloat16)
    q, k = (as_heads(t, 16) for t in leaves((4, 2), 16, torch.bfloat16))
    saved = saved_by(lambda: rotary(q, k, cos, sin, backend=backend))
    assert {t.data_ptr() for t in saved} <= {cos.data_ptr(), sin.data_ptr()}
    weight = torch.ones(16, dtype=torch.bfloat16)
    saved = saved_by(
        lambda: rotary(q, k, cos, sin, q_weight=weight, k_weight=weight, backend=backend)
    )
    large = {t.data_ptr() for t in saved if t.numel() >= k.numel()}
    assert large == {q.data_ptr(), k.data_ptr()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in the interpreter")
def test_in_place_writes_over_results_alone():
    cos, sin = angles(16, torch.float32)
    q, k = (as_heads(t, 16) for t in leaves((4, 2), 16, torch.float32))
    outs = rotary(q, k, cos, sin, in_place=True, backend="triton")
    assert [t.data_ptr() for t in outs] == [q.data_ptr(), k.data_ptr()]
    grads = [torch.randn_like(out) for out in outs]
    kept = [t.clone() for t in grads]
    torch.autograd.backward(outs, grads)
    assert not torch.equal(grads[0], kept[0]), "turned back where it lay"

    q, k = (normal(2, n, 11, 16, dtype=torch.float32).requires_grad_() for n in (4, 2))
    kept = q.detach().clone()
    outs = rotary(q, k, cos, sin, in_place=True, backend="triton")
    assert torch.equal(q, kept), "a leaf stays as it is"
    (outs[0].sum() + outs[1].sum()).backward()  # gradients without memory of their own
    truth = kept.double().requires_grad_()
    rotary_oracle(truth, cos, sin).sum().backward()
    assert error(q.grad, truth.grad) < 1e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in the interpreter")
def test_another_node_that_had_saved_q_is_not_fooled():
    cos, sin = angles(16, torch.float32)
    q, k = (as_heads(t, 16) for t in leaves((4, 2), 16, torch.float32))
    other = q.square().sum()
    rotary(q, k, cos, sin, in_place=True, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_folded_norms_round_as_norms_apart():
    cos, sin = angles(16, torch.bfloat16)
    q, k = (as_heads(t, 16).detach() for t in leaves((4, 2), 16, torch.bfloat16))
    weight = normal(16, dtype=torch.bfloat16)
    folded = rotary(q, k, cos, sin, q_weight=weight, k_weight=weight, backend="torch")
    normed = (rms_norm(t, weight) for t in (q, k))
    for one, other in zip(folded, rotary(*normed, cos, sin), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 2, 4, 8)}, "q .* and k .* do not fit"),
        ({"q": torch.zeros(4, 3, 8)}, "Transpose projections"),
        ({"k": torch.zeros(1, 2, 3, 8).double()}, "need one floating dtype"),
        ({"cos": torch.zeros(1, 4, 8)}, "do not fit q"),
        ({"cos": torch.zeros(1, 3, 10), "sin": torch.zeros(1, 3, 10)}, "at most the 8"),
        ({"cos": torch.zeros(1, 3, 5), "sin": torch.zeros(1, 3, 5)}, "an even number"),
        ({"q_weight": torch.ones(8)}, "pass both, or neither"),
        ({"q_weight": torch.ones(8), "k_weight": torch.ones(16)}, "for a norm of every head"),
        ({"form": "t5"}, "form 't5' does not exist"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {
        "q": torch.zeros(1, 4, 3, 8), "k": torch.zeros(1, 2, 3, 8), "cos": torch.zeros(1, 3, 8),
        "sin": torch.zeros(1, 3, 8),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        rotary(**given | change)
