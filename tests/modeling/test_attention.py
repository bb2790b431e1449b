"""The kernels behind packed attention: each against a dense mask, as far as a CPU can run them."""

import inspect
import itertools
import logging
import sys
import types
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen as torch_varlen
from torch.utils.checkpoint import checkpoint

from fastdpo.batching import Segment, pack_update
from fastdpo.modeling import attention_backends
from fastdpo.modeling.attention import (
    ATTENTIONS,
    CPU_ATTENTION_KEY,
    MODEL_ATTENTION,
    PackedSegments,
    attention_kind,
    dispatch,
    flex,
    packed_attention,
    sdpa,
    varlen,
)
from fastdpo.modeling.attention.kept import keep_attention
from fastdpo.modeling.attention.sdpa import attend_segments
from fastdpo.modeling.attention.segments import AttentionParams
from fastdpo.modeling.attention_backends import AttentionNeeds, select_backend, why_not_kept
from fastdpo.options.passes import ATTENTION_BACKENDS
from tests.modeling.test_packed_pairs import FAMILIES, model_of, packed, random_groups


def row_of(*groups, filler=0):
    """Segments one after another, each (prefix, suffixes...), and a filler."""
    segments, start = [], 0
    for prefix, *suffixes in (*groups, *([(filler,)] if filler else [])):
        segments.append(Segment(start, prefix, tuple(suffixes)))
        start += segments[-1].tokens
    return tuple(segments)


ROWS = {
    "pairs": row_of((5, 3, 4), (1, 1, 2), (20, 7, 9), filler=12),
    "empty suffixes": row_of((6, 0, 4), (4, 3, 0), (9, 0, 0), (2, 1, 1)),
    "many suffixes": row_of((7, 3, 0, 5, 2), (3, 1), (4, 2, 2, 2, 2, 2), filler=1),
    "nothing shared": row_of((5, 3), (9, 2), (1, 0), filler=30),
    "blocks": row_of((130, 3, 129), (126, 2, 10), filler=30),
}
TERMS = {
    "plain": {},
    "scaled": {"scaling": 0.3},
    "window": {"window": 6},
    "capped": {"softcap": 1.5},
    "capped window": {"softcap": 1.5, "window": 6},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "sinks window": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]), "window": 6},
}


@cache
def dense_mask(segments, window):
    """(T, T) bool, token by token from what the segments mean."""
    owner, suffix, position = [], [], []
    for number, segment in enumerate(segments):
        for part, tokens in enumerate((segment.prefix_tokens, *segment.suffix_tokens)):
            first = segment.prefix_tokens if part else 0
            owner += [number] * tokens
            suffix += [part] * tokens
            position += range(first, first + tokens)
    size = len(owner)
    mask = torch.zeros(size, size, dtype=torch.bool)
    for q in range(size):
        for k in range(q + 1):
            near = window is None or position[q] - position[k] < window
            mask[q, k] = owner[q] == owner[k] and suffix[k] in (0, suffix[q]) and near
    return mask


def dense_attention(query, key, value, segments, terms):
    """The definition: all scores, one mask, one softmax, in the dtype of the inputs."""
    duplicates = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(duplicates, 1), value.repeat_interleave(duplicates, 1)
    scale = query.shape[-1] ** -0.5 if terms.scaling is None else terms.scaling
    scores = query @ key.transpose(2, 3) * scale
    if terms.softcap is not None:
        scores = terms.softcap * torch.tanh(scores / terms.softcap)
    mask = dense_mask(segments, terms.window).to(query.device)
    scores = scores.masked_fill(~mask, -torch.inf)
    if terms.sinks is not None:
        sinks = terms.sinks.to(scores)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    return scores.softmax(dim=-1)[..., : key.shape[2]] @ value


def inputs_of(segments, heads=4, kv_heads=2, size=16, dtype=torch.float64):
    draw = torch.Generator().manual_seed(1)
    tokens = sum(segment.tokens for segment in segments)
    shapes = [(1, h, tokens, size) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=draw, dtype=dtype).requires_grad_() for s in shapes]


def terms_of(name):
    terms = AttentionParams(**TERMS[name])
    if terms.sinks is None:
        return terms, []
    sinks = terms.sinks.double().clone().requires_grad_()
    return AttentionParams(**TERMS[name] | {"sinks": sinks}), [sinks]


def assert_equal_with_gradients(attend, segments, name, bound=1e-6):
    terms, more = terms_of(name)
    leaves = inputs_of(segments)
    upstream = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(2)).double()
    found = []
    for function in (attend, dense_attention):
        out = function(*leaves, segments, terms)
        gradients = torch.autograd.grad((out * upstream).sum(), leaves + more)
        found.append((out, *gradients))
    for ours, truth in zip(*found, strict=True):
        assert torch.allclose(ours, truth, atol=bound, rtol=bound)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", TERMS)
def test_segment_by_segment(row, name):
    def attend(query, key, value, segments, terms):
        return attend_segments(query, key, value, PackedSegments(segments), terms)

    assert_equal_with_gradients(attend, ROWS[row], name)


def test_padded_rows_attend_to_their_own_past():
    query, key, value = (x.detach() for x in inputs_of(ROWS["pairs"]))
    rows = [torch.cat([x, x.flip(2)]) for x in (query, key, value)]
    for name in TERMS:
        terms, _ = terms_of(name)
        whole = (Segment(0, query.shape[2], ()),)
        out = attend_segments(*rows, PackedSegments(()), terms)
        for at, row in enumerate((query, query.flip(2))):
            k, v = (x.flip(2) if at else x for x in (key, value))
            truth = dense_attention(row, k, v, whole, terms)
            assert torch.allclose(out[at : at + 1], truth, atol=1e-6)


# Variable length: what is handed to the kernel, with a stand-in that does what flash kernels do


def stand_in(q, k, v, query_ends, key_ends, max_seqlen_q, most_keys, scale, window_size, **options):
    """Causal attention of every sequence, ends aligned at the bottom right."""
    assert options.get("enable_gqa", True) or q.shape[1] == k.shape[1]
    assert query_ends.dtype == key_ends.dtype == torch.int32
    left, right = window_size
    assert right == 0
    outs = []
    for q0, q1, k0, k1 in zip(
        query_ends[:-1], query_ends[1:], key_ends[:-1], key_ends[1:], strict=True
    ):
        requested, keys = int(q1 - q0), int(k1 - k0)
        assert 0 < requested <= max_seqlen_q
        assert requested <= keys <= most_keys
        distance = torch.arange(keys - requested, keys)[:, None] - torch.arange(keys)
        mask = (distance >= 0) & ((distance <= left) if left >= 0 else True)
        sides = (x.transpose(0, 1) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        out = F.scaled_dot_product_attention(*sides, mask, scale=scale, enable_gqa=True)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


def varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None,
                scale=None, window_size=(-1, -1)):  # fmt: skip
    return stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def varlen_2_11_without_groups(query, key, value, *ends, scale=None, window_size=(-1, -1)):
    if query.shape[1] != key.shape[1]:
        raise RuntimeError("number of heads differ")
    return stand_in(query, key, value, *ends, scale, window_size)


def varlen_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None,
                scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None,
                block_table=None, num_splits=None):  # fmt: skip
    ends = (cu_seq_q, cu_seq_k, max_q, max_k)
    return stand_in(query, key, value, *ends, scale, window_size, enable_gqa=enable_gqa)


def flash_package(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                  softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                  deterministic=False):  # fmt: skip
    assert causal
    assert not softcap
    ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return stand_in(q, k, v, *ends, softmax_scale, window_size)


@pytest.fixture(params=[varlen_2_11, varlen_2_11_without_groups, varlen_2_13, flash_package])
def kernel(request, monkeypatch):
    for made in (varlen.torch_kernel, varlen.package_kernel):
        made.cache_clear()
    if request.param is flash_package:
        module = types.ModuleType("flash_attn")
        module.flash_attn_varlen_func = flash_package
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        yield varlen.package_kernel("flash_attention_2")
    else:
        monkeypatch.setattr(torch_varlen, "varlen_attn", request.param)
        yield varlen.torch_kernel(torch.device("cpu"))
    for made in (varlen.torch_kernel, varlen.package_kernel):
        made.cache_clear()


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", ["plain", "scaled", "window"])
def test_variable_length_sequences(row, name, kernel):
    def attend(query, key, value, segments, terms):
        packed_row = PackedSegments(segments)
        return varlen.attend_varlen(query, key, value, packed_row, terms, kernel)

    assert_equal_with_gradients(attend, ROWS[row], name)


@pytest.mark.parametrize("where", ["no_grad", "checkpoint"])
def test_grouped_heads_are_tried_wherever_the_first_call_comes_from(where, monkeypatch):
    """Up to torch 2.11; the first call is in a reference pass or inside a recomputed layer."""
    heads_seen = []

    def watched(query, key, *others, **options):
        heads_seen.append((query.shape[1], key.shape[1]))
        return varlen_2_11(query, key, *others, **options)

    def attend(*tensors):
        terms, kernel = AttentionParams(), varlen.torch_kernel(torch.device("cpu"))
        return varlen.attend_varlen(*tensors, PackedSegments(ROWS["pairs"]), terms, kernel)

    leaves = inputs_of(ROWS["pairs"])
    monkeypatch.setattr(torch_varlen, "varlen_attn", watched)
    varlen.torch_kernel.cache_clear()
    try:
        if where == "no_grad":
            with torch.no_grad():
                attend(*leaves)
        else:
            checkpoint(attend, *leaves, use_reentrant=False).sum().backward()
    finally:
        varlen.torch_kernel.cache_clear()
    heads = leaves[0].shape[1], leaves[1].shape[1]
    assert heads[0] > heads[1], "grouped"
    assert heads_seen[-1] == heads, "keys are handed over as they are, not repeated"


RUNS = []


@torch.library.custom_op("fastdpo_tests::varlen_attn", mutates_args=())
def varlen_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_ends: list[int], key_ends: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """An operator of the kind of torch's: the output (Tq, H, D) and the log-sum-exp (H, Tq)."""
    RUNS.append(q.shape[0])
    found = [
        (scores.softmax(-1) @ v, scores.logsumexp(-1))
        for q, k, v in sequences_of(q, k, v, query_ends, key_ends)
        for scores in [scores_of(q, k)]
    ]
    outs, sums = zip(*found, strict=True)
    return torch.cat(outs, dim=1).transpose(0, 1), torch.cat(sums, dim=1)


def sequences_of(q, k, v, query_ends, key_ends):
    queries, keys = (torch.tensor(ends).diff().tolist() for ends in (query_ends, key_ends))
    cut = zip((q, k, v), (queries, keys, keys), strict=True)
    return zip(*(x.transpose(0, 1).split(sizes, dim=1) for x, sizes in cut), strict=True)


def scores_of(q, k):
    queries, keys = q.shape[1], k.shape[1]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)


def save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.ends = inputs[3:]


def varlen_backward(ctx, gradient, _):
    """As flash attention: the weights are those of the kept sums, the output gives their mean."""
    *inputs, out, sums = ctx.saved_tensors
    queries = ctx.ends[0]
    found = []
    for (q, k, v), (mean, slope, lse) in zip(
        sequences_of(*inputs, *ctx.ends),
        sequences_of(out, gradient, sums.mT[..., None], queries, queries),
        strict=True,
    ):
        weights = (scores_of(q, k) - lse).exp()
        slopes = weights * (slope @ v.mT - (slope * mean).sum(-1, keepdim=True))
        slopes = slopes * q.shape[-1] ** -0.5
        found.append((slopes @ k, slopes.mT @ q, weights.mT @ slope))
    return *(torch.cat(x, dim=1).transpose(0, 1) for x in zip(*found, strict=True)), None, None


varlen_op.register_autograd(varlen_backward, setup_context=save_for_backward)


def varlen_2_11_as_operator(q, k, v, query_ends, key_ends, *_, scale=None, window_size=(-1, -1)):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return varlen_op(q, k, v, query_ends.tolist(), key_ends.tolist())[0]


@pytest.mark.parametrize("tried_before", [False, True])
def test_kept_results_of_the_kernel_are_those_of_the_layer(monkeypatch, tried_before):
    """Up to torch 2.11 the first call tries grouped heads, which is no part of any layer."""
    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_2_11_as_operator)
    varlen.torch_kernel.cache_clear()

    def gradients(segments=ROWS["pairs"], **options):
        leaves, layer = inputs_of(segments), PackedSegments(segments)

        def attend(*tensors):
            out = varlen.attend_torch(*tensors, layer, AttentionParams())
            return out.square()

        if not options:
            out = attend(*leaves)
        else:
            out = checkpoint(attend, *leaves, use_reentrant=False, **options)
        return torch.autograd.grad(out.sum(), leaves)

    try:
        if tried_before:
            gradients()
        RUNS.clear()
        kept = gradients(context_fn=keep_attention)
        tokens = sum(segment.tokens for segment in ROWS["pairs"])
        assert RUNS.count(tokens) == 1
        for found, wanted in zip(kept, gradients(), strict=True):
            assert torch.equal(found, wanted)
    finally:
        varlen.torch_kernel.cache_clear()


def test_the_installed_varlen_takes_what_it_is_given():
    names = inspect.signature(torch_varlen.varlen_attn).parameters
    assert {"scale", "window_size"} <= set(names)
    assert list(names)[3:7] == ["cu_seq_q", "cu_seq_k", "max_q", "max_k"]


def test_only_trunks_are_gathered_and_their_gradient_has_one_order():
    layout = varlen.layout_of(ROWS["many suffixes"], torch.device("cpu"))
    tokens = sum(segment.tokens for segment in ROWS["many suffixes"])
    further = 7 * 2 + 0 + 4 * 4  # prefixes of all suffixes but the first and the empty ones
    assert len(layout.gathered) == tokens + further
    assert varlen.layout_of(ROWS["nothing shared"], torch.device("cpu")).gathered is None
    rows = torch.randn(tokens, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: varlen.GatherKeys.apply(x, layout), rows)
    for places, _ in layout.duplicates:
        assert len(places.unique()) == len(places), "a token twice: the order would be undefined"


def test_a_missing_package_is_named():
    with pytest.raises(ValueError, match="--attention flash_attention_3 needs the package"):
        varlen.package_kernel("flash_attention_3")


# FlexAttention


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("window", [None, 6, 100])
def test_flex_mask_is_the_dense_mask(row, window):
    segments = ROWS[row]
    truth = dense_mask(segments, window)
    tokens = len(truth)
    every = torch.arange(tokens)
    allowed = flex.allowed_by(segments, window, torch.device("cpu"))
    assert torch.equal(allowed(0, 0, every[:, None], every[None]), truth)
    blocks = flex.block_mask_of(segments, window, torch.device("cpu"))
    padded = torch.zeros(blocks.kv_num_blocks.shape[-1] * 128, blocks.kv_indices.shape[-1] * 128)
    padded[:tokens, :tokens] = truth
    tiles = padded.bool().unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).transpose(1, 2)
    some, all_of = tiles.flatten(2).any(2), tiles.flatten(2).all(2)
    for at in range(len(tiles)):
        count, full = int(blocks.kv_num_blocks[0, 0, at]), int(blocks.full_kv_num_blocks[0, 0, at])
        partial = set(blocks.kv_indices[0, 0, at, :count].tolist())
        whole = set(blocks.full_kv_indices[0, 0, at, :full].tolist())
        assert partial == set(torch.nonzero(some[at] & ~all_of[at]).flatten().tolist())
        assert whole == set(torch.nonzero(all_of[at]).flatten().tolist())


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", TERMS)
def test_flex_forward(row, name):
    query, key, value = (x.detach().float() for x in inputs_of(ROWS[row]))
    terms = AttentionParams(**TERMS[name])
    out = flex.attend_flex(query, key, value, PackedSegments(ROWS[row]), terms)
    truth = dense_attention(query, key, value, ROWS[row], terms)
    assert torch.allclose(out, truth, atol=2e-6)


def test_flex_compiles_more_kernels_than_torch_would(monkeypatch):
    """Heads, windows, caps and lengths each take one; at torch's limit of 8 it would raise."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    compiled = flex._kernel.__wrapped__(True)
    monkeypatch.setattr(flex, "_kernel", lambda _: compiled)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    names = ("plain", "window", "capped", "capped window", "sinks")
    for size, name, tokens in itertools.product((8, 16), names, (40, 50)):
        query, key = torch.zeros(1, 4, tokens, size), torch.zeros(1, 2, tokens, size)
        row = PackedSegments((Segment(0, tokens - 20, (10, 10)),))
        flex.attend_flex(query, key, key, row, AttentionParams(**TERMS[name]))
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    assert made > torch._dynamo.config.recompile_limit


def test_masks_and_layouts_are_made_once_a_micro_batch():
    segments = PackedSegments(ROWS["pairs"])
    query, key, value = (x.detach().float() for x in inputs_of(ROWS["pairs"]))
    for _ in range(3):
        flex.attend_flex(query, key, value, segments, AttentionParams())
        flex.attend_flex(query, key, value, segments, AttentionParams(window=6))
        varlen.attend_varlen(query, key, value, segments, AttentionParams(), lambda q, *_: q)
    assert sorted(map(str, segments._cache)) == ["('flex', 6)", "('flex', None)", "varlen"]


# Choice


NEEDS, HALF = AttentionNeeds(128, 128), torch.bfloat16


@pytest.mark.parametrize(
    ("needs", "backend", "reason"),
    [
        ({}, "varlen", ""),
        ({}, "sdpa", ""),
        ({"softcap": True}, "flash_attention_2", ""),
        ({"softcap": True}, "sdpa", "scores are capped"),
        ({"sinks": True}, "sdpa", "attention has sinks"),
        ({"dropout": True}, "sdpa", "attention dropout is on"),
        ({"softcap": True}, "flex", "flex does not hand out"),
    ],
)
def test_attention_that_no_layer_can_keep_is_known(needs, backend, reason):
    found = why_not_kept(replace(NEEDS, **needs), backend)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


@pytest.mark.parametrize(
    ("needs", "dtype", "wanted", "because"),
    [
        ({}, HALF, "varlen", ""),
        ({"head_dim": 256, "value_dim": 256}, torch.float16, "varlen", ""),
        ({"softcap": True}, HALF, "flex", "capped"),
        ({"sinks": True}, HALF, "flex", "sinks"),
        ({}, torch.float32, "flex", "float32"),
        ({"head_dim": 264, "value_dim": 264}, HALF, "flex", "264"),
        ({"value_dim": 64}, HALF, "sdpa", "different sizes"),
        ({"dropout": True}, HALF, "sdpa", "dropout"),
    ],
)
def test_auto_takes_the_first_that_can(needs, dtype, wanted, because):
    found = select_backend(replace(NEEDS, **needs), dtype, (8, 0))
    assert found.backend == wanted
    assert because in found.reason


def test_old_cards_and_padded_rows():
    assert select_backend(NEEDS, HALF, (7, 5)).backend == "flex"
    with pytest.raises(ValueError, match=r"--attention varlen cannot be used here.*8\.0"):
        select_backend(NEEDS, HALF, (7, 5), "varlen")
    assert select_backend(replace(NEEDS, packed=False), HALF, (8, 0), "varlen").backend == "sdpa"
    assert select_backend(NEEDS, HALF, (8, 0), "flash_attention_2").backend == "flash_attention_2"


def test_what_is_not_installed_counts_for_this_machine_only(monkeypatch):
    monkeypatch.setattr(attention_backends, "find_spec", lambda _: None)
    select_backend.cache_clear()
    assert select_backend(NEEDS, HALF, (8, 0)).reason == (
        "varlen: torch.nn.attention.varlen is not installed; flex: triton is not installed"
    )
    assert select_backend(NEEDS, HALF, (8, 0), assume_installed=True).backend == "varlen"
    select_backend.cache_clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_tells_what_its_layers_need(family, monkeypatch):
    """The planner chooses by the config, the passes by the inputs of each layer: the same."""
    seen = set()
    real = dispatch._needs_of
    monkeypatch.setattr(dispatch, "_needs_of", lambda *a: seen.add(real(*a)) or real(*a))
    model = model_of(family)
    packed(model, random_groups(1))
    assert seen == {attention_backends.attention_needs(model.config.get_text_config())}


def test_every_backend_has_its_kernel():
    assert all(callable(dispatch._kernel(name)) for name in attention_backends.BACKENDS)
    assert tuple(ATTENTIONS) == ATTENTION_BACKENDS


def test_on_the_cpu_it_is_segment_by_segment_and_says_so(caplog):
    dispatch._log_choice.cache_clear()
    caplog.set_level(logging.INFO, "fastdpo")
    packed(model_of("llama"), random_groups(1))
    (line,) = [r.message for r in caplog.records if "Attention over packed pairs" in r.message]
    assert line == (
        "Attention over packed pairs: sdpa (varlen: not on a CUDA device; flex: not on a CUDA "
        "device)"
    )
    with (
        packed_attention((model := model_of("llama")).config, "flex"),
        pytest.raises(ValueError, match="--attention flex cannot be used here: not on a CUDA"),
    ):
        model(torch.ones(1, 3, dtype=torch.long), packed=PackedSegments(row_of((3,))))


def test_kinds_for_the_store():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    config = FAMILIES["llama"]
    assert attention_kind(config, cpu) == attention_kind(config, cpu, "sdpa") == CPU_ATTENTION_KEY
    kinds = [
        attention_kind(config, cuda, requested) for requested in (*ATTENTIONS, MODEL_ATTENTION)
    ]
    assert len({CPU_ATTENTION_KEY, *kinds}) == 1 + len(kinds)


def test_what_it_does_not_know_is_refused():
    model = model_of("llama")
    (micro_batch,) = pack_update(random_groups(1), 512)
    options = {
        "input_ids": micro_batch.input_ids,
        "position_ids": micro_batch.position_ids,
        "packed": PackedSegments(micro_batch.segments),
    }
    with packed_attention(model.config):
        model.model(**options)
        with pytest.raises(ValueError, match=r"position_bias.*--packing off"):
            model.model(**options, position_bias=torch.zeros(1))
        model.model.layers[1].self_attn.is_causal = False
        with pytest.raises(ValueError, match="both directions"):
            model.model(**options)


def test_autocast_reaches_every_kernel(monkeypatch):
    """Norms on queries and keys give float32 back where values are bfloat16."""
    model = model_of("qwen3")
    seen = []

    def spy(query, key, value, packed, params):
        seen.append({query.dtype, key.dtype, value.dtype})
        return attend_segments(query, key, value, packed, params)

    monkeypatch.setattr(sdpa, "attend_segments", spy)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        (micro_batch,) = pack_update(random_groups(1), 512)
        with packed_attention(model.config):
            model.model(
                micro_batch.input_ids,
                position_ids=micro_batch.position_ids,
                packed=PackedSegments(micro_batch.segments),
            )
    assert seen == [{torch.bfloat16}] * 2
