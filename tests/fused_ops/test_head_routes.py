"""The routes of the head's gradient: one scale per row and its rescue, products, buffers.

The Triton kernels run in the interpreter (tests/conftest.py), in tiles of 16 x 32 whose accumulator
is worked off in parts of 16 columns; bytes are counted on meta tensors.
"""

import weakref
from dataclasses import replace

import pytest
import torch
from fastdpo_kernels import _buffers, _chunk, _configs, _launch, linear_logprobs
from fastdpo_kernels._torch import Bounds, LogitTransform, Request
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.fused_ops.test_linear_logprobs import EXTRAS, inputs, oracle_gradients, row_error

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="where there is a GPU tests/gpu/test_updates.py runs the real kernels",
)

ROUTES = {
    "torch product": {},
    "Triton": {"gradient_in_triton": True},
    "Triton by TMA": {"gradient_in_triton": True, "gradient_by_tma": True},
    "one part": {"part_v": 32},
}
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 4e-3}
GEMMA = {"softcap": 5.0, "logit_scale": 1.5, "temperature": 0.8}


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    config = replace(_configs.INTERPRETED, **ROUTES[request.param])
    monkeypatch.setattr(_buffers, "config_for", lambda _weight: config)
    return request.param


def mixed_rows(states, weight, targets):
    """Which rows have a logit that exceeds the target's scale by more than 2^96: (N,) bool."""
    z2 = (states.double() @ weight.double().T) * 1.4426950408889634
    reference = z2.gather(1, targets[:, None]).add(0.5).floor()
    return ((z2.add(0.5).floor() - reference) > 96).any(dim=1)


def measured(states, weight, targets, **options):
    """Log-probs and gradient in the states, with the fp64 truth of both."""
    upstream = torch.linspace(0.5, 2, len(targets))
    transform = {k: v for k, v in options.items() if k in GEMMA}
    truth, want, _, _ = oracle_gradients(states, weight, targets, upstream, **transform)
    leaf = states.clone().requires_grad_()
    logps = linear_logprobs(leaf, weight, targets, backend="triton", **options)
    (logps * upstream).sum().backward()
    return logps.detach(), leaf.grad, truth, want


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("transform", [{}, GEMMA])
def test_every_route_stays_inside_the_bounds(route, dtype, transform):
    for rows, hidden, vocabulary in ((37, 40, 105), (16, 8, 33)):
        states, weight, targets = inputs(rows, hidden, vocabulary, dtype, scale=0.4)
        logps, gradient, truth, want = measured(states, weight, targets, **transform)
        assert ((logps - truth).abs() <= 2e-5 * truth.abs() + 2e-5).all()
        assert row_error(gradient, want) <= BOUNDS[dtype]
        scored = linear_logprobs(states, weight, targets, backend="triton", **transform)
        assert torch.equal(scored, logps), "score and train differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.5, 9.0, 14.0])
def test_rows_of_mixed_scales_are_exact(route, dtype, scale):
    """Logits so wide that tiles leave the scale of their row: log-probs down to -191 nats."""
    states, weight, targets = inputs(40, 24, 90, dtype, seed=3, scale=scale)
    mixed = mixed_rows(states, weight, targets)
    logps, gradient, truth, want = measured(states, weight, targets)
    assert mixed.any() == (scale > 5)
    assert not mixed.all()
    assert scale < 5 or truth.min() < -191
    assert ((logps - truth).abs() <= 2e-5 * truth.abs() + 2e-5).all()
    # A logit of size z is off by eps * z in fp32, whichever BLAS multiplies, and so is 1 - p.
    largest = float((states.double() @ weight.double().T).abs().max())
    rounding = torch.finfo(torch.float32).eps * largest
    assert row_error(gradient, want) <= max(BOUNDS[dtype], rounding)
    scored = linear_logprobs(states, weight, targets, backend="triton")
    assert torch.equal(scored, logps), "score and train differ"


def test_a_target_far_above_all_others_has_no_gradient(route):
    """Entries 2^-126 and less of the target's are nothing: so is their gradient."""
    states, weight, targets = inputs(40, 24, 90, scale=40.0)
    targets = (states @ weight.T).argmax(dim=1)
    logps, gradient, truth, want = measured(states, weight, targets)
    assert (truth == 0).any()
    assert ((logps - truth).abs() <= 2e-5 * truth.abs() + 2e-5).all()
    assert (gradient.double() - want).norm(dim=1).max() <= 1e-4 * want.norm(dim=1).max()


def test_the_rescue_touches_rows_of_mixed_scales_alone(monkeypatch):
    states, weight, targets = inputs(40, 24, 90, seed=3, scale=9.0)
    mixed = mixed_rows(states, weight, targets)
    plan = _buffers.Plan(Request(weight, None, LogitTransform()))
    call = _buffers.Call(plan, states, targets, torch.empty_like(states))
    chunk = _chunk.Chunk(call, slice(0, 40))
    for launch in chunk.scoring():
        launch.run()
    before = chunk.exponentials.clone()
    chunk.rescale().run()
    assert torch.equal((chunk.row_offsets != chunk.references), mixed)
    assert torch.equal(chunk.exponentials[~mixed], before[~mixed])
    shifts = torch.exp2(chunk.offsets - chunk.row_offsets).T
    wanted = before * shifts.repeat_interleave(plan.config.part_v, dim=1)
    assert torch.equal(chunk.exponentials, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extra_outputs_leave_the_bits_alone(route, dtype):
    """Entries of up to 2^96 are squared for an output: beyond fp32, were they not shrunk."""
    states, weight, targets = inputs(40, 24, 90, dtype, seed=3, scale=9.0)
    plain = linear_logprobs(states, weight, targets, backend="triton")
    found = linear_logprobs(states, weight, targets, backend="triton", outputs=EXTRAS)
    assert torch.equal(found.token_logps, plain)
    logps = torch.log_softmax(states.double() @ weight.double().T, dim=-1)
    squares = torch.logsumexp(2 * logps, dim=-1)
    assert torch.allclose(found.log_sum_sq_probs.double(), squares, rtol=1e-5, atol=1e-5)


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made under it that are still alive, and the most there ever were."""

    def __init__(self, *inputs):
        super().__init__()
        self.inputs = {tensor.untyped_storage()._cdata for tensor in inputs}
        self.alive = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive.keys() | self.inputs:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def peak_bytes(monkeypatch, vocabulary, hidden, bound_mib, outputs=(), skip_mass=0.0):
    """Most bytes alive in a training call without U, and the rows of a chunk."""
    monkeypatch.setattr(_buffers, "is_interpreted", lambda: False)
    monkeypatch.setattr(_buffers, "processors_of", lambda _weight: 132)
    monkeypatch.setattr(_buffers, "config_for", lambda _weight: _configs.CONFIGS[(9, 0), 2])
    monkeypatch.setattr(_chunk.Launch, "run", lambda _launch: None)
    monkeypatch.setattr(_chunk, "matmul", lambda _left, _right, out: out)
    states = torch.empty(8192, hidden, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(vocabulary, hidden, dtype=torch.bfloat16, device="meta")
    targets = torch.empty(8192, dtype=torch.int64, device="meta")
    bounds = Bounds(bound_mib * 2**20, skip_mass)
    request = Request(weight, None, LogitTransform(), outputs, bounds)
    call = _buffers.Call(_buffers.Plan(request), states, targets, states)
    rows_at_once = call.rows_at_once
    del call
    with LiveBytes(states, weight, targets) as live:
        _launch.score_with_gradient(states, targets, request)
    return live.peak - 2 * states.numel(), rows_at_once


@pytest.mark.parametrize("vocabulary", [32_000, 128_256, 151_936, 262_144])
@pytest.mark.parametrize("bound_mib", [64, 128, 264, 276])
def test_live_bytes_stay_inside_the_bound(monkeypatch, vocabulary, bound_mib):
    """All that a training call has alive but U, and what it returns per row: 24 bytes each."""
    for hidden in (2560, 4096):
        for options in ({}, {"outputs": EXTRAS}, {"skip_mass": 0.05}):
            peak, rows = peak_bytes(monkeypatch, vocabulary, hidden, bound_mib, **options)
            returned = 8192 * (24 + (8 * 16 if "outputs" in options else 0))
            print(vocabulary, hidden, bound_mib, [*options], rows, f"{peak / 2**20:.1f} MiB")
            assert peak <= bound_mib * 2**20 + returned
            assert rows >= 64


def test_chunks_fill_whole_waves():
    """Rows per chunk of the default bound: a wave's end is not worth half a wave."""
    most = {"128k": 1030, "152k": 870, "262k": 525}
    found = {name: _configs.rows_in_whole_waves(rows, 4096, 132) for name, rows in most.items()}
    assert found == {"128k": 1024, "152k": 512, "262k": 512}
    assert _configs.rows_in_whole_waves(1030, 4096, 128) == 1024
    assert _configs.rows_in_whole_waves(1030, 4096, 108) == 768  # 192 tiles in 2 waves of 108
    assert _configs.rows_in_whole_waves(100, 4096, 132) == 96
    assert _configs.rows_in_whole_waves(3, 4096, 132) == 16


def test_the_backward_makes_no_wider_copies():
    states, weight, targets = inputs(40, 24, 90, torch.bfloat16)
    leaf = states.requires_grad_()
    logps = linear_logprobs(leaf, weight, targets)
    with LiveBytes() as live:
        (gradient,) = torch.autograd.grad(logps.sum(), leaf)
    assert live.peak <= gradient.numel() * 2 + 40 * 16
