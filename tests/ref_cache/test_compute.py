"""The reference store: what its numbers are, what they hang on, what no fault may do to them."""

import copy
import errno
import json
import logging
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from fastdpo.batching import PromptGroup
from fastdpo.modeling import scoring
from fastdpo.modeling.adapters import add_adapter, lora_config
from fastdpo.modeling.layout import ExecutionLayout
from fastdpo.modeling.loading import load_model
from fastdpo.modeling.packing import PackingMode
from fastdpo.modeling.reference_model import reference_from_base
from fastdpo.ref_cache import (
    ReferenceStore,
    StoreOptions,
    compute,
    reference_identity,
    reference_logps,
)
from fastdpo.ref_cache.store import group_keys, row_key
from fastdpo.system import files
from tests.modeling.test_packed_pairs import random_groups

SIZES = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "attention_dropout": 0.5,
}
GROUPS = random_groups(count=9)
IDENTITY = {"model": "tiny"}


def base(config=None):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES) if config is None else config
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def adapted(model=None, rank=8, dropout=0.5, seed=1, targets=None):
    """A policy that is far from its base, in train mode, one of its adapters frozen."""
    model = add_adapter(base() if model is None else model, lora_config(rank, 16, dropout, targets))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    return model.train()


@pytest.fixture(scope="module")
def policy():
    return adapted()


def fill(model, groups, root, tokens=128, store_options=None, **options):
    store = ReferenceStore(root, IDENTITY, options=store_options or StoreOptions())
    return reference_logps(
        reference_from_base(model), groups, store, layout=ExecutionLayout(tokens), **options
    )


@pytest.fixture(scope="module")
def truth():
    """Each sequence on its own through the base's own forward: token log-probs in fp64."""
    model = base().eval()
    rows = []
    with torch.no_grad():
        for group in GROUPS:
            row = []
            for completion in group.completions:
                ids = torch.from_numpy(np.concatenate([group.prompt_ids, completion])).long()[None]
                logits = model(ids, use_cache=False).logits[0, len(group.prompt_ids) - 1 : -1]
                targets = torch.from_numpy(completion).long()[:, None]
                row.append(logits.double().log_softmax(-1).gather(1, targets)[:, 0].numpy())
            rows.append(row)
    return rows


def sums(truth):
    return np.array([[tokens.sum() for tokens in row] for row in truth])


@pytest.fixture
def scored(monkeypatch):
    """The groups that are really computed, pass by pass."""
    passes, score_groups = [], compute.score_groups

    def noted(model, groups, **options):
        passes.append(list(groups))
        return score_groups(model, groups, **options)

    monkeypatch.setattr(compute, "score_groups", noted)
    return passes


def shards(root):
    return sorted(root.glob("*/shard-*.safetensors"))


def temporaries(root):
    return list(root.rglob(f"{files.TEMPORARY_MARK}*"))


# The pass


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_values_are_those_of_the_base_in_separate_sequences(policy, truth, tmp_path, shared_prefix):
    found = fill(policy, GROUPS, tmp_path, mode=PackingMode(shared_prefix=shared_prefix))
    assert found.dtype == np.float64
    assert found == pytest.approx(sums(truth), rel=1e-5)
    (shard,) = map(load_file, shards(tmp_path))
    tokens = np.split(shard["token_logps"], np.cumsum(shard["tokens"])[:-1])
    assert [math.fsum(part.tolist()) for part in tokens] == pytest.approx(shard["logps"], abs=1e-9)
    wanted = {
        key: part
        for group, row in zip(GROUPS, truth, strict=True)
        for key, part in zip(group_keys(group), row, strict=True)
    }
    keys = shard["keys"].reshape(-1, 32)
    assert {key.tobytes() for key in keys} == wanted.keys()
    for key, part in zip(keys, tokens, strict=True):
        assert part == pytest.approx(wanted[key.tobytes()], rel=1e-5)


def test_a_second_store_computes_nothing(policy, tmp_path, scored):
    first = fill(policy, GROUPS, tmp_path)
    assert len(scored) == 1
    assert np.array_equal(fill(policy, GROUPS, tmp_path), first)
    assert len(scored) == 1
    assert len(shards(tmp_path)) == 1


def test_any_other_choice_of_the_data_computes_only_what_is_new(policy, truth, tmp_path, scored):
    wanted = sums(truth)

    def check(indices, computed):
        before = len(scored)
        found = fill(policy, [GROUPS[i] for i in indices], tmp_path)
        assert found == pytest.approx(wanted[indices], rel=1e-5)
        assert [len(groups) for groups in scored[before:]] == ([computed] if computed else [])

    check([3, 1, 4, 1, 1, 3], 3)  # duplicates
    check([1, 4], 0)  # subset
    check([4, 3, 1], 0)  # permutation
    check([0, 1, 2, 3, 4, 5], 3)  # superset
    check(list(range(len(GROUPS)))[::-1], len(GROUPS) - 6)
    check([5] * 4 + [0], 0)
    swapped = [PromptGroup(g.prompt_ids, g.completions[::-1]) for g in GROUPS]
    before = len(scored)
    assert fill(policy, swapped, tmp_path) == pytest.approx(wanted[:, ::-1], rel=1e-5)
    assert len(scored) == before


def test_no_group_is_scored_twice_in_one_pass(policy, truth, tmp_path, scored):
    swapped = [PromptGroup(g.prompt_ids, g.completions[::-1]) for g in GROUPS]
    mixed = [g for pair in zip(GROUPS, swapped, GROUPS, strict=True) for g in pair]
    found = fill(policy, mixed, tmp_path)
    assert [len(groups) for groups in scored] == [len(GROUPS)]
    assert found[::3] == pytest.approx(sums(truth), rel=1e-5)
    assert np.array_equal(found[::3], found[2::3])
    assert np.array_equal(found[::3], found[1::3, ::-1])


def test_other_completions_of_a_known_prompt_are_computed(policy, truth, tmp_path, scored):
    fill(policy, GROUPS[:4], tmp_path)
    known, other = GROUPS[0], GROUPS[1].completions[1]
    found = fill(policy, [PromptGroup(known.prompt_ids, (known.completions[0], other))], tmp_path)
    assert len(scored) == 2
    assert found[0, 0] == pytest.approx(sums(truth)[0, 0], rel=1e-5)
    assert found[0, 1] != pytest.approx(sums(truth)[1, 1], rel=1e-3)


def test_no_data(policy, tmp_path):
    assert len(fill(policy, [], tmp_path)) == 0


def test_what_is_missing_is_nan_and_never_zero(policy, tmp_path):
    store = ReferenceStore(tmp_path, IDENTITY)
    keys = [key for group in GROUPS for key in group_keys(group)]
    assert np.isnan(store.lookup(keys)).all()
    fill(policy, GROUPS[:2], tmp_path)
    found = store.lookup(keys)
    assert np.isfinite(found[:4]).all()
    assert (found[:4] < 0).all()
    assert np.isnan(found[4:]).all()
    assert store.lookup([]).shape == (0,)


def test_a_row_that_stays_missing_is_refused(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(ReferenceStore, "append", lambda self, rows: None)
    with pytest.raises(RuntimeError, match=f"{len(GROUPS)} pairs have no reference"):
        fill(policy, GROUPS, tmp_path)


def model_state(model):
    return (
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: m.training for name, m in model.named_modules()},
        [m.disable_adapters for m in model.modules() if hasattr(m, "disable_adapters")],
        model.config._attn_implementation,
    )


@pytest.fixture
def failing_pass(monkeypatch):
    """Let the n-th micro-batch of the pass fail."""

    def arm(after):
        calls, real = [], scoring.packed_logprobs

        def packed_logprobs(*args):
            calls.append(args)
            if len(calls) > after:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(scoring, "packed_logprobs", packed_logprobs)
        return lambda: monkeypatch.setattr(scoring, "packed_logprobs", real)

    return arm


@pytest.mark.parametrize("shard_completions", [1, 6, 4096])
def test_an_unfinished_pass_keeps_what_was_done(
    policy, tmp_path, monkeypatch, failing_pass, scored, shard_completions
):
    whole = fill(policy, GROUPS, tmp_path / "whole")
    monkeypatch.setattr(compute, "SHARD_COMPLETIONS", shard_completions)
    before = model_state(policy)
    disarm = failing_pass(after=2)
    with pytest.raises(KeyboardInterrupt):
        fill(policy, GROUPS, tmp_path)
    assert model_state(policy) == before
    disarm()
    store = ReferenceStore(tmp_path, IDENTITY)
    keys = [key for group in GROUPS for key in group_keys(group)]
    kept = np.isfinite(store.lookup(keys)).reshape(-1, 2).all(axis=1)
    assert 0 < kept.sum() < len(GROUPS)
    done = {1: kept.sum(), 6: -(-2 * kept.sum() // 6), 4096: 1}[shard_completions]
    assert len(shards(tmp_path)) == done
    # The rest is packed in other company: a BLAS may round its rows otherwise there.
    assert fill(policy, GROUPS, tmp_path) == pytest.approx(whole, rel=1e-6)
    assert [len(groups) for groups in scored] == [len(GROUPS)] * 2 + [len(GROUPS) - kept.sum()]
    assert model_state(policy) == before


def test_a_full_disk_leaves_the_model_as_it_was(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(compute, "SHARD_COMPLETIONS", 2)
    ReferenceStore(tmp_path, IDENTITY)
    before = model_state(policy)

    def fsync(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "fsync", fsync)
    with pytest.raises(OSError, match="No space left") as held:
        fill(policy, GROUPS, tmp_path)
    assert model_state(policy) == before, "put back only when the exception is forgotten"
    assert held.value.errno == errno.ENOSPC
    assert not shards(tmp_path)
    assert not temporaries(tmp_path)


@pytest.mark.parametrize("part", ["nothing", "one-byte", "half", "less-one", "more"])
def test_a_damaged_shard_is_set_aside_and_only_its_rows_computed_again(
    policy, tmp_path, caplog, scored, part
):
    whole = fill(policy, GROUPS[:4], tmp_path)
    (other,) = shards(tmp_path)
    fill(policy, GROUPS, tmp_path)
    (path,) = set(shards(tmp_path)) - {other}
    content = path.read_bytes()
    cut = {"nothing": 0, "one-byte": 1, "half": len(content) // 2, "less-one": len(content) - 1}
    path.write_bytes(content + b"\0" if part == "more" else content[: cut[part]])
    with caplog.at_level(logging.WARNING):
        found = fill(policy, GROUPS, tmp_path)
    assert np.isfinite(found).all()
    assert np.array_equal(found[:4], whole)
    assert [len(groups) for groups in scored] == [4, len(GROUPS) - 4, len(GROUPS) - 4]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert str(path) in warning
    assert f"{path.name}.bad" in warning
    assert other in shards(tmp_path)
    assert len(shards(tmp_path)) == 2


def test_random_numbers_and_flags_are_untouched(policy, tmp_path):
    def state():
        kind, key, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), kind, key.tolist(), rest, random.getstate()

    before, flags = state(), model_state(policy)
    first = fill(policy, GROUPS, tmp_path)
    assert state() == before
    assert model_state(policy) == flags
    assert np.array_equal(fill(policy, GROUPS, tmp_path), first)
    assert state() == before
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert not gradients


# The identity


def identity_of(model, dtype=torch.float32):
    return reference_identity(model, dtype)


def test_identity_does_not_hang_on_the_adapter_or_the_run(tmp_path):
    model = base()
    identity = identity_of(model)
    model.save_pretrained(tmp_path)
    assert identity_of(load_model(str(tmp_path), dtype=torch.float32)) == identity
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert identity_of(load_model(str(moved), dtype=torch.float32)) == identity
    for options in (
        {"rank": 4},
        {"rank": 16, "seed": 5, "dropout": 0.0},
        {"targets": ["q_proj", "down_proj"]},
    ):
        assert identity_of(adapted(copy.deepcopy(model), **options)) == identity
    stock = get_peft_model(copy.deepcopy(model), LoraConfig(modules_to_save=["embed_tokens"]))
    for name, parameter in stock.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)  # as after training
    assert identity_of(stock) == identity
    ia3 = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    assert identity_of(get_peft_model(copy.deepcopy(model), ia3)) == identity
    model.config.attention_dropout = 0.3
    model.config.use_cache = False
    model.config._name_or_path = "somewhere/else"
    assert identity_of(model.eval()) == identity


def test_identity_hangs_on_the_weights():
    model = base()
    identity = identity_of(model)
    for parameter in model.parameters():
        place = parameter.data.view(-1)[-1:]
        before = place.clone()
        for other in (torch.nextafter(before, before + 1), -before):  # its lowest and highest bit
            place.copy_(other)
            changed = identity_of(model)
            assert changed["weights"] != identity["weights"]
            assert changed["config"] == identity["config"]
        place.copy_(before)
    assert identity_of(model) == identity
    policy = adapted(model)
    assert identity_of(policy) == identity
    policy.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.data[0, 0] += 1
    assert identity_of(policy)["weights"] != identity["weights"]
    assert identity_of(base().to(torch.bfloat16))["weights"] != identity["weights"]


def change_rope(config):
    config.rope_parameters["rope_theta"] = 5e5


def change_rope_scaling(config):
    config.rope_parameters |= {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "change",
    [
        change_rope,
        change_rope_scaling,
        lambda config: setattr(config, "rms_norm_eps", 1e-5),
        lambda config: setattr(config, "sliding_window", 9),
        lambda config: setattr(config, "hidden_act", "gelu"),
        lambda config: setattr(config, "tie_word_embeddings", True),
        lambda config: setattr(config, "final_logit_softcapping", 30.0),
    ],
    ids=["theta", "scaling", "eps", "window", "activation", "tied", "softcap"],
)
def test_identity_hangs_on_the_config(change):
    model = base(MistralConfig(**SIZES, sliding_window=64))
    before = copy.deepcopy(identity_of(model))
    change(model.config)
    after = identity_of(model)
    assert after["weights"] == before["weights"]
    assert after["config"] != before["config"]


def test_identity_hangs_on_dtype_tying_and_numerics(monkeypatch, tmp_path):
    from fastdpo.modeling import attention_backends

    model = base()
    identity = identity_of(model)
    assert identity_of(model, torch.bfloat16) != identity
    tied = base(LlamaConfig(**SIZES, tie_word_embeddings=True))
    untied = base()
    untied.load_state_dict(tied.state_dict())
    assert identity_of(tied) != identity_of(untied)
    from fastdpo.ref_cache import identity as module

    for room, name in ((attention_backends, "CPU_ATTENTION_KEY"), (module, "NUMERICS_VERSION")):
        with monkeypatch.context() as patch:
            patch.setattr(room, name, "another")
            assert identity_of(model) != identity
    folders = {
        ReferenceStore(tmp_path, described).folder
        for described in (identity, identity_of(model, torch.bfloat16), identity_of(tied))
    }
    assert len(folders) == 3


PRINT_IDENTITIES = """
import json, sys, torch
from fastdpo.modeling.loading import load_model
from fastdpo.ref_cache import ReferenceStore, reference_identity
for in_4bit in (False, True):
    model = load_model(sys.argv[1], dtype=torch.float32, load_in_4bit=in_4bit)
    print(json.dumps(reference_identity(model, torch.float32)))
"""


def test_identity_is_the_same_in_another_process_and_in_4_bits_another(tmp_path):
    base().save_pretrained(tmp_path)
    root = Path(__file__).parents[2]
    said = subprocess.run(
        [sys.executable, "-c", PRINT_IDENTITIES, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ
        | {"PYTHONHASHSEED": "77", "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"},
    )
    theirs = [json.loads(line) for line in said.stdout.splitlines()]
    for load_in_4bit, other in zip((False, True), theirs, strict=True):
        model = load_model(str(tmp_path), dtype=torch.float32, load_in_4bit=load_in_4bit)
        mine = identity_of(model)
        assert mine == other, "not the same in another process"
        assert json.loads(json.dumps(mine)) == mine, "JSON changes it"
        assert identity_of(adapted(model)) == mine
    assert theirs[0]["weights"] != theirs[1]["weights"]
    assert theirs[0]["config"] != theirs[1]["config"]


def test_identity_of_strange_config_values_is_json(tmp_path):
    model = base()
    model.config.time_step_limit = (0.0, math.inf)
    model.config.kinds = {"b", "a"}
    model.config.by_number = {1: torch.bfloat16}
    model.config.text = {"dtype": "bfloat16", "use_cache": True, "eps": 1e-5}
    identity = identity_of(model)
    assert json.loads(json.dumps(identity, allow_nan=False)) == identity
    assert identity["config"]["time_step_limit"] == [0.0, "inf"]
    assert identity["config"]["kinds"] == ["a", "b"]
    assert identity["config"]["text"] == {"eps": 1e-5}
    folder = ReferenceStore(tmp_path, identity).folder
    described = json.loads((folder / "manifest.json").read_text())
    assert described == {"format": 1, "identity": identity}


def test_a_row_key_hangs_on_every_token_and_on_where_the_completion_begins():
    ids = np.arange(6, dtype=np.int32)
    keys = {row_key(ids[:cut], ids[cut:]) for cut in range(1, 6)}
    changed = ids.copy()
    changed[5] = 9
    keys |= {row_key(ids[:3], changed[3:]), row_key(ids[:3], ids[3:5]), row_key(ids[1:3], ids[3:])}
    assert len(keys) == 8
    assert row_key(ids[:3].astype(np.int64), ids[::-1][:3][::-1]) == row_key(ids[:3], ids[3:])
