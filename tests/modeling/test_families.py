"""What each family can do: those that cannot be packed run padded and exact, others are refused."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    DogeConfig,
    FalconConfig,
    Gemma3TextConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
    PhimoeConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from fastdpo.batching import PromptGroup, pack_update
from fastdpo.modeling import packing
from fastdpo.modeling.attention import MODEL_ATTENTION, packed_attention
from fastdpo.modeling.families import rotary_limit
from fastdpo.modeling.layout import ExecutionLayout
from fastdpo.modeling.logprobs import packed_logprobs
from fastdpo.modeling.moe import load_balancing_loss
from fastdpo.modeling.packing import choose_packing
from fastdpo.modeling.scoring import score_pairs
from tests.modeling.test_packed_pairs import (
    FAMILIES,
    SIZES,
    assert_same,
    gradients,
    model_of,
    packed,
    random_groups,
    separate,
)

STATE = {"vocab_size": 131, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
UNPACKED = {
    "mamba": MambaConfig(**STATE),
    "jamba": JambaConfig(
        **SIZES, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2,
        num_experts_per_tok=1, mamba_d_state=4, use_mamba_kernels=False,
    ),
    "recurrent-gemma": RecurrentGemmaConfig(
        **SIZES | {"num_hidden_layers": 3}, lru_width=32, attention_window_size=9
    ),
    "falcon": FalconConfig(**SIZES | {"num_key_value_heads": 4}),
    "bloom": BloomConfig(vocab_size=131, hidden_size=32, n_layer=2, n_head=4),
    "doge": DogeConfig(**SIZES),
}  # fmt: skip


def unpacked_model(family):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(UNPACKED[family])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("family", UNPACKED)
def test_unpackable_families_run_padded_and_exact(family):
    model, groups = unpacked_model(family), random_groups(3)
    mode = choose_packing(model)
    assert (mode.packing, mode.shared_prefix, mode.attention) == (False, False, MODEL_ATTENTION)
    assert model.config.model_type in mode.describe()
    assert_same(packed(model, groups), separate(model, groups))


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_packing_them_all_the_same_would_be_wrong(family, monkeypatch):
    """The obstacle is real: without it the log-probs differ, or the passes refuse."""
    model, groups = unpacked_model(family), random_groups(3)
    truth, _ = separate(model, groups)
    monkeypatch.setattr(packing, "why_not_packable", lambda _: "")
    try:
        found, _ = packed(model, groups)
    except (ValueError, TypeError):
        return
    errors = [np.abs(np.array(a) - b).max() for a, b in zip(found, truth, strict=True)]
    assert max(errors) > 0.01, max(errors)


def probed(model, groups):
    """Per group and completion, the log-prob of every token."""
    with torch.no_grad():
        scored = score_pairs(model, groups, ExecutionLayout(256))
    ends = np.cumsum(scored.tokens.reshape(-1))[:-1]
    return np.split(scored.token_logps.numpy(), ends)


ALL = [*FAMILIES, *UNPACKED]


@pytest.mark.parametrize("family", ALL)
def test_the_future_and_the_rejected_change_nothing(family):
    """Other tokens after a place, or in the other completion, leave it as it is.

    To rounding: with experts they change how many rows a product has, and a BLAS may round so.
    """

    def alike(one, other):
        return np.allclose(one, other, rtol=0, atol=2e-5)

    model = (model_of if family in FAMILIES else unpacked_model)(family)
    draw = np.random.default_rng(4)
    prompt, chosen, rejected = (draw.integers(5, 131, n).astype(np.int32) for n in (13, 11, 14))
    rejected[0] = (chosen[0] + 1) % 131  # nothing shared beyond the prompt, before and after
    late = chosen.copy()
    late[6:] = (late[6:] + 40) % 131
    other = (rejected + 50) % 131
    other[0] = rejected[0]
    plain = probed(model, [PromptGroup(prompt, (chosen, rejected))])
    changed = probed(model, [PromptGroup(prompt, (chosen, other))])
    assert alike(plain[0], changed[0]), "chosen depends on rejected"
    assert not alike(plain[1], changed[1])
    future = probed(model, [PromptGroup(prompt, (late, rejected))])
    assert alike(plain[0][:6], future[0][:6]), "the past depends on the future"
    assert not alike(plain[0][6:], future[0][6:])
    assert alike(plain[1], future[1]), "rejected depends on chosen"


def test_packable_families_say_nothing_and_options_are_followed():
    model = model_of("llama")
    assert (
        choose_packing(model).describe()
        == "Pairs run in packed sequences, each prompt computed once."
    )
    assert not choose_packing(model, shared_prefix="off").shared_prefix
    off = choose_packing(model, packing="off", attention="sdpa")
    assert (off.packing, off.attention) == (False, "sdpa")
    assert "--packing is off" in off.describe()
    with pytest.raises(ValueError, match="--attention varlen is for packed sequences"):
        choose_packing(unpacked_model("mamba"), attention="varlen")


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
        Gemma3TextConfig(**SIZES, head_dim=16, use_bidirectional_attention=True),
    ],
)
def test_models_that_look_ahead_are_refused(config):
    with pytest.raises(ValueError, match="decoder-only causal LM"):
        choose_packing(AutoModelForCausalLM.from_config(config))


def test_a_layer_that_does_not_attend_through_ours_is_found(monkeypatch):
    monkeypatch.setattr(packing, "why_not_packable", lambda _: "")
    with pytest.raises(ValueError, match="in 1 of its 2 layers"):
        packed(unpacked_model("jamba"), random_groups(1))


def test_packed_rows_outside_the_switch_are_refused():
    model = model_of("llama")
    (micro_batch,) = pack_update(random_groups(1), 512)
    with pytest.raises(ValueError, match="packed_attention"):
        packed_logprobs(model, micro_batch)


def test_rows_that_change_the_rotary_frequencies_of_others_are_refused():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(**SIZES, rope_parameters=rope, original_max_position_embeddings=16)
    model = AutoModelForCausalLM.from_config(config)
    groups = random_groups(9)
    lengths = [len(g.prompt_ids) + max(map(len, g.completions)) - 1 for g in groups]
    short = [group for group, length in zip(groups, lengths, strict=True) if length <= 16]
    long = [group for group, length in zip(groups, lengths, strict=True) if length > 16]
    assert_same(packed(model, short), separate(model, short))
    with pytest.raises(ValueError, match=r"beyond the 16 up to which phi3's.*--max_length 16"):
        packed(model, long)
    assert rotary_limit(model_of("llama").config) is None


def test_a_window_that_is_not_handed_on_is_found(monkeypatch):
    config = PhimoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=9)
    model = AutoModelForCausalLM.from_config(config)
    assert not choose_packing(model).packing
    monkeypatch.setattr(packing, "why_not_packable", lambda _: "")
    with pytest.raises(ValueError, match="a window that it does not hand on"):
        packed(model, random_groups(1))


def test_rwkv_is_refused_by_name():
    model = AutoModelForCausalLM.from_config(
        RwkvConfig(vocab_size=131, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2)
    )
    with pytest.raises(ValueError, match="rwkv's config has rescale_every"):
        packed(model, random_groups(1))


# The routers' loss


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss"])
@pytest.mark.parametrize("layout", [{}, {"shared_prefix": False}, {"packing": False}])
def test_aux_loss_is_the_models_own_over_real_tokens(family, layout):
    model, (group, *_) = model_of(family), random_groups(1)
    group = PromptGroup(
        group.prompt_ids, group.completions[:1]
    )  # one row: the model's own is defined
    ids = np.concatenate([group.prompt_ids, group.completions[0][:-1]])
    wanted = model(torch.from_numpy(ids).long()[None], output_router_logits=True).aux_loss
    wanted.backward()
    truth = gradients(model)
    model.zero_grad()
    (micro_batch,) = pack_update([group], 512, **layout)
    assert micro_batch.num_tokens < micro_batch.input_ids.numel(), "there is filler"
    with packed_attention(model.config):
        found = packed_logprobs(model, micro_batch, aux_loss=True).aux_loss
        found.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, truth[name], rtol=1e-4, atol=1e-7), name


def test_aux_loss_counts_a_shared_prompt_once():
    model, groups = model_of("qwen3-moe").train(), random_groups(3)
    model.gradient_checkpointing_enable()
    (micro_batch,) = pack_update(groups, 1024)
    seen = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _m, _i, out: seen.append(out[0].detach()))
        for layer in model.model.layers
    ]
    with packed_attention(model.config):
        found = packed_logprobs(model, micro_batch, aux_loss=True).aux_loss
    for hook in hooks:
        hook.remove()
    real = tuple(logits[: micro_batch.num_tokens] for logits in seen)
    assert found.item() == pytest.approx(load_balancing_loss_func(real, 4, 2).item(), rel=1e-6)


def test_load_balancing_loss_against_transformers():
    draw = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(40, 8, generator=draw).requires_grad_() for _ in range(3))
    real = torch.rand(40, generator=draw) > 0.3
    ours = load_balancing_loss(logits, real, 2)
    theirs = load_balancing_loss_func(logits, 8, 2, attention_mask=real.long()[None])
    assert torch.allclose(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-7)
    even = (torch.zeros(16, 8), torch.zeros(16, 8))
    assert load_balancing_loss(even, torch.ones(16, dtype=torch.bool), 2).item() == 2.0


def test_aux_loss_without_routers_is_refused():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    (micro_batch,) = pack_update(random_groups(1), 512)
    with packed_attention(model.config), pytest.raises(ValueError, match="no router logits"):
        packed_logprobs(model, micro_batch, aux_loss=True)
