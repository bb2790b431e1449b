"""The head's kernels on a CUDA device; it needs nothing but torch and Triton."""

import pytest
import torch
from fastdpo_kernels import linear_logprobs
from test_linear_logprobs import EXTRAS, TRANSFORMS, oracle_gradients, row_error

pytestmark = pytest.mark.gpu


def cuda_inputs(rows, hidden, vocabulary, dtype, scale=0.05):
    draw = torch.Generator(device="cuda").manual_seed(0)
    states = torch.randn(rows, hidden, generator=draw, device="cuda") * scale
    weight = torch.randn(vocabulary, hidden, generator=draw, device="cuda")
    targets = torch.randint(vocabulary, (rows,), generator=draw, device="cuda")
    return states.to(dtype), weight.to(dtype), targets


RAGGED = (300, 1000, 3001)
VARIANTS = [(torch.bfloat16, transform, RAGGED) for transform in TRANSFORMS]
VARIANTS += [(torch.bfloat16, {}, shape) for shape in ((1, 64, 130), (257, 512, 32003))]
VARIANTS += [(d, t, RAGGED) for d in (torch.float16, torch.float32) for t in ({}, TRANSFORMS[-1])]
"""Dtype, transform, (N, H, V): each costs the compilation of several kernels."""


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("dtype", "transform", "shape"), VARIANTS)
def test_values_and_gradients(backend, dtype, transform, shape):
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
    scored = linear_logprobs(states, weight, targets, **options)
    with_gradient = linear_logprobs(states.clone().requires_grad_(), weight, targets, **options)
    assert torch.equal(scored, with_gradient.detach()), "score and train differ"


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
@pytest.mark.parametrize("max_buffer_mib", [64, 128])
def test_peak_memory_is_bounded_whatever_the_vocabulary(vocabulary, max_buffer_mib):
    states, weight, targets = cuda_inputs(8192, 512, vocabulary, torch.bfloat16)
    leaf = states.requires_grad_()
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
