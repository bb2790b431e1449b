"""What a store says of itself: hit, partial or miss and why; spot checks; versions; no tokens."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
import transformers

from fastdpo.batching import PairGroups, group_tokens
from fastdpo.data import Pair, PairDataset
from fastdpo.modeling import loading, weight_hash
from fastdpo.modeling.layout import ExecutionLayout
from fastdpo.modeling.reference_model import reference_from_base
from fastdpo.ref_cache import (
    HASH_CACHE_FILE,
    ReferenceStore,
    RefLogpsProvider,
    StoreOptions,
    compute,
    hash_cache,
    reference_identity,
    reference_logps,
)
from fastdpo.ref_cache import shards as shards_module
from fastdpo.ref_cache.run_notes import load_requests
from fastdpo.ref_cache.spot_check import spot_check
from fastdpo.ref_cache.store import group_keys
from fastdpo.ref_cache.store import keys_of as row_keys
from fastdpo.system.versions import difference, numeric_versions
from tests.ref_cache.test_compute import GROUPS as ALL_GROUPS
from tests.ref_cache.test_compute import IDENTITY, adapted, base, model_state, shards
from tests.ref_cache.test_store import keys_of, some_rows

GROUPS = ALL_GROUPS[:9]
NOW = {"torch": "2.13.0", "device": "cpu"}
STRICT = StoreOptions(strict_versions=True)
THEN = {"torch": "2.11.0", "device": "NVIDIA L4"}
ASKED = {"data": "pairs.jsonl", "max_length": 1024, "truncation_mode": "keep_completion"}


@pytest.fixture(scope="module")
def policy():
    return adapted()


@pytest.fixture
def said(caplog):
    """The lines since it was last asked."""
    caplog.set_level(logging.INFO, logger="fastdpo")

    def lines():
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    return lines


def fill(model, groups, root, *, identity=IDENTITY, versions=NOW, strict=False, check=0, **options):
    store_options = StoreOptions(strict_versions=strict, spot_check_pairs=check)
    store = ReferenceStore(root, identity, versions=versions, options=store_options)
    return reference_logps(
        reference_from_base(model), groups, store, layout=ExecutionLayout(128), **options
    )


def test_hit_partial_and_miss_are_said_with_the_reason(policy, tmp_path, said):
    fill(policy, GROUPS[:4], tmp_path, requested=ASKED)
    line, rate = (line for line in said() if "eference" in line)  # what attends is said once
    assert line.startswith("Reference log-probs of train: all 4 pairs missing in")
    assert "(nothing was stored before); computing them" in line
    assert "4 distinct pairs in " in rate
    assert rate.endswith("tokens/s")
    fill(policy, GROUPS[:4], tmp_path, requested=ASKED)
    (line,) = said()
    assert "all 4 pairs found in" in line
    fill(policy, GROUPS, tmp_path, requested=ASKED | {"max_length": 2048})
    assert "5 of 9 pairs missing" in (line := said()[0])
    assert "(max_length 1024 -> 2048)" in line
    fill(policy, GROUPS, tmp_path, identity={"model": "tiny", "dtype": "bf16"}, requested=ASKED)
    assert "(a new reference: dtype none -> bf16)" in said()[0]
    four_bit = IDENTITY | {"weights": "ab" * 32, "config": {"quant": {"method": 4, "double": True}}}
    fill(policy, GROUPS, tmp_path, identity=four_bit | {"config": {}}, requested=ASKED)
    assert "weights none -> abababababab" in said()[0]
    fill(policy, GROUPS, tmp_path, identity=four_bit, requested=ASKED)
    assert "(a new reference: config.quant none -> set)" in said()[0]
    for path in shards(tmp_path):
        path.unlink()
    fill(policy, GROUPS, tmp_path, requested=ASKED)
    assert "asked for the same and kept nothing" in said()[0]
    path = sorted(shards(tmp_path))[0]
    path.write_bytes(path.read_bytes()[:-1])
    fill(policy, GROUPS, tmp_path, requested=ASKED)
    assert any("(1 damaged shards were set aside)" in line for line in said())


def test_an_interrupted_pass_and_other_data_are_reasons_too(policy, tmp_path, said):
    fill(policy, GROUPS[:4], tmp_path, requested=ASKED)
    said()
    fill(policy, GROUPS[:6], tmp_path, requested=ASKED)
    assert "did not finish, or the rows themselves changed" in said()[0]
    fill(
        policy,
        GROUPS,
        tmp_path,
        requested=ASKED | {"data": "more.jsonl", "chat_template": "x" * 64},
    )
    reason = "data pairs.jsonl -> more.jsonl, chat_template none -> ..." + "x" * 24
    assert reason in said()[0]
    fill(policy, ALL_GROUPS[9:], tmp_path, requested=ASKED, name="eval")
    assert "(no earlier run asked for eval data)" in said()[0]
    folder = ReferenceStore(tmp_path, IDENTITY).folder
    for at, text in enumerate(("[]", "{", "[" * 100_000, '{"at": "x", "asked": {}}')):
        (folder / f"asked-{at}.json").write_text(text)
    assert len(load_requests(folder)) == 3


def test_notes_are_no_part_of_the_key(policy, tmp_path):
    first = fill(policy, GROUPS, tmp_path, requested=ASKED)
    count = len(shards(tmp_path))
    for path in tmp_path.glob("*/asked-*"):
        path.unlink()
    assert np.array_equal(fill(policy, GROUPS, tmp_path, requested={"other": 1}), first)
    assert len(shards(tmp_path)) == count
    assert len(list(tmp_path.glob("*/manifest.json"))) == 1


# Spot checks


def checking(store, pairs):
    """The store as a run with another number of spot checks opens it."""
    options = dataclasses.replace(store.options, spot_check_pairs=pairs)
    return ReferenceStore(store.root, store.identity, versions=store.versions, options=options)


def check(model, store, count, dtype=torch.float32):
    keys, store = row_keys(GROUPS), checking(store, count)
    options = {"compute_dtype": dtype, "layout": ExecutionLayout(128)}
    known = np.arange(len(GROUPS))
    return spot_check(reference_from_base(model), GROUPS, keys, known, store, **options)


def test_a_spot_check_finds_zero_where_nothing_changed_and_writes_nothing(policy, tmp_path, said):
    fill(policy, GROUPS, tmp_path)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("shard-*")}
    state, random_state = model_state(policy), torch.get_rng_state()
    store = ReferenceStore(tmp_path, IDENTITY, versions=NOW)
    for count in (1, 3, 100):
        found = check(policy, store, count)
        assert found.pairs == min(count, len(GROUPS))
        assert found.largest_rms == 0.0
        assert found.stored == found.scored
    assert check(policy, store, 0) is None
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("shard-*")} == before
    assert model_state(policy) == state
    assert torch.equal(torch.get_rng_state(), random_state)
    said()
    fill(policy, GROUPS, tmp_path, check=4)
    assert "Spot check: 4 pairs scored again, at most 0 nats a token" in said()[-1]


@pytest.mark.parametrize("kept", [True, False])
def test_a_spot_check_refuses_another_models_log_probs(policy, tmp_path, kept):
    store = ReferenceStore(tmp_path, IDENTITY, options=StoreOptions(keep_token_logps=kept))
    reference_logps(reference_from_base(policy), GROUPS, store, layout=ExecutionLayout(128))
    other = base()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match=r"not those of this model.* nats there and .* now"):
        check(other, store, 2)
    with pytest.raises(ValueError, match=r"at most 1e-05 in torch\.float32"):
        reference_logps(
            reference_from_base(other), GROUPS, checking(store, 2), layout=ExecutionLayout(128)
        )
    with torch.no_grad():  # rounding: too much for fp32, allowed in bf16
        other.model.layers[0].mlp.up_proj.weight.div_(1.01).mul_(1.004)
    with pytest.raises(ValueError, match="1e-05"):
        check(other, store, 9)
    assert 1e-5 < check(other, store, 9, torch.bfloat16).largest_rms < 0.03
    reference_logps(
        reference_from_base(other), GROUPS, checking(store, 0), layout=ExecutionLayout(128)
    )


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("change", ["zero", "halved"])
def test_sums_that_are_not_the_tokens_are_never_trained_on(
    policy, tmp_path, monkeypatch, said, kept, change
):
    """A shard with a right checksum: its sums are set aside with tokens, refused without."""
    options = StoreOptions(keep_token_logps=kept, spot_check_pairs=2)
    right = fill(policy, GROUPS, tmp_path / "right")

    def spoiled(rows, *others, **named):
        factor = 0 if change == "zero" else 0.5
        return encode(
            [dataclasses.replace(row, logps=factor * row.logps) for row in rows], *others, **named
        )

    encode = shards_module.encode
    with monkeypatch.context() as patch:
        patch.setattr(shards_module, "encode", spoiled)
        patch.setattr(shards_module, "_sum_fault", lambda tensors: None)
        store = ReferenceStore(tmp_path, IDENTITY, options=options)
        reference_logps(reference_from_base(policy), GROUPS, store, layout=ExecutionLayout(128))
        wrong = ReferenceStore(tmp_path, IDENTITY, options=options)
        assert len(wrong) == 18, "the shard is as good as any other"
        with pytest.raises(ValueError, match=r"not those of this model.* nats there and .* now"):
            check(policy, wrong, 2)
    said()
    store = ReferenceStore(tmp_path, IDENTITY, options=options)
    if not kept:
        with pytest.raises(ValueError, match="not those of this model"):
            reference_logps(reference_from_base(policy), GROUPS, store, layout=ExecutionLayout(128))
        return
    found = reference_logps(reference_from_base(policy), GROUPS, store, layout=ExecutionLayout(128))
    assert np.array_equal(found, right)
    assert any("its tokens add up to" in line for line in said())


def test_the_choice_is_deterministic_and_foreign_rows_come_first(policy, tmp_path, monkeypatch):
    fill(policy, GROUPS[:8], tmp_path)
    fill(policy, GROUPS, tmp_path, versions=THEN)  # the ninth
    from fastdpo.ref_cache import spot_check as module

    chosen, real = [], module.score_groups

    def score_groups(model, groups, **options):
        chosen.append(list(groups))
        return real(model, groups, **options)

    monkeypatch.setattr(module, "score_groups", score_groups)
    for _ in range(2):
        check(policy, ReferenceStore(tmp_path, IDENTITY, versions=NOW), 3)
    assert chosen[0] == chosen[1]
    assert chosen[0][0] is GROUPS[8]


# Versions


def test_other_versions_are_reported_and_strict_computes_again(policy, tmp_path, said, monkeypatch):
    first = fill(policy, GROUPS, tmp_path, versions=THEN)
    said()
    assert np.array_equal(fill(policy, GROUPS, tmp_path), first)
    lines = said()
    (warning,) = [line for line in lines if "other versions" in line]
    assert "18 of 18" in warning
    assert "device NVIDIA L4 -> cpu, torch 2.11.0 -> 2.13.0" in warning
    assert len(shards(tmp_path)) == 1
    fill(policy, GROUPS, tmp_path, strict=True)
    assert "all 9 pairs missing" in said()[0]
    assert len(shards(tmp_path)) == 2
    fill(policy, GROUPS, tmp_path, strict=True)
    fill(policy, GROUPS, tmp_path)
    assert not [line for line in said() if "other versions" in line or "missing" in line]
    fill(policy, GROUPS, tmp_path, versions=THEN)
    assert not [line for line in said() if "other versions" in line], "each has its own"


def test_own_versions_win_whatever_the_shards_are_called(tmp_path):
    (row,) = some_rows(count=1)
    from tests.ref_cache.test_store import ScoredCompletion

    for name, versions, logps in (("a", THEN, -1.0), ("b", NOW, -2.0), ("c", NOW, -3.0)):
        store = ReferenceStore(tmp_path, IDENTITY, versions=versions)
        before = set(shards(tmp_path))
        store.append([ScoredCompletion(row.key, logps, np.float32([logps]))])
        (path,) = set(shards(tmp_path)) - before
        path.rename(path.with_name(f"shard-{name}.safetensors"))
    for versions, wanted in ((NOW, -2.0), (THEN, -1.0), (None, -1.0)):
        store = ReferenceStore(tmp_path, IDENTITY, versions=versions)
        assert store.lookup([row.key]).tolist() == [wanted]
    other = ReferenceStore(tmp_path, IDENTITY, versions={"torch": "3"}, options=STRICT)
    assert np.isnan(other.lookup([row.key])).all()
    assert len(other) == 0


def test_shards_of_the_former_form_are_read(tmp_path):
    rows = some_rows()
    ReferenceStore(tmp_path, IDENTITY).append(rows)  # no versions recorded
    store = ReferenceStore(tmp_path, IDENTITY, versions=NOW)
    assert np.isfinite(store.lookup(keys_of(rows))).all()
    assert store.other_versions(keys_of(rows)) == {"versions not recorded": 3}


def test_versions_name_libraries_and_device():
    found = numeric_versions(torch.device("cpu"))
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] in torch.__version__
    assert found["device"] == "cpu"
    assert set(found) == {"torch", "transformers", "bitsandbytes", "peft", "device"}
    assert difference(found, found) == ""
    assert difference(None, found) == "versions not recorded"


# Sums without tokens


def test_without_token_logps_the_sums_stay_and_whoever_needs_tokens_says_so(policy, tmp_path):
    keys = [key for group in GROUPS for key in group_keys(group)]
    kept = ReferenceStore(tmp_path / "kept", IDENTITY)
    sums = reference_logps(reference_from_base(policy), GROUPS, kept, layout=ExecutionLayout(128))
    tokens = kept.token_logps(keys)
    assert [len(each) for each in tokens] == [len(c) for g in GROUPS for c in g.completions]
    assert [each.astype(float).sum() for each in tokens] == pytest.approx(sums.reshape(-1))
    bare = ReferenceStore(tmp_path / "bare", IDENTITY, options=StoreOptions(keep_token_logps=False))
    found = reference_logps(reference_from_base(policy), GROUPS, bare, layout=ExecutionLayout(128))
    assert np.array_equal(found, sums)
    (small,), (large,) = shards(tmp_path / "bare"), shards(tmp_path / "kept")
    assert large.stat().st_size - small.stat().st_size >= 4 * sum(map(len, tokens))
    with pytest.raises(ValueError, match=r"18 of 18 .*--ref_token_logps off"):
        bare.token_logps(keys)
    with pytest.raises(KeyError, match="1 of 1 keys"):
        bare.token_logps([bytes(32)])


# The memory of weight files


@pytest.fixture
def hashed(monkeypatch):
    """How often all bytes of a model were hashed."""
    calls, real = [], hash_cache.tensors_hash

    def count(tensors):
        calls.append(len(tensors))
        return real(tensors)

    monkeypatch.setattr(hash_cache, "tensors_hash", count)
    return calls


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_unchanged_files_are_not_hashed_again(tmp_path, hashed, load_in_4bit):
    folder, cache = tmp_path / "model", tmp_path / HASH_CACHE_FILE
    base().save_pretrained(folder)
    options = {"dtype": torch.float32, "load_in_4bit": load_in_4bit}

    def identity(change=None, wrap=True, by_hand=False):
        model = loading.load_model(str(folder), **options)
        if by_hand:
            weight_hash._records.pop(model)  # as if it had come as an object
        if change is not None:
            with torch.no_grad():
                change(model)
        return reference_identity(adapted(model) if wrap else model, torch.float32, cache)

    first = identity()
    assert len(hashed) == 1
    assert identity() == identity(wrap=False) == first
    assert len(hashed) == 1, "known files were hashed"
    assert identity(by_hand=True) == first, "a model handed over has another identity"
    assert len(hashed) == 2, "a model handed over was believed"
    touched = identity(change=lambda model: model.model.norm.weight.mul_(2))
    assert touched["weights"] != first["weights"]
    assert len(hashed) == 3
    # .data writes past the counters; the samples see it
    replaced = identity(change=lambda model: model.model.norm.weight.data.mul_(2))
    assert replaced == touched
    assert identity() == first
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # another mtime, the same bytes
    count = len(hashed)
    assert identity() == first
    assert len(hashed) == count + 1


def test_a_damaged_memory_is_not_believed(tmp_path, hashed):
    folder, cache = tmp_path / "model", tmp_path / HASH_CACHE_FILE
    base().save_pretrained(folder)

    def identity():
        model = loading.load_model(str(folder), dtype=torch.float32)
        return reference_identity(model, torch.float32, cache)

    first = identity()
    content = json.loads(cache.read_text())
    (entry,) = content.values()
    entry["weights"] = "0" * 64
    for text in (json.dumps(content), "", "{", "[]", '{"a": 1}', "[" * 100_000):
        cache.write_text(text)
        assert identity() == first
    assert len(hashed) == 7


def test_files_that_change_while_they_are_loaded_are_not_noted(tmp_path, monkeypatch):
    folder, cache = tmp_path / "model", tmp_path / HASH_CACHE_FILE
    base().save_pretrained(folder)

    real = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(*args, **options):
        model = real(*args, **options)
        (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    model = loading.load_model(str(folder), dtype=torch.float32)
    reference_identity(model, torch.float32, cache)
    assert not cache.exists()


# Progress and the source


def test_the_source_passes_its_options_on(policy, tmp_path, said, monkeypatch):
    pairs = [Pair(g.prompt_ids, *g.completions, row=i) for i, g in enumerate(GROUPS)]
    bars = []
    real = compute.progress_bar
    monkeypatch.setattr(compute, "progress_bar", lambda *a: bars.append(a) or real(*a))
    for at in range(2):
        source = RefLogpsProvider(
            reference_from_base(policy), tmp_path, compute_dtype=torch.float32,
            layout=ExecutionLayout(128),
            store_options=StoreOptions(keep_token_logps=False, spot_check_pairs=2),
        )  # fmt: skip
        groups = PairGroups(PairDataset.from_pairs(pairs))
        source.attach(groups, "eval", ASKED)
        assert np.isfinite(groups.ref_logps).all()
        assert any("Spot check: 2 pairs" in line for line in said()) == bool(at)
    ((tokens, description, unit),) = bars
    assert tokens == sum(group_tokens(group) for group in GROUPS)
    assert (description, unit) == ("Reference log-probs of eval", "token")
