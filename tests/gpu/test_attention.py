"""Attention on a CUDA device: every kernel against the dense mask in float32, with gradients."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fastdpo.batching import Segment, pack_update
from fastdpo.modeling.attention import PackedSegments, packed_attention
from fastdpo.modeling.attention.dispatch import _capability, _needs_of
from fastdpo.modeling.attention.flex import allowed_by, attend_flex
from fastdpo.modeling.attention.sdpa import attend_segments
from fastdpo.modeling.attention.segments import AttentionParams
from fastdpo.modeling.attention.varlen import attend_varlen, torch_kernel
from fastdpo.modeling.attention_backends import select_backend
from fastdpo.modeling.logprobs import packed_logprobs
from tests.modeling.test_packed_pairs import model_of, packed, random_groups

pytestmark = pytest.mark.gpu

BOUNDS = {torch.float32: (2e-5, 5e-5), torch.float16: (2e-3, 4e-3), torch.bfloat16: (1e-2, 2e-2)}
"""Relative errors of the output and of gradients, as norms over all of it."""

TERMS = {
    "plain": {},
    "window": {"window": 17},
    "capped": {"softcap": 20.0},
    "capped window": {"softcap": 20.0, "window": 17},
    "sinks": {"sinks": True},
    "sinks window": {"sinks": True, "window": 17},
}


def varlen(query, key, value, packed_row, terms):
    return attend_varlen(query, key, value, packed_row, terms, torch_kernel(query.device))


BACKENDS = {"varlen": varlen, "flex": attend_flex, "sdpa": attend_segments}


def row_of(tokens, seed=0, longest_prompt=2000, longest_completion=1000):
    """Random pairs that fill a row of exactly so many tokens, the last of them a filler."""
    draw = np.random.default_rng(seed)
    segments, start = [], 0
    while start < tokens:
        rest = tokens - start
        prefix = int(draw.integers(1, min(longest_prompt, rest) + 1))
        first = int(draw.integers(0, min(longest_completion, rest - prefix) + 1))
        second = int(draw.integers(0, min(longest_completion, rest - prefix - first) + 1))
        segments.append(Segment(start, prefix, (first, second)))
        start += segments[-1].tokens
    return tuple(segments)


def dense(query, key, value, segments, terms):
    """All scores under one mask, in float32."""
    duplicates = query.shape[1] // key.shape[1]
    query, key, value = (x.float() for x in (query, key, value))
    key, value = (x.repeat_interleave(duplicates, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if terms.softcap is not None:
        scores = terms.softcap * torch.tanh(scores / terms.softcap)
    every = torch.arange(query.shape[2], device=query.device)
    allowed = allowed_by(segments, terms.window, query.device)
    scores = scores.masked_fill(~allowed(0, 0, every[:, None], every[None]), -torch.inf)
    if terms.sinks is not None:
        sinks = terms.sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    return scores.softmax(dim=-1)[..., : key.shape[2]] @ value


def inputs_of(segments, heads, kv_heads, size, dtype, seed=1):
    draw = torch.Generator(device="cuda").manual_seed(seed)
    tokens = sum(segment.tokens for segment in segments)
    # As models hand them over: (1, T, H, D) seen as (1, H, T, D).
    shapes = [(1, tokens, h, size) for h in (heads, kv_heads, kv_heads)]
    made = [torch.randn(s, generator=draw, device="cuda").to(dtype).transpose(1, 2) for s in shapes]
    return [x.requires_grad_() for x in made]


def relative(found, truth):
    return ((found.float() - truth).norm() / truth.norm().clamp_min(1e-6)).item()


def compare(backend, segments, *, heads=4, kv_heads=2, size=64, dtype=torch.bfloat16, name="plain"):
    leaves = inputs_of(segments, heads, kv_heads, size, dtype)
    options, more = dict(TERMS[name]), []
    if options.pop("sinks", None):
        more = [torch.linspace(-1, 2, heads, device="cuda").requires_grad_()]
        options["sinks"] = more[0]
    terms = AttentionParams(**options)
    upstream = torch.randn_like(leaves[0])
    out = BACKENDS[backend](*leaves, PackedSegments(segments), terms)
    gradients = torch.autograd.grad((out * upstream).sum(), leaves + more)
    truth = dense(*leaves, segments, terms)
    wanted = torch.autograd.grad((truth * upstream.float()).sum(), leaves + more)
    value_bound, gradient_bound = BOUNDS[dtype]
    errors = [relative(out, truth), *map(relative, gradients, (w.float() for w in wanted))]
    print(backend, name, dtype, size, heads, kv_heads, [f"{e:.1e}" for e in errors])
    assert errors[0] <= value_bound
    assert max(errors[1:]) <= gradient_bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [31, 32, 33, 64, 65, 257, 4096])
def test_row_lengths(backend, tokens):
    for seed in range(3):
        compare(backend, row_of(tokens, seed))


@pytest.mark.parametrize("prompt", [1, 2, 127, 128, 129, 2000])
@pytest.mark.parametrize("backend", ["varlen", "sdpa"])
def test_prompts_and_completions(backend, prompt):
    sizes = ((1, 1), (1, 1000), (1000, 1), (63, 64), (0, 65))
    segments, start = [], 0
    for first, second in sizes:
        segments.append(Segment(start, prompt, (first, second)))
        start += segments[-1].tokens
    compare(backend, tuple(segments), heads=2, kv_heads=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (4, 1)])
def test_head_sizes_and_groups_varlen(size, heads, dtype):
    compare("varlen", row_of(300), heads=heads[0], kv_heads=heads[1], size=size, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", TERMS)
def test_terms_segment_by_segment(name, dtype):
    for size in (64, 128, 256):
        compare("sdpa", row_of(257), size=size, dtype=dtype, name=name)


@pytest.mark.parametrize("name", TERMS)
def test_terms_flex(name):
    compare("flex", row_of(640, longest_prompt=200, longest_completion=90), size=64, name=name)


@pytest.mark.parametrize("size", [128, 256])
def test_head_sizes_flex(size):
    compare("flex", row_of(640), heads=8, kv_heads=2, size=size, name="capped window")


@pytest.mark.parametrize("where", ["no_grad", "checkpoint"])
def test_the_first_call_may_come_from_anywhere(where):
    """Up to torch 2.11 it tries grouped heads, in a reference pass or inside a recomputed layer."""
    segments, terms = row_of(300), AttentionParams()
    leaves = inputs_of(segments, 4, 2, 64, torch.bfloat16)

    def attend(*tensors):
        return varlen(*tensors, PackedSegments(segments), terms)

    torch_kernel.cache_clear()
    if where == "no_grad":
        with torch.no_grad():
            out = attend(*leaves)
    else:
        out = checkpoint(attend, *leaves, use_reentrant=False)
        torch.autograd.grad(out.float().sum(), leaves)
    assert relative(out, dense(*leaves, segments, terms)) <= 1e-2


def test_windows_varlen():
    for window in (1, 2, 64, 1000):
        segments = row_of(2000, seed=window)
        leaves = inputs_of(segments, 4, 2, 64, torch.bfloat16)
        terms = AttentionParams(window=window)
        out = varlen(*leaves, PackedSegments(segments), terms)
        assert relative(out, dense(*leaves, segments, terms)) <= 1e-2


def test_a_branch_never_writes_all_scores():
    """With a mask and grouped heads, SDPA would fall to its math kernel, which does."""
    segments = (Segment(0, 2000, (900, 800)),)
    leaves = inputs_of(segments, 8, 2, 128, torch.bfloat16)
    for terms in (AttentionParams(), AttentionParams(window=300)):
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            attend_segments(*leaves, PackedSegments(segments), terms).sum().backward()


def test_auto_takes_varlen_here_and_flex_for_caps():
    segments = PackedSegments(row_of(64))
    leaves = inputs_of(segments.segments, 4, 2, 64, torch.bfloat16)
    query, _, value = leaves
    for params, wanted in ((AttentionParams(), "varlen"), (AttentionParams(softcap=1.0), "flex")):
        needs = _needs_of(query, value, segments, params)
        assert select_backend(needs, query.dtype, _capability(query)).backend == wanted


@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_reruns_and_places_are_bitwise(backend):
    """With deterministic algorithms, gradients too; a group's output has one value anywhere."""
    segments = row_of(1000, longest_prompt=200, longest_completion=90)
    leaves = inputs_of(segments, 4, 2, 64, torch.bfloat16)

    def run():
        out = BACKENDS[backend](*leaves, PackedSegments(segments), AttentionParams())
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first = run()
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    if backend == "varlen":
        last = segments[-1]
        own = slice(last.start, last.start + last.tokens)
        alone = PackedSegments((Segment(0, last.prefix_tokens, last.suffix_tokens),))
        out = varlen(*(x[:, :, own] for x in leaves), alone, AttentionParams())
        assert torch.equal(out, first[0][:, :, own])


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen3-moe", "gemma2", "gpt-oss"])
def test_whole_models_agree_between_kernels(family):
    """In float32 segment by segment and by FlexAttention; in bfloat16 whatever auto takes."""
    model, groups = model_of(family), random_groups()
    truth, _ = packed(model, groups)
    truth = np.array(truth)
    model = model.cuda()
    for attention, dtype, bound in (
        ("sdpa", torch.float32, 2e-3), ("flex", torch.float32, 2e-3), ("auto", torch.bfloat16, 2.0),
    ):  # fmt: skip
        if attention == "flex" and family == "llama":  # heads of 8, and its kernel takes 16 or more
            continue
        model = model.to(dtype)
        (micro_batch,) = pack_update(groups, 4096)
        with packed_attention(model.config, attention):
            found = packed_logprobs(model, micro_batch.to("cuda")).logps
            found.sum().backward()
        errors = found.detach().view(-1, 2).cpu().numpy() - truth[list(micro_batch.group_indices)]
        print(family, attention, dtype, f"{np.abs(errors).max():.2e}")
        assert np.abs(errors).max() <= bound
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        model.zero_grad()
