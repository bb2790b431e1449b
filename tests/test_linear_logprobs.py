"""The torch twin against the fp64 oracle: values, gradients, extremes, independence of rows."""

import pytest
import torch
from fastdpo_kernels import _torch, linear_logprobs
from fastdpo_kernels.oracle import linear_logprobs_oracle
from hypothesis import given, settings
from hypothesis import strategies as st

TRANSFORMS = [
    {},
    {"softcap": 30.0},
    {"logit_scale": 0.0625},
    {"temperature": 1.7},
    {"softcap": 5.0, "logit_scale": 1.5, "temperature": 0.8},
]
EXTRAS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that little inputs cross every boundary."""
    monkeypatch.setattr(_torch, "ROWS_CPU", 8)
    monkeypatch.setattr(_torch, "TILE_BYTES", 4 * 8 * 13)


def inputs(rows, hidden, vocabulary, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, hidden, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return states.to(dtype), weight.to(dtype), targets


def oracle_gradients(states, weight, targets, upstream, bias=None, **transform):
    leaves = [t.double().detach().requires_grad_() for t in (states, weight)]
    leaf_bias = None if bias is None else bias.double().detach().requires_grad_()
    truth = linear_logprobs_oracle(*leaves, targets, bias=leaf_bias, **transform)["token_logps"]
    (truth * upstream.double()).sum().backward()
    return truth.detach(), leaves[0].grad, leaves[1].grad, None if bias is None else leaf_bias.grad


def row_error(got, want):
    return ((got.double() - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-30)).max().item()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_fp64_values_and_gradients_match_autograd(small_tiles, transform, with_bias):
    states, weight, targets = inputs(21, 17, 37, torch.float64)
    bias = torch.linspace(-1, 1, 37, dtype=torch.float64) if with_bias else None
    upstream = torch.linspace(-2, 3, 21, dtype=torch.float64)
    truth, want_states, want_weight, want_bias = oracle_gradients(
        states, weight, targets, upstream, bias, **transform
    )
    for head_trains in (False, True):
        leaves = (states.clone().requires_grad_(), weight.clone().requires_grad_(head_trains))
        leaf_bias = None if bias is None else bias.clone().requires_grad_(head_trains)
        logps = linear_logprobs(*leaves, targets, bias=leaf_bias, **transform)
        (logps * upstream).sum().backward()
        assert (logps - truth).abs().max() < 2e-14 * truth.abs().max()
        assert row_error(leaves[0].grad, want_states) < 1e-14
        if head_trains:
            assert row_error(leaves[1].grad, want_weight) < 1e-12
            if bias is not None:
                assert (leaf_bias.grad - want_bias).abs().max() < 1e-13


def test_gradient_formula_in_fp64_to_2e_15():
    states, weight, targets = inputs(40, 24, 300, torch.float64, scale=0.3)
    for transform in ({}, {"softcap": 30.0, "logit_scale": 0.5}):
        upstream = torch.ones(40, dtype=torch.float64)
        _, want, _, _ = oracle_gradients(states, weight, targets, upstream, **transform)
        leaf = states.clone().requires_grad_()
        linear_logprobs(leaf, weight, targets, **transform).sum().backward()
        error = (leaf.grad - want).abs().max() / want.abs().max()
        assert error < 2e-15, f"relative error {error:.1e} with {transform}"


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_low_precision_stays_inside_the_bounds(small_tiles, dtype, bound, transform):
    states, weight, targets = inputs(50, 64, 201, dtype, scale=0.4)
    upstream = torch.linspace(0.5, 2, 50)
    truth, want, want_weight, _ = oracle_gradients(states, weight, targets, upstream, **transform)
    for head_trains in (False, True):
        leaf, head = states.clone().requires_grad_(), weight.clone().requires_grad_(head_trains)
        logps = linear_logprobs(leaf, head, targets, **transform)
        assert logps.dtype == torch.float32
        (logps * upstream).sum().backward()
        assert ((logps - truth).abs() <= 2e-5 * truth.abs() + 2e-5).all()
        assert (logps <= 0).all()
        assert row_error(leaf.grad, want) <= bound
        if head_trains:
            assert row_error(head.grad, want_weight) <= bound


@pytest.mark.parametrize("probability", [0.5, 0.9, 0.99, 0.999, 0.9999])
def test_no_cancellation_near_certainty(probability):
    vocabulary, hidden = 50, 8
    states, weight, targets = inputs(1, hidden, vocabulary)
    others = (states @ weight.T)[0].double()
    others[targets] = -torch.inf
    wanted = torch.logsumexp(others, 0) + torch.tensor(probability).double().logit()
    bias = torch.zeros(vocabulary)
    bias[targets] = (wanted - (states @ weight.T)[0, targets].double()).float()
    upstream = torch.ones(1)
    truth, want, _, _ = oracle_gradients(states, weight, targets, upstream, bias)
    for head_trains in (False, True):
        leaf = states.clone().requires_grad_()
        head = weight.clone().requires_grad_(head_trains)
        logps = linear_logprobs(leaf, head, targets, bias=bias)
        logps.sum().backward()
        assert abs(truth.exp().item() - probability) < 1e-3
        assert row_error(leaf.grad, want) <= 5e-4
        assert (logps - truth).abs().max() <= 1e-4 * truth.abs().max() + 1e-7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extra_outputs(small_tiles, dtype):
    states, weight, targets = inputs(19, 16, 40, dtype)
    targets[:5] = (states[:5] @ weight.T).argmax(dim=1)
    truth = linear_logprobs_oracle(states, weight, targets, softcap=4.0)
    found = linear_logprobs(states, weight, targets, softcap=4.0, outputs=EXTRAS)
    for name in EXTRAS:
        figure = getattr(found, name)
        if name == "is_top1":
            assert torch.equal(figure, truth[name])
            assert figure[:5].all()
        else:
            assert torch.allclose(figure.double(), truth[name], rtol=1e-5, atol=1e-5), name
    with_grad = linear_logprobs(
        states.clone().requires_grad_(), weight, targets, softcap=4.0, outputs=EXTRAS
    )
    assert torch.equal(with_grad.entropy, found.entropy)
    assert not with_grad.entropy.requires_grad


def test_score_and_train_paths_are_bitwise_equal(small_tiles):
    states, weight, targets = inputs(30, 16, 60)
    scored = linear_logprobs(states, weight, targets)
    frozen = linear_logprobs(states.clone().requires_grad_(), weight, targets)
    trained = linear_logprobs(states, weight.clone().requires_grad_(), targets)
    assert torch.equal(scored, frozen.detach())
    assert torch.equal(scored, trained.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(dtype):
    states, weight, targets = inputs(700, 64, 512, dtype)
    whole = linear_logprobs(states, weight, targets)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(1))
    assert torch.equal(linear_logprobs(states[order], weight, targets[order]), whole[order])
    for count in (1, 5, 100, 257, 699):
        assert torch.equal(linear_logprobs(states[:count], weight, targets[:count]), whole[:count])


def test_ignored_rows_cost_nothing_and_return_zero(small_tiles):
    states, weight, targets = inputs(12, 8, 30)
    masked = targets.clone()
    masked[[0, 3, 11]] = -100
    leaf = states.clone().requires_grad_()
    logps = linear_logprobs(leaf.reshape(3, 4, 8), weight, masked.reshape(3, 4))
    logps.sum().backward()
    assert logps.shape == (3, 4)
    assert (logps.flatten()[[0, 3, 11]] == 0).all()
    assert (leaf.grad[[0, 3, 11]] == 0).all()
    assert (leaf.grad[1] != 0).any()
    nothing = linear_logprobs(states.requires_grad_(), weight, torch.full((12,), -100))
    nothing.sum().backward()
    assert (states.grad == 0).all()
    assert linear_logprobs(states[:0], weight, targets[:0]).shape == (0,)


def test_extremes():
    states, weight, targets = inputs(6, 8, 20)
    for offset in (1e3, 1e4):
        shifted = linear_logprobs(states, weight, targets, bias=torch.full((20,), offset))
        assert (shifted - linear_logprobs(states, weight, targets)).abs().max() < 5e-3
    huge = linear_logprobs((states * 1e4).requires_grad_(), weight, targets)
    huge.sum().backward()
    assert torch.isfinite(huge).all()
    assert torch.isfinite(states).all()
    assert (linear_logprobs(states, weight[:1], torch.zeros(6, dtype=torch.int64)) == 0).all()
    poisoned = states.clone()
    poisoned[2] = torch.nan
    logps = linear_logprobs(poisoned, weight, targets)
    assert logps[2].isnan()
    assert torch.isfinite(logps[[0, 1, 3, 4, 5]]).all()


def test_logits_of_minus_infinity_elsewhere_are_fine(small_tiles):
    states, weight, targets = inputs(6, 8, 40)
    bias = torch.full((40,), -torch.inf)
    bias[targets] = 0.0
    bias[39] = 0.0
    leaf = states.clone().requires_grad_()
    logps = linear_logprobs(leaf, weight, targets, bias=bias)
    logps.sum().backward()
    assert torch.isfinite(logps).all()
    assert torch.isfinite(leaf.grad).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    hidden=st.sampled_from([1, 8, 33]),
    vocabulary=st.integers(1, 120),
    transform=st.sampled_from(TRANSFORMS),
    seed=st.integers(0, 10_000),
)
def test_any_shape_matches_the_oracle(rows, hidden, vocabulary, transform, seed):
    states, weight, targets = inputs(rows, hidden, vocabulary, torch.float64, seed)
    truth = linear_logprobs_oracle(states, weight, targets, **transform)["token_logps"]
    logps = linear_logprobs(states, weight, targets, **transform)
    assert torch.allclose(logps, truth, rtol=1e-11, atol=1e-11)
    assert (logps <= 0).all()


def test_gradcheck():
    states, weight, targets = inputs(5, 4, 9, torch.float64)
    bias = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprobs(h, w, targets, bias=b, softcap=3.0),
        (states.requires_grad_(), weight.requires_grad_(), bias),
    )


def test_autocast_works_as_linear_does():
    states, weight, targets = inputs(10, 16, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = linear_logprobs(states, weight, targets)
    by_hand = linear_logprobs(states.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(logps, by_hand)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(4, 7)}, r"need \(\.\.\., H\) and \(V, H\)"),
        ({"target_ids": torch.zeros(3, dtype=torch.int64)}, "one target per state"),
        ({"weight": torch.zeros(9, 8, dtype=torch.bfloat16)}, "one floating dtype"),
        ({"target_ids": torch.full((4,), 9)}, r"\[9, 9\], the vocabulary in \[0, 8\]"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"outputs": ("entropie",)}, "entropie"),
        ({"backend": "cuda"}, "backend 'cuda' does not exist"),
        ({"bias": torch.zeros(8)}, "bias"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "hidden_states": torch.zeros(4, 8),
        "weight": torch.zeros(9, 8),
        "target_ids": torch.zeros(4, dtype=torch.int64),
    } | change
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**arguments)
