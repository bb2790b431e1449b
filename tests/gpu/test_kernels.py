"""The head's kernels on a CUDA device: without peft, TRL or bitsandbytes, which a host may lack."""

from dataclasses import replace

import pytest
import torch
from fastdpo_kernels import linear_logprobs

from tests.fused_ops.test_linear_logprobs import EXTRAS, TRANSFORMS, oracle_gradients, row_error

pytestmark = pytest.mark.gpu


def cuda_inputs(rows, hidden, vocabulary, dtype, scale=0.05):
    draw = torch.Generator(device="cuda").manual_seed(0)
    states = torch.randn(rows, hidden, generator=draw, device="cuda") * scale
    weight = torch.randn(vocabulary, hidden, generator=draw, device="cuda")
    targets = torch.randint(vocabulary, (rows,), generator=draw, device="cuda")
    return states.to(dtype), weight.to(dtype), targets


# Few combinations: every one compiles kernels of its own.
ALL_TRANSFORMS = TRANSFORMS[-1]
SHAPES = [(1, 64, 130), (300, 1000, 3001), (257, 512, 32003)]
CASES = [(torch.bfloat16, shape, t) for shape in SHAPES for t in ({}, ALL_TRANSFORMS)]
CASES += [(torch.float16, SHAPES[2], t) for t in ({}, ALL_TRANSFORMS)]
CASES += [(torch.float32, SHAPES[2], ALL_TRANSFORMS)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("dtype", "shape", "transform"), CASES)
def test_values_and_gradients(backend, dtype, shape, transform):
    states, weight, targets = cuda_inputs(*shape, dtype)
    upstream = torch.linspace(0.5, 2, shape[0], device="cuda")
    truth, want, _, _ = oracle_gradients(states, weight, targets, upstream, **transform)
    leaf = states.clone().requires_grad_()
    options = {"backend": backend, **transform}
    found = linear_logprobs(leaf, weight, targets, outputs=EXTRAS, **options)
    (found.token_logps * upstream).sum().backward()
    assert ((found.token_logps - truth).abs() <= 2e-5 * truth.abs() + 2e-5).all()
    assert (found.token_logps <= 0).all()
    assert row_error(leaf.grad, want) <= (1e-5 if dtype == torch.float32 else 4e-3)
    if shape == SHAPES[2]:
        scored = linear_logprobs(states, weight, targets, **options)
        with_gradient = linear_logprobs(states.clone().requires_grad_(), weight, targets, **options)
        assert torch.equal(scored, with_gradient.detach()), "score and train differ"
        assert torch.equal(scored, found.token_logps.detach()), "outputs change the log-probs"


@pytest.mark.parametrize("route", ["torch's product", "Triton", "Triton by TMA"])
@pytest.mark.parametrize("scale", [0.05, 1.5])
def test_routes_of_the_gradient(monkeypatch, route, scale):
    """The second scale sends rows beyond 2^96 of their target: they are rescued."""
    from fastdpo_kernels import _buffers, _configs

    if route == "Triton by TMA" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA came with compute capability 9.0")
    states, weight, targets = cuda_inputs(300, 512, 8192, torch.bfloat16, scale)
    config = replace(
        _configs.config_for(weight),
        gradient_in_triton=route != "torch's product",
        gradient_by_tma=route == "Triton by TMA",
    )
    monkeypatch.setattr(_buffers, "config_for", lambda _weight: config)
    upstream = torch.linspace(0.5, 2, 300, device="cuda")
    truth, want, _, _ = oracle_gradients(states, weight, targets, upstream)
    leaf = states.clone().requires_grad_()
    logps = linear_logprobs(leaf, weight, targets, backend="triton")
    (logps * upstream).sum().backward()
    print(f"{route}: log-probs from {truth.min():.0f}, error {row_error(leaf.grad, want):.1e}")
    assert ((logps - truth).abs() <= 2e-5 * truth.abs() + 2e-5).all()
    assert row_error(leaf.grad, want) <= 4e-3
    assert torch.equal(linear_logprobs(states, weight, targets, backend="triton"), logps.detach())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_and_reruns_are_bitwise(backend):
    states, weight, targets = cuda_inputs(2100, 512, 8192, torch.bfloat16)
    whole = linear_logprobs(states, weight, targets, backend=backend)
    for count in (1, 37, 1024, 2099):
        part = linear_logprobs(states[:count], weight, targets[:count], backend=backend)
        assert torch.equal(part, whole[:count])
    for _ in range(20):
        assert torch.equal(linear_logprobs(states, weight, targets, backend=backend), whole)


@pytest.mark.parametrize("vocabulary", [32_000, 128_256, 262_144])
@pytest.mark.parametrize("max_buffer_mib", [64, 128, 276])
def test_peak_memory_is_bounded_whatever_the_vocabulary(vocabulary, max_buffer_mib):
    states, weight, targets = cuda_inputs(8192, 512, vocabulary, torch.bfloat16)
    leaf = states.requires_grad_()
    # cuBLAS keeps a workspace from its first product on; it is no buffer of the head.
    linear_logprobs(leaf[:300], weight, targets[:300], backend="triton", ignore_index=None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logps = linear_logprobs(
        leaf, weight, targets, backend="triton", max_buffer_mib=max_buffer_mib, ignore_index=None
    )
    extra = torch.cuda.max_memory_allocated() - before - states.numel() * 2
    print(f"V={vocabulary} bound {max_buffer_mib} MiB: {extra / 2**20:.1f} MiB")
    assert logps.shape == (8192,)
    assert extra <= (max_buffer_mib + 4) * 2**20


def test_offsets_beyond_2_31():
    states, weight, targets = cuda_inputs(16_384, 64, 152_064, torch.bfloat16)
    logps = linear_logprobs(states, weight, targets, backend="triton")
    rows = torch.tensor([0, 1, 9000, 16_383], device="cuda")
    truth, _, _, _ = oracle_gradients(
        states[rows], weight, targets[rows], torch.ones(4, device="cuda")
    )
    assert ((logps[rows] - truth).abs() <= 2e-5 * truth.abs() + 2e-5).all()
