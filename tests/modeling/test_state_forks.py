"""Layers with a state over packed pairs: prefixes run once, suffixes from forks of the state."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    GraniteMoeHybridConfig,
    Lfm2Config,
    Lfm2MoeConfig,
    LlamaConfig,
    Mamba2Config,
    NemotronHConfig,
    OlmoHybridConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Zamba2Config,
)

from fastdpo.batching import PromptGroup, pack_update
from fastdpo.modeling import packing
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.head import get_backbone
from fastdpo.modeling.layout import ExecutionLayout
from fastdpo.modeling.logprobs import packed_logprobs
from fastdpo.modeling.moe import aux_loss_coef, has_routers
from fastdpo.modeling.packing import choose_packing
from fastdpo.modeling.scoring import score_pairs
from fastdpo.modeling.state_forks import ForkingLayer
from tests.modeling.test_packed_pairs import (
    FAMILIES,
    SIZES,
    assert_same,
    model_of,
    packed,
    random_groups,
    separate,
)

DELTA = {
    "head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
SSM = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
CHUNK = {"mamba_chunk_size": 16}

STATE = {"vocab_size": 131, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
FORKED = {
    "lfm2": Lfm2Config(
        **SIZES, layer_types=["conv", "full_attention"], conv_L_cache=3, block_ff_dim=48,
        block_auto_adjust_ff_dim=False,
    ),
    "qwen3-next": Qwen3NextConfig(
        **SIZES, **DELTA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    ),
    "qwen3.5": Qwen3_5TextConfig(**SIZES, **DELTA),
    "falcon-h1": FalconH1Config(
        **SIZES, **SSM | {"mamba_d_head": 8}, **CHUNK, mamba_d_ssm=32, lm_head_multiplier=0.5
    ),
    "bamba": BambaConfig(**SIZES, **SSM, **CHUNK, attn_layer_indices=[1]),
    "mamba2": Mamba2Config(**STATE, num_heads=8, head_dim=8, n_groups=1, chunk_size=16),
    "zamba2": Zamba2Config(
        **SIZES, layers_block_type=["mamba", "hybrid"], mamba_d_state=8, n_mamba_heads=4,
        mamba_headdim=16, mamba_ngroups=1, chunk_size=16, num_mem_blocks=1, hybrid_layer_ids=[1],
    ),
    "granite-hybrid": GraniteMoeHybridConfig(
        **SIZES, **SSM, **CHUNK, layer_types=["mamba", "attention"], num_local_experts=2,
        num_experts_per_tok=1,
    ),
    "nemotron-h": NemotronHConfig(
        **SIZES, layers_block_type=["mamba", "attention"], mamba_num_heads=4, mamba_head_dim=16,
        ssm_state_size=8, n_groups=1, chunk_size=16,
    ),
    "qwen3.5-moe": Qwen3_5MoeTextConfig(
        **SIZES, **DELTA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    ),
    "lfm2-moe": Lfm2MoeConfig(
        **SIZES, layer_types=["conv", "full_attention"], conv_L_cache=3, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=24, num_dense_layers=1,
    ),
    "olmo-hybrid": OlmoHybridConfig(**SIZES, **{k: v for k, v in DELTA.items() if k != "head_dim"}),
}  # fmt: skip


def forking_model(family, std=0.15):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(FORKED[family])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FORKED)
def test_equal_to_separate_sequences(family, checkpointing):
    model, groups = forking_model(family), random_groups(3)
    mode = choose_packing(model)
    assert (mode.packing, mode.shared_prefix, mode.reason) == (True, True, "")
    truth = separate(model, groups)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    assert_same(packed(model, groups), truth)
    assert any(isinstance(module, ForkingLayer) for module in get_backbone(model).modules())
    assert choose_packing(model) == mode


def of_lengths(prompt, *completions):
    draw = np.random.default_rng(prompt)
    ids = [draw.integers(5, 131, count).astype(np.int32) for count in (prompt, *completions)]
    for number, completion in enumerate(ids[1:]):  # nothing is shared beyond the prompt
        completion[0] = 10 + number
    return PromptGroup(ids[0], tuple(ids[1:]))


@pytest.mark.parametrize("family", ["qwen3.5", "lfm2", "granite-hybrid", "nemotron-h"])
def test_prefixes_and_suffixes_of_every_length(family):
    """Prefixes shorter than the convolution's kernel, suffixes of one token; one and four."""
    model = forking_model(family)
    groups = [of_lengths(n, 5, 1) for n in (1, 2, 3, 4, 70)]
    groups += [of_lengths(9, 2), of_lengths(3, 1, 2, 3, 40)]
    truth = separate(model, groups)
    assert_same(packed(model, groups, tokens=512), truth)
    assert_same(packed(model, groups, tokens=512, shared_prefix=False), truth)
    assert_same(packed(model, groups, tokens=512, packing=False), truth)


@pytest.mark.parametrize("family", FORKED)
def test_rejected_never_changes_chosen(family):
    """The derivative by its embeddings is exactly 0."""
    model = forking_model(family)
    (micro_batch,) = pack_update([of_lengths(13, 11, 14)], 512)
    embedded = []
    embeddings = get_backbone(model).get_input_embeddings()
    embeddings.register_forward_hook(lambda _, __, out: embedded.append(out) or out)
    with packed_attention(model.config):
        chosen, rejected = packed_logprobs(model, micro_batch).logps
    (segment, *_) = micro_batch.segments
    first, second = segment.suffix_tokens
    ends = np.cumsum([segment.prefix_tokens, first, second])
    for logps, own, other in (
        (chosen, slice(ends[0], ends[1]), slice(ends[1], ends[2])),
        (rejected, slice(ends[1], ends[2]), slice(ends[0], ends[1])),
    ):
        (by,) = torch.autograd.grad(logps, embedded[0], retain_graph=True)
        assert (by[0, other] == 0).all()
        assert (by[0, own] != 0).any(dim=-1).all()
        assert (by[0, : ends[0]] != 0).any(dim=-1).all()


def test_their_own_forward_stays_as_it_was():
    model = forking_model("qwen3.5")
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
        score_pairs(model, random_groups(1), ExecutionLayout(256))
        assert torch.allclose(model(ids).logits, before, atol=1e-5)
        generated = model.generate(ids[:, :7], max_new_tokens=5, do_sample=False)
    assert generated.shape == (1, 12)


def test_layers_that_take_a_state_up_for_single_tokens_alone_run_padded(monkeypatch):
    """As in earlier releases of transformers."""
    model = forking_model("qwen3.5")
    layer = next(m for m in model.modules() if type(m).__name__.endswith("GatedDeltaNet"))

    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        return hidden_states

    monkeypatch.setattr(type(layer), "forward", forward)
    mode = choose_packing(model)
    assert not mode.packing
    assert "single tokens alone" in mode.describe()


def test_a_layer_whose_state_is_not_forked_is_found(monkeypatch):
    model = forking_model("qwen3.5")
    monkeypatch.setattr(packing, "why_not_packable", lambda _: "")
    monkeypatch.setattr("fastdpo.modeling.logprobs.fork_states", lambda _: None)
    with pytest.raises(ValueError, match="in 1 of its 2 layers"):
        packed(model, random_groups(1))


# The routers' loss: its weight in a config counts where there are routers


@pytest.mark.parametrize(
    ("family", "dense"),
    [
        ("qwen3-next", {"mlp_only_layers": [0, 1]}),
        ("lfm2-moe", {"num_dense_layers": 2}),
        ("granite-hybrid", {"num_local_experts": 0}),
        ("qwen3-moe", {"mlp_only_layers": [0, 1]}),
    ],
)
def test_a_config_s_weight_of_the_routers_loss_counts_where_there_are_routers(family, dense):
    known = FORKED | FAMILIES
    values = known[family].to_dict() | {"router_aux_loss_coef": 0.25, "output_router_logits": True}
    for more, expected in (({}, 0.25), (dense, 0.0)):
        config = type(known[family])(**values | more)
        model = AutoModelForCausalLM.from_config(config)
        assert has_routers(model) == bool(expected)
        assert aux_loss_coef(model, None) == expected
        if not expected:
            with pytest.raises(ValueError, match="is no mixture of experts"):
                aux_loss_coef(model, 0.1)


@pytest.mark.parametrize("family", [*FORKED, *FAMILIES])
def test_no_family_without_routers_is_asked_for_their_loss(family):
    """Each trains with what its config says, which nobody passed."""
    model = forking_model(family) if family in FORKED else model_of(family)
    (group, *_) = random_groups(1)
    coef = aux_loss_coef(model, None)
    assert bool(coef) <= has_routers(model)
    if coef:
        assert packed_aux_loss(model, group).isfinite()


def packed_aux_loss(model, group):
    (micro_batch,) = pack_update([group], 512)
    with packed_attention(model.config):
        return packed_logprobs(model, micro_batch, aux_loss=True).aux_loss


def test_llama_has_none():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    assert not has_routers(model)
