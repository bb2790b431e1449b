"""linear_cross_entropy against torch's own on materialised logits: values, gradients, semantics.

The Triton kernels run in the interpreter (tests/conftest.py).
"""

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from fastdpo_kernels import linear_cross_entropy, linear_logprobs
from hypothesis import given, settings
from hypothesis import strategies as st

of_torch = getattr(F, "linear_cross_entropy", None)
needs_torch_own = pytest.mark.skipif(
    of_torch is None, reason="torch.nn.functional.linear_cross_entropy came with torch 2.12"
)
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3}


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


def inputs(shape, hidden=16, vocabulary=40, dtype=torch.float64, seed=0, with_bias=True):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(*shape, hidden, generator=generator, dtype=torch.float64) * 0.5
    weight = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, shape, generator=generator)
    return states.to(dtype), weight.to(dtype), bias.to(dtype) if with_bias else None, targets


def with_gradients(function, states, weight, bias, targets, **options):
    """The losses, and the gradients of their sum under an uneven upstream."""
    leaves = [t.clone().requires_grad_() for t in (states, weight)]
    if bias is not None:
        leaves.append(bias.clone().requires_grad_())
    loss = function(leaves[0], leaves[1], targets, leaves[2] if leaves[2:] else None, **options)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    (loss * upstream).sum().backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


def ours(states, weight, targets, bias, **options):
    return linear_cross_entropy(states, weight, targets, linear_bias=bias, **options)


def materialised(states, weight, targets, bias, **options):
    """torch's cross_entropy in fp64 on the logits; leading dimensions are flattened for it."""
    logits = F.linear(states.double(), weight.double(), None if bias is None else bias.double())
    if states.ndim == 1:
        return F.cross_entropy(logits, targets, **options)
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), **options)
    return loss.reshape(targets.shape) if options.get("reduction") == "none" else loss


def gap(got, want):
    """Largest difference in units of the largest entry wanted."""
    return ((got.double() - want).abs().max() / want.double().abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_fp64_values_and_gradients_match_cross_entropy(reduction, smoothing):
    for shape, with_bias, ignore in itertools.product(
        ((), (21,), (3, 7)), (False, True), (None, -100, 5)
    ):
        states, weight, bias, targets = inputs(shape, with_bias=with_bias)
        if ignore is not None and shape:
            targets.view(-1)[::4] = ignore
        options = {"reduction": reduction, "label_smoothing": smoothing}
        loss, gradients = with_gradients(
            ours, states, weight, bias, targets, ignore_index=ignore, **options
        )
        truth, wanted = with_gradients(
            materialised,
            states,
            weight,
            bias,
            targets,
            ignore_index=-100 if ignore is None else ignore,
            **options,
        )
        assert loss.shape == truth.shape
        assert loss.dtype == torch.float64
        for got, want in zip((loss, *gradients), (truth, *wanted), strict=True):
            assert gap(got, want) < BOUND[torch.float64], (shape, with_bias, ignore)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_low_precision_stays_inside_the_bounds(backend, dtype, smoothing):
    """With smoothing two gradients are rounded before they are added: the bound is on each."""
    states, weight, bias, targets = inputs((2, 17), 24, 70, dtype)
    targets[0, :3] = -100
    exact = (states.double(), weight.double(), bias.double(), targets)
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        loss, gradients = with_gradients(
            ours, states, weight, bias, targets, backend=backend, **options
        )
        truth, wanted = with_gradients(materialised, *exact, **options)
        _, unsmoothed = with_gradients(materialised, *exact, reduction=reduction)
        assert loss.dtype == torch.float32
        assert ((loss - truth).abs() <= 2e-5 * truth.abs() + 2e-5).all()
        for got, want, part in zip(gradients, wanted, unsmoothed, strict=True):
            assert got.dtype == dtype
            size = part.norm(dim=-1) + (want - part).norm(dim=-1)
            assert ((got.double() - want).norm(dim=-1) <= BOUND[dtype] * size).all()


@pytest.mark.parametrize("length", [0.0, 2.0, 4.0])
def test_closer_than_bf16_logits(length):
    """From untrained to certain: the loss and both gradients are nearer the truth than usual."""
    states, weight, _, targets = inputs((200,), 64, 500, torch.bfloat16)
    toward_target = weight[targets] / weight[targets].norm(dim=1, keepdim=True)
    states = states * 0.6 + toward_target * length

    def naive(states, weight, targets, bias, **options):
        return F.cross_entropy(F.linear(states, weight).float(), targets, **options)

    for smoothing in (0.0, 0.1):
        found, usual, (truth, wanted) = (
            with_gradients(function, *tensors, None, targets, label_smoothing=smoothing)
            for function, tensors in (
                (ours, (states, weight)),
                (naive, (states, weight)),
                (materialised, (states.double(), weight.double())),
            )
        )
        assert abs(found[0] - truth) <= abs(usual[0] - truth)
        for got, other, want in zip(found[1], usual[1], wanted, strict=True):
            assert gap(got, want) <= gap(other, want)


def test_frozen_head_and_frozen_states(backend):
    states, weight, bias, targets = inputs((19,), dtype=torch.float32)
    options = {"label_smoothing": 0.2, "backend": backend}
    _, wanted = with_gradients(ours, states, weight, bias, targets, **options)
    for trained in range(3):
        leaves = [states.clone(), weight.clone(), bias.clone()]
        leaves[trained].requires_grad_()
        (ours(leaves[0], leaves[1], targets, leaves[2], **options) * 0.5).backward()
        assert gap(leaves[trained].grad, wanted[trained]) < 1e-5
        assert [leaf.grad is None for leaf in leaves].count(True) == 2


def test_smoothed_head_gradient_is_summed_in_fp32():
    """One target a thousand times over: a sum in bf16 would stop growing after 256."""
    states, weight, _, targets = inputs((1000,), 8, 12, torch.bfloat16)
    states, targets = states.abs(), torch.full_like(targets, 3)
    exact = (states.double(), weight.double(), None, targets)
    _, gradients = with_gradients(
        ours, states, weight, None, targets, reduction="sum", label_smoothing=0.9
    )
    _, wanted = with_gradients(materialised, *exact, reduction="sum", label_smoothing=0.9)
    _, part = with_gradients(materialised, *exact, reduction="sum")
    size = part[1].norm(dim=-1) + (wanted[1] - part[1]).norm(dim=-1)
    assert ((gradients[1].double() - wanted[1]).norm(dim=-1) <= 4e-3 * size).all()


@needs_torch_own
def test_signature_is_torchs():
    mine = list(inspect.signature(linear_cross_entropy).parameters.values())
    theirs = list(inspect.signature(of_torch).parameters.values())
    for parameter, wanted in zip(mine, theirs, strict=False):
        assert parameter.name == wanted.name
        assert parameter.kind == wanted.kind
        assert parameter.default == wanted.default
    added = [parameter.name for parameter in mine[len(theirs) :]]
    assert added == ["softcap", "logit_scale", "backend"]


@needs_torch_own
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_fp32_equals_torchs_own(backend, smoothing):
    def theirs(states, weight, targets, bias, **options):
        return of_torch(states, weight, targets, linear_bias=bias, **options)

    for shape, reduction in itertools.product(((), (21,)), ("mean", "sum", "none")):
        states, weight, bias, targets = inputs(shape, dtype=torch.float32)
        if shape:
            targets[::3] = -100
        options = {"reduction": reduction, "label_smoothing": smoothing}
        loss, gradients = with_gradients(
            ours, states, weight, bias, targets, backend=backend, **options
        )
        truth, wanted = with_gradients(theirs, states, weight, bias, targets, **options)
        for got, want in zip((loss, *gradients), (truth, *wanted), strict=True):
            assert gap(got, want) <= BOUND[torch.float32]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nothing_to_score_is_as_torch_has_it(backend, smoothing):
    states, weight, bias, targets = inputs((6,), dtype=torch.float32)
    for rows, ids in ((states, torch.full_like(targets, -100)), (states[:0], targets[:0])):
        for reduction in ("mean", "sum", "none"):
            options = {"reduction": reduction, "label_smoothing": smoothing}
            loss, gradients = with_gradients(
                ours, rows, weight, bias, ids, backend=backend, **options
            )
            want, _ = with_gradients(materialised, rows, weight, bias, ids, **options)
            assert torch.equal(loss.isnan(), want.isnan())
            assert (loss.nan_to_num() == 0).all()
            assert all((gradient == 0).all() for gradient in gradients)


def test_ignored_rows_may_hold_anything(backend):
    states, weight, _, targets = inputs((6,), dtype=torch.float32)
    states[2], targets[2] = torch.nan, -100
    loss, gradients = with_gradients(
        ours, states, weight, None, targets, label_smoothing=0.1, backend=backend
    )
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_transform_of_the_logits(backend):
    states, weight, bias, targets = inputs((9,), dtype=torch.float32)
    capped = ours(states, weight, targets, bias, softcap=3.0, reduction="none", backend=backend)
    logps = linear_logprobs(states, weight, targets, bias=bias, softcap=3.0, backend=backend)
    assert torch.equal(capped, -logps)
    options = {"label_smoothing": 0.3, "reduction": "none"}
    scaled = ours(states, weight, targets, bias, logit_scale=0.25, backend=backend, **options)
    assert gap(scaled, materialised(states, weight / 4, targets, bias / 4, **options)) < 1e-5


def test_gradcheck():
    states, weight, bias, targets = inputs((5,), 4, 9)
    targets[1] = -100
    leaves = [tensor.requires_grad_() for tensor in (states, weight, bias)]
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda h, w, b, reduction=reduction: ours(
                h, w, targets, b, label_smoothing=0.3, logit_scale=0.7, reduction=reduction
            ),
            leaves,
        )


def test_autocast_works_as_linear_does():
    states, weight, bias, targets = inputs((10,), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradients = with_gradients(ours, states, weight, bias, targets, label_smoothing=0.1)
    by_hand, wanted = with_gradients(
        ours,
        *(tensor.bfloat16() for tensor in (states, weight, bias)),
        targets,
        label_smoothing=0.1,
    )
    assert torch.equal(loss, by_hand)
    for got, want in zip(gradients, wanted, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want.float())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    hidden=st.sampled_from([1, 8, 33]),
    vocabulary=st.integers(1, 120),
    smoothing=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    ignore=st.integers(-1, 3),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 10_000),
)
def test_any_shape_matches_cross_entropy(
    rows, hidden, vocabulary, smoothing, ignore, reduction, seed
):
    states, weight, bias, targets = inputs((rows,), hidden, vocabulary, seed=seed)
    options = {"label_smoothing": smoothing, "ignore_index": ignore, "reduction": reduction}
    loss = ours(states, weight, targets, bias, **options)
    truth = materialised(states, weight, targets, bias, **options)
    assert torch.allclose(loss, truth, rtol=1e-11, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(9)}, r"weight \(a factor per class\) is not supported"),
        ({"options": object()}, "options are not supported"),
        ({"linear_weight": torch.zeros(9, 2, 8)}, r"\(9, 2, 8\): the K-dimensional loss"),
        ({"target": torch.zeros(4, 9)}, "class probabilities are not supported"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, "need int64"),
        ({"target": torch.full((4,), 9)}, r"\[9, 9\], the vocabulary in \[0, 8\]"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, "one target per state"),
        ({"reduction": "average"}, "reduction 'average' does not exist"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"label_smoothing": 0.1, "softcap": 30.0}, "label_smoothing 0.1 with softcap 30.0"),
        ({"backend": "cuda"}, "backend 'cuda' does not exist"),
    ],
)
def test_what_is_not_supported_is_named(change, message):
    arguments = {
        "input": torch.zeros(4, 8),
        "linear_weight": torch.zeros(9, 8),
        "target": torch.zeros(4, dtype=torch.int64),
    } | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)
