"""Both backends against the fp64 oracle: values, gradients, extremes, independence of rows.

The Triton kernels run in the interpreter (tests/conftest.py), in tiles of 16 x 32.
"""

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


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("where there is a GPU tests/gpu/test_updates.py runs the compiled kernels")
    return request.param


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


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 4e-3)]
)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_low_precision_stays_inside_the_bounds(small_tiles, backend, dtype, bound, transform):
    states, weight, targets = inputs(35, 40, 105, dtype, scale=0.4)
    upstream = torch.linspace(0.5, 2, 35)
    truth, want, want_weight, _ = oracle_gradients(states, weight, targets, upstream, **transform)
    for head_trains in (False, True):
        leaf, head = states.clone().requires_grad_(), weight.clone().requires_grad_(head_trains)
        logps = linear_logprobs(leaf, head, targets, backend=backend, **transform)
        assert logps.dtype == torch.float32
        (logps * upstream).sum().backward()
        assert ((logps - truth).abs() <= 2e-5 * truth.abs() + 2e-5).all()
        assert (logps <= 0).all()
        assert row_error(leaf.grad, want) <= bound
        if head_trains:
            assert row_error(head.grad, want_weight) <= bound


@pytest.mark.parametrize("probability", [0.5, 0.9, 0.99, 0.999, 0.9999])
def test_no_cancellation_near_certainty(backend, probability):
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
        logps = linear_logprobs(leaf, head, targets, bias=bias, backend=backend)
        logps.sum().backward()
        assert abs(truth.exp().item() - probability) < 1e-3
        assert row_error(leaf.grad, want) <= 5e-4
        assert (logps - truth).abs().max() <= 1e-4 * truth.abs().max() + 1e-7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extra_outputs(small_tiles, backend, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels compute in fp32")
    states, weight, targets = inputs(19, 16, 40, dtype)
    targets[:5] = (states[:5] @ weight.T).argmax(dim=1)
    truth = linear_logprobs_oracle(states, weight, targets, softcap=4.0)
    options = {"softcap": 4.0, "outputs": EXTRAS, "backend": backend}
    found = linear_logprobs(states, weight, targets, **options)
    for name in EXTRAS:
        metric = getattr(found, name)
        if name == "is_top1":
            assert torch.equal(metric, truth[name])
            assert metric[:5].all()
        else:
            assert torch.allclose(metric.double(), truth[name], rtol=1e-5, atol=1e-5), name
    with_grad = linear_logprobs(states.clone().requires_grad_(), weight, targets, **options)
    assert torch.equal(with_grad.entropy, found.entropy)
    assert not with_grad.entropy.requires_grad


def test_score_and_train_paths_are_bitwise_equal(small_tiles, backend):
    states, weight, targets = inputs(30, 16, 60)
    scored = linear_logprobs(states, weight, targets, backend=backend)
    leaf, head = states.clone().requires_grad_(), weight.clone().requires_grad_()
    frozen = linear_logprobs(leaf, weight, targets, backend=backend)
    trained = linear_logprobs(states, head, targets, backend=backend)
    assert torch.equal(scored, frozen.detach())
    assert torch.equal(scored, trained.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(backend, dtype):
    """On sums that float32 holds exactly: a BLAS may give a row other last bits by its place.

    The interpreter's product is numpy's, whose OpenBLAS kernels for Haswell and Zen do.
    """
    rows, vocabulary = (700, 512) if backend == "torch" else (70, 96)
    states, weight, targets = inputs(rows, 64, vocabulary)
    states, weight = ((tensor * 8).round().div(8).to(dtype) for tensor in (states, weight))
    whole = linear_logprobs(states, weight, targets, backend=backend)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    mixed = linear_logprobs(states[order], weight, targets[order], backend=backend)
    assert torch.equal(mixed, whole[order])
    for count in (1, 5, 37, rows // 2, rows - 1):
        part = linear_logprobs(states[:count], weight, targets[:count], backend=backend)
        assert torch.equal(part, whole[:count])


def test_ignored_rows_cost_nothing_and_return_zero(small_tiles, backend):
    states, weight, targets = inputs(12, 8, 30)
    masked = targets.clone()
    masked[[0, 3, 11]] = -100
    leaf = states.clone().requires_grad_()
    logps = linear_logprobs(leaf.reshape(3, 4, 8), weight, masked.reshape(3, 4), backend=backend)
    logps.sum().backward()
    assert logps.shape == (3, 4)
    assert (logps.flatten()[[0, 3, 11]] == 0).all()
    assert (leaf.grad[[0, 3, 11]] == 0).all()
    assert (leaf.grad[1] != 0).any()
    all_ignored = torch.full((12,), -100)
    nothing = linear_logprobs(states.requires_grad_(), weight, all_ignored, backend=backend)
    nothing.sum().backward()
    assert (states.grad == 0).all()
    assert linear_logprobs(states[:0], weight, targets[:0], backend=backend).shape == (0,)


def test_extremes(backend):
    states, weight, targets = inputs(6, 8, 20)
    plain = linear_logprobs(states, weight, targets, backend=backend)
    for offset in (1e3, 1e4):
        bias = torch.full((20,), offset)
        shifted = linear_logprobs(states, weight, targets, bias=bias, backend=backend)
        assert (shifted - plain).abs().max() < 5e-3
    leaf = (states * 1e4).requires_grad_()
    huge = linear_logprobs(leaf, weight, targets, backend=backend)
    huge.sum().backward()
    assert torch.isfinite(huge).all()
    assert torch.isfinite(leaf.grad).all()
    only, zeros = weight[:1], torch.zeros(6, dtype=torch.int64)
    leaf = states.clone().requires_grad_()
    certain = linear_logprobs(leaf, only, zeros, backend=backend)
    certain.sum().backward()
    assert (certain == 0).all()
    assert (leaf.grad == 0).all()
    poisoned = states.clone()
    poisoned[2] = torch.nan
    leaf = poisoned.requires_grad_()
    logps = linear_logprobs(leaf, weight, targets, backend=backend)
    logps.sum().backward()
    assert logps[2].isnan()
    assert leaf.grad[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.isfinite(logps[others]).all()
    assert torch.isfinite(leaf.grad[others]).all()


def test_logits_of_minus_infinity_elsewhere_are_fine(small_tiles, backend):
    states, weight, targets = inputs(6, 8, 40)
    bias = torch.full((40,), -torch.inf)
    bias[targets] = 0.0
    bias[39] = 0.0
    leaf = states.clone().requires_grad_()
    logps = linear_logprobs(leaf, weight, targets, bias=bias, backend=backend)
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
        ({"max_buffer_mib": 0}, "max_buffer_mib is 0"),
        ({"skip_mass": 1.0}, "skip_mass is 1.0"),
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


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    hidden=st.sampled_from([1, 16, 33]),
    vocabulary=st.integers(1, 120),
    transform=st.sampled_from(TRANSFORMS),
    with_bias=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_any_shape_in_triton_matches_the_oracle(
    rows, hidden, vocabulary, transform, with_bias, seed
):
    states, weight, targets = inputs(rows, hidden, vocabulary, torch.float32, seed, scale=0.5)
    bias = torch.linspace(-1, 1, vocabulary) if with_bias else None
    upstream = torch.linspace(0.5, 2, rows)
    truth, want, _, _ = oracle_gradients(states, weight, targets, upstream, bias, **transform)
    leaf = states.clone().requires_grad_()
    logps = linear_logprobs(leaf, weight, targets, bias=bias, backend="triton", **transform)
    (logps * upstream).sum().backward()
    assert ((logps - truth).abs() <= 2e-5 * truth.abs() + 2e-5).all()
    assert (logps <= 0).all()
    assert (leaf.grad - want).norm(dim=1).max() <= 1e-5 * want.norm(dim=1).max() + 1e-6


def test_sliced_and_strided_inputs(backend):
    states, weight, targets = inputs(20, 24, 50)
    wide = torch.zeros(20, 40)
    wide[:, 8:32] = states
    tall = torch.zeros(24, 50)
    tall[:] = weight.T
    plain = linear_logprobs(states, weight, targets, backend=backend)
    for h, w in ((wide[:, 8:32], weight), (states, tall.T), (states.T.contiguous().T, weight)):
        leaf = h.clone(memory_format=torch.preserve_format).requires_grad_()
        logps = linear_logprobs(leaf, w, targets, backend=backend)
        logps.sum().backward()
        assert torch.allclose(logps, plain, rtol=1e-6, atol=1e-6)
        assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize("skip_mass", [1e-3, 0.05, 0.3])
def test_skipping_stays_inside_its_bound(peaked, skip_mass):
    """Error of a row's gradient <= skip_mass * logit scale * largest row norm of the weight."""
    states, weight, targets = inputs(40, 16, 300, scale=0.5)
    bias = None
    if peaked:  # one column in a hundred carries nearly everything, as in a trained model
        bias = torch.full((300,), -6.0)
        bias[::100] = 4.0
    scale = 0.7
    gradients = []
    for mass in (0.0, skip_mass):
        leaf = states.clone().requires_grad_()
        logps = linear_logprobs(
            leaf, weight, targets, bias=bias, logit_scale=scale, backend="triton", skip_mass=mass
        )
        logps.sum().backward()
        gradients.append(leaf.grad)
    error = (gradients[0] - gradients[1]).norm(dim=1).max()
    assert error <= skip_mass * scale * weight.norm(dim=1).max() + 1e-5
    if peaked and skip_mass == 0.05:
        assert error > 0, "nothing was skipped although whole tiles carry next to nothing"


def test_buffers_stay_inside_their_bound(monkeypatch):
    """Rows go in chunks: many chunks give the same log-probs to the bit as one."""
    from fastdpo_kernels import _buffers, _launch

    states, weight, targets = inputs(50, 16, 70)
    leaf = states.clone().requires_grad_()
    whole = linear_logprobs(leaf, weight, targets, backend="triton")
    whole.sum().backward()
    monkeypatch.setattr(_buffers, "SCORE_BYTES", 1)
    request = _torch.Request(weight, None, _torch.LogitTransform(), (), _torch.Bounds(1))
    rows, gradients = _launch.score_with_gradient(states, targets, request)
    assert torch.equal(rows.logps, whole.detach())
    assert torch.allclose(gradients, leaf.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(linear_logprobs(states, weight, targets, backend="triton"), whole.detach())


def test_triton_says_what_is_missing():
    states, weight, targets = inputs(4, 8, 9, torch.float64)
    with pytest.raises(RuntimeError, match="computes in fp32, and the input is fp64"):
        linear_logprobs(states, weight, targets, backend="triton")


def same_dtype_twin(states, weight, targets, upstream, logits_dtype):
    """Materialised logits in `logits_dtype`, the gradient's GEMM in the inputs' dtype."""
    z = (states.to(logits_dtype) @ weight.to(logits_dtype).T).float()
    logps = torch.log_softmax(z, dim=-1)
    grad_z = -logps.exp()
    grad_z[torch.arange(len(targets)), targets] += 1.0
    grad_z = (grad_z * upstream[:, None]).to(states.dtype)
    gradient = (grad_z.float() @ weight.float()).to(states.dtype)
    return logps.gather(1, targets[:, None]).squeeze(1), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 48, 203), (17, 100, 77)])
def test_error_is_at_most_twice_that_of_the_twin_with_fp32_logits(backend, dtype, shape):
    states, weight, targets = inputs(*shape, dtype, scale=0.4)
    upstream = torch.linspace(0.5, 2, shape[0])
    truth, want, _, _ = oracle_gradients(states, weight, targets, upstream)
    leaf = states.clone().requires_grad_()
    logps = linear_logprobs(leaf, weight, targets, backend=backend)
    (logps * upstream).sum().backward()

    def errors(found, gradient):
        return (found.double() - truth).abs().max().item(), row_error(gradient, want)

    ours = errors(logps.detach(), leaf.grad)
    twin = errors(*same_dtype_twin(states, weight, targets, upstream, torch.float32))
    naive = errors(*same_dtype_twin(states, weight, targets, upstream, dtype))
    print(f"{backend} {dtype} {shape}: logp, gradient {ours}; twin {twin}; naive {naive}")
    assert ours[0] <= 2 * twin[0] + 2e-6
    assert ours[1] <= 2 * twin[1] + 1e-6
