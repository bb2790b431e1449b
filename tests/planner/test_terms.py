"""The planner's formulas against what torch really keeps, and what it chooses with them."""

import contextlib
import math
from dataclasses import replace

import bitsandbytes as bnb
import fastdpo_kernels
import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from bench import harness, memory, qlora
from bench.live_bytes import walk_update
from bench.synthetic import aliased_config, random_model
from fastdpo.batching import PromptGroup, Segment, pack_update
from fastdpo.modeling import activations
from fastdpo.modeling.activations import PAGE_BYTES, apply_activation_plan
from fastdpo.modeling.adapters import add_adapter, lora_config
from fastdpo.modeling.attention import kept, packed_attention
from fastdpo.modeling.fused import use_kernels
from fastdpo.modeling.logprobs import packed_logprobs
from fastdpo.modeling.nf4 import nf4_bytes
from fastdpo.options import MODEL_ALIASES
from fastdpo.planner import (
    Training,
    Workload,
    architecture_named,
    architecture_of,
    gpu_spec,
    make_plan,
    training_of,
)
from fastdpo.planner.activations import MicroBatchShape, layer_bytes
from fastdpo.planner.architecture import architecture_of_config
from fastdpo.planner.memory_layout import MemoryLayout, MemoryStrategy
from fastdpo.planner.plan import pinned_bytes
from fastdpo.planner.terms import GIB, optimizer_bytes
from tests.project.test_bench import InProcessTurns

SIZES = {
    "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 500, "head_dim": 8,
}  # fmt: skip
FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
FAMILIES |= {"qwen3": Qwen3Config}
PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-9b": 9_241_705_984,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "ministral-8b": 8_019_808_256,
    "ministral-3-8b": 8_489_553_920,
    "qwen3.5-0.8b": 752_393_024,
    "qwen3.5-2b": 1_881_825_088,
    "qwen3.5-4b": 4_205_751_296,
    "qwen3.5-9b": 8_953_803_264,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "gemma-3-12b": 11_766_034_176,
    "gemma-4-e2b": 4_628_569_344,
    "gemma-4-e4b": 7_463_013_376,
    "gemma-4-12b": 11_907_350_272,
    "gpt-oss-20b": 20_914_757_184,
    "smollm3-3b": 3_075_098_624,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
}
"""Of the language model alone where a model can look and listen too."""

GUESSED = ("qwen3.5-", "gemma-4-", "gpt-oss-", "phi-4")
"""Families whose layers are more than attention and one gated MLP of separate matrices."""


def groups(count=2):
    draw = np.random.default_rng(0)
    return [
        PromptGroup(
            draw.integers(0, 50, 40).astype(np.int32),
            tuple(
                draw.integers(low, low + 10, tokens).astype(np.int32)
                for low, tokens in ((60, 30), (80, 20))
            ),
        )
        for _ in range(count)
    ]


def shape_of(micro_batch) -> MicroBatchShape:
    """What the planner needs to know of a micro-batch, counted from its segments."""
    segments = [s for s in micro_batch.segments if s.suffix_tokens]
    others = [(s.prefix_tokens, suffix) for s in segments for suffix in s.suffix_tokens[1:]]
    return MicroBatchShape(
        micro_batch.input_ids.shape[1],
        len(micro_batch.scored_positions),
        sum(prefix for prefix, _ in others),
        sum(suffix for _, suffix in others),
        sum(suffix * (prefix + suffix) for prefix, suffix in others),
    )


class SavedBytes:
    """Storages that autograd keeps, by the decoder layer that saved them first."""

    def __init__(self, model, micro_batch):
        base = model.get_base_model()
        resident = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        self.by_layer, self.held, now = {}, {}, ["before"]

        def pack(tensor):
            pointer = tensor.untyped_storage().data_ptr()
            if pointer not in resident and pointer not in self.held:
                self.held[pointer] = tensor
                size = tensor.untyped_storage().nbytes()
                self.by_layer[now[0]] = self.by_layer.get(now[0], 0) + size
            return tensor

        for index, layer in enumerate(base.model.layers):
            layer.register_forward_pre_hook(lambda *_, i=index: now.__setitem__(0, i))
            layer.register_forward_hook(lambda *_: now.__setitem__(0, "after"))
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with packed_attention(base.config), hooks:
            packed_logprobs(model, micro_batch)


def counted_contexts(found):
    """Contexts that keep attention; what the first keeps is added up when it is left."""
    keeping, returning = kept.keep_attention()
    storage = keeping._inner.storage

    @contextlib.contextmanager
    def counting():
        with keeping:
            yield
        tensors = [x for runs in storage.values() for x in tree_leaves(list(runs.values()))]
        values = [x.val for x in tensors if isinstance(getattr(x, "val", None), torch.Tensor)]
        found.append(sum(x.untyped_storage().nbytes() for x in values))

    return counting(), returning


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("kernels", ["eager", "fused"])
def test_saved_bytes_of_a_layer_are_exact(family, dtype, four_bit, kernels, monkeypatch):
    config = FAMILIES[family](**SIZES | {"num_hidden_layers": 4})
    base = random_model(config, dtype=dtype, device="cpu", load_in_4bit=four_bit)
    model = add_adapter(base, lora_config(4, 8, 0.0, None)).train()
    use_kernels(model, kernels, backend="torch")
    micro_batch = pack_update(groups(), 4096)[0]
    kept_results = []
    with monkeypatch.context() as patched:
        patched.setattr(activations, "keep_attention", lambda: counted_contexts(kept_results))
        apply_activation_plan(model, ("keep", "keep", "recompute", "keep_attention"))
        saved = SavedBytes(model, micro_batch).by_layer
    training = training_of(model, "adamw_torch", "sdpa", kernels)
    assert training.tuning == ("qlora" if four_bit else "lora")
    layer = layer_bytes(architecture_of(model, family), training, shape_of(micro_batch))
    rotary = 2 * dtype.itemsize * 8 * micro_batch.input_ids.shape[1]
    assert saved[0] == layer.kept - layer.first_spared + rotary
    assert saved[1] == layer.kept
    assert saved[2] == layer.input
    assert saved[3] == layer.input, "what torch keeps of the attention is in no graph"
    assert kept_results == [layer.attention_results]


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_weights_that_wait_for_the_backward_are_counted(family, monkeypatch):
    waiting = []

    class Watched(fastdpo_kernels.KeptDenseWeights):
        def __exit__(self, *error):
            super().__exit__(*error)
            waiting.append(sum(dense.nbytes for dense in self._by_weight.values()))

    base = random_model(
        FAMILIES[family](**SIZES), dtype=torch.bfloat16, device="cpu", load_in_4bit=True
    )
    model = add_adapter(base, lora_config(4, 8, 0.0, None)).train()
    monkeypatch.setattr(fastdpo_kernels, "KeptDenseWeights", Watched)
    apply_activation_plan(model, ("recompute",) * 3, dequantize_once=True)
    micro_batch = pack_update(groups(), 4096)[0]
    with packed_attention(base.config):
        packed_logprobs(model, micro_batch).logps.sum().backward()
    training = training_of(model, "adamw_torch", "sdpa", "eager")
    layer = layer_bytes(architecture_of(model, family), training, shape_of(micro_batch))
    assert waiting == [layer.dense_weights] * 3
    plan = ("recompute",) * 3
    peaks = [
        MemoryLayout(
            architecture_of(model, family), training, shape_of(micro_batch),
            MemoryStrategy("adamw_torch", dequantize_once=once),
        ).phases(plan)["backward of a layer"]
        for once in (False, True)
    ]  # fmt: skip
    assert sum(peaks[1].values()) - sum(peaks[0].values()) == layer.dense_weights


R, A, K = "recompute", "keep_attention", "keep"


@pytest.mark.parametrize(
    ("alias", "tokens", "policy", "tiles", "dtype", "kernels"),
    [
        ("llama-3.1-8b", 4096, (R, R, R, R), (None, None), torch.bfloat16, "eager"),
        ("llama-3.1-8b", 8192, (R, R), (2048, None), torch.bfloat16, "eager"),
        ("llama-3.1-8b", 16384, (R, R, R, R), (2048, 2048), torch.bfloat16, "eager"),
        ("llama-3.1-8b", 8192, (R, R, K, K), (2048, 1024), torch.bfloat16, "eager"),
        ("llama-3.1-8b", 4096, (R, R, R, R), (None, None), torch.float32, "eager"),
        ("llama-2-7b", 8192, (R, K, K, K), (None, 2048), torch.bfloat16, "eager"),
        ("qwen2.5-7b", 4096, (K, K, K, K), (None, None), torch.bfloat16, "eager"),
        ("qwen3-8b", 16384, (R, R, R, R), (2048, None), torch.bfloat16, "eager"),
        ("llama-3.1-8b", 4096, (R, R, R, R), (None, None), torch.bfloat16, "fused"),
        ("llama-3.1-8b", 4096, (R, R, K, K), (1024, None), torch.bfloat16, "fused"),
        ("llama-3.1-8b", 4096, (A, A, A, A), (None, None), torch.bfloat16, "fused"),
        ("llama-3.1-8b", 8192, (R, A, A, K), (2048, None), torch.bfloat16, "eager"),
        ("qwen3-8b", 4096, (K, K, K, K), (None, None), torch.bfloat16, "fused"),
        ("qwen3-8b", 16384, (R, R, R, R), (2048, None), torch.bfloat16, "fused"),
    ],
)
def test_the_peak_of_an_update_is_that_of_its_tensors(
    alias, tokens, policy, tiles, dtype, kernels, soak
):
    """Real shapes on fake tensors: everything but the insides of single operations."""
    if tokens > 8192 and tiles != (2048, 2048) and not soak:
        pytest.skip("takes seconds; run by make soak")
    config = aliased_config(alias, num_hidden_layers=len(policy))
    prefix, suffix = tokens // 2, tokens // 4
    walked = walk_update(
        config, [Segment(0, prefix, (suffix, suffix))], dtype=dtype, policy=policy,
        mlp_tile_tokens=tiles[0], norm_tile_tokens=tiles[1], kernels=kernels, buffer_bytes=2**27,
    )  # fmt: skip
    layout = MemoryLayout(
        architecture_of_config(config, alias),
        Training(
            "lora", dtype.itemsize, attention="sdpa", kernels=kernels, head_buffer_bytes=2**27
        ),
        MicroBatchShape(tokens, 2 * suffix, prefix, suffix, suffix * (prefix + suffix)),
        MemoryStrategy("adamw_torch", mlp_tile_tokens=tiles[0], norm_tile_tokens=tiles[1]),
    )
    predicted = layout.peak(policy) - sum(layout.resident.values())
    assert predicted == pytest.approx(walked.peak_bytes, rel=0.015), walked.at_peak


@pytest.mark.parametrize("alias", MODEL_ALIASES)
def test_every_alias_is_counted_offline(alias):
    found = architecture_named(alias)
    assert found.parameters == PARAMETERS[alias]
    assert found.is_standard != alias.startswith(GUESSED)
    assert found.attention.softcap == (alias == "gemma-2-9b")
    normed = ("qwen3-8b", "gemma-3-", "gemma-4-")
    assert found.query_key_norms == alias.startswith(normed)


def test_a_loaded_model_is_counted_like_its_config():
    config = Qwen3Config(**SIZES, tie_word_embeddings=True)
    wanted = architecture_of_config(config, "tiny")
    for four_bit in (False, True):
        model = random_model(config, dtype=torch.bfloat16, device="cpu", load_in_4bit=four_bit)
        assert architecture_of(add_adapter(model, lora_config(4, 8, 0.0, None)), "tiny") == wanted


def test_targets_are_named_layers_only():
    tiny = architecture_of_config(LlamaConfig(**SIZES), "tiny")
    assert {each.name for each in tiny.targets(("q_proj", "v_proj"))} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match=r"no linear layer 'c_attn' to adapt: choose from .*q_pro"):
        tiny.targets(("c_attn",))


def test_a_folder_is_read_and_what_is_no_causal_lm_is_refused(tmp_path):
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "llama")
    assert architecture_named(str(tmp_path / "llama")).layers == 3
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="not a causal LM"):
        architecture_named(str(tmp_path / "bert"))
    with pytest.raises(ValueError, match=r"no config of the model 'nobody/nothing'.*llama-7b"):
        architecture_named("nobody/nothing")


@pytest.mark.parametrize("shape", [(64, 64), (172, 64), (320, 1000)])
def test_nf4_bytes_are_those_of_bitsandbytes(shape):
    weight = bnb.nn.Params4bit(
        torch.randn(shape), requires_grad=False, quant_type="nf4", compress_statistics=True
    ).to("cpu")
    state = weight.quant_state
    parts = [weight, state.absmax, state.code, state.offset, state.state2.absmax]
    held = sum(part.untyped_storage().nbytes() for part in [*parts, state.state2.code])
    assert nf4_bytes(math.prod(shape)) == held


def test_optimizer_state_is_that_of_the_optimizers():
    parameter = torch.nn.Parameter(torch.randn(64, 1024))
    parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    moments = [v for v in optimizer.state[parameter].values() if v.ndim]
    assert optimizer_bytes(parameter.numel(), "adamw_torch") == sum(m.nbytes for m in moments)
    assert optimizer_bytes(2**16, "adamw_8bit") == 2 * 2**16 + 2 * 4 * 2**8
    assert optimizer_bytes(2**16, "paged_adamw_8bit") == 0
    assert optimizer_bytes(2**16, "adamw_bnb_8bit") == optimizer_bytes(2**16, "adamw_8bit")


def test_pinned_pages_are_those_of_the_activation_policy():
    assert pinned_bytes(PAGE_BYTES) == PAGE_BYTES
    assert pinned_bytes(PAGE_BYTES + 5) == PAGE_BYTES + 8
    assert pinned_bytes(PAGE_BYTES + 4) == PAGE_BYTES + 4
    assert pinned_bytes(3 * PAGE_BYTES - 1) == 3 * PAGE_BYTES


def test_a_synthetic_model_trains():
    base = random_model(Qwen3Config(**SIZES), dtype=torch.float32, device="cpu", load_in_4bit=True)
    model = add_adapter(base, lora_config(4, 8, 0.0, None)).train()
    with packed_attention(base.config):
        logps = packed_logprobs(model, pack_update(groups(), 4096)[0]).logps
    logps.sum().backward()
    assert logps.isfinite().all()
    assert (logps < 0).all()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert sum(float(g.abs().sum()) for g in gradients) > 0
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])


def test_the_bench_of_planned_updates_runs_at_toy_size(tmp_path, monkeypatch):
    seen = []

    def solo(function, case, *, turns):
        assert function == memory.QLORA
        line = InProcessTurns(turns)
        qlora.contend(case, line)
        seen.append(line.result)
        return line.result

    monkeypatch.setattr(memory, "solo", solo)
    recorder = harness.Recorder("memory", tmp_path / "rows.jsonl")
    memory.aims(recorder)
    rows = {(row.contender, row.metric): row for row in harness.read(tmp_path / "rows.jsonl")}
    assert set(rows) == {
        ("plan", "peak_mib"), ("fastdpo planned", "peak_mib"), ("fastdpo planned", "update_s"),
    }  # fmt: skip
    losses = [turn["loss"] for turn in seen[0].turns]
    assert losses[0] == pytest.approx(math.log(2))  # the adapter is new: policy and reference agree
    assert losses[1] < losses[0]
    assert rows["plan", "peak_mib"].p50 == pytest.approx(seen[0].facts["predicted_mib"])


def test_an_update_as_planned_is_the_same_update():
    """Kept or recomputed, offloaded, in tiles, embeddings on the host: the same gradients."""
    found = []
    for policy, tiles, on_host in (
        (("keep",) * 3, None, False),
        (("offload", "recompute", "keep"), 64, True),
    ):
        config = LlamaConfig(**SIZES)
        base = random_model(config, dtype=torch.float32, device="cpu", load_in_4bit=True)
        torch.manual_seed(0)
        model = add_adapter(base, lora_config(4, 8, 0.0, None)).train()
        llama = architecture_of(model, "tiny")
        made = make_plan(
            llama, Training(entry_bytes=4), gpu_spec("1"), Workload(256, 256), host_bytes=GIB
        )
        made = replace(
            made, activation_plan=policy, norm_tile_tokens=tiles, mlp_tile_tokens=tiles,
            embeddings_on_host=on_host,
        )  # fmt: skip
        qlora.carry_out(model, made)
        with packed_attention(base.config):
            packed_logprobs(model, pack_update(groups(), 4096)[0]).logps.sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("card_gib", [4, 6, 24])
def test_the_peak_on_a_card_is_predicted_within_3_percent(card_gib):
    line = InProcessTurns(3)
    case = {"model": "llama-3.1-8b", "config": {"num_hidden_layers": 6}, "row_tokens": 2048}
    qlora.contend(case | {"card_gib": card_gib, "dtype": "bfloat16", "device": "cuda"}, line)
    assert line.result is not None
    measured = max(turn["peak_mib"] for turn in line.result.turns)
    assert line.result.facts["predicted_mib"] == pytest.approx(measured, rel=0.03)
