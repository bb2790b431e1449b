"""Packed groups against separate sequences: log-probs and every parameter's gradient."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from fastdpo.batching import PromptGroup, pack_update
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.logprobs import packed_logprobs
from fastdpo.modeling.packing import choose_packing

SIZES = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
ALTERNATING = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied-biased": LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True),
    "mistral-window": MistralConfig(**SIZES, sliding_window=9, head_dim=16),
    "mixtral": MixtralConfig(**SIZES, **EXPERTS),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False),
    "qwen3-moe": Qwen3MoeConfig(
        **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "gemma": GemmaConfig(**SIZES, head_dim=16),
    "gemma2": Gemma2Config(
        **SIZES, **ALTERNATING, head_dim=16, final_logit_softcapping=3.0,
        attn_logit_softcapping=5.0, query_pre_attn_scalar=16,
    ),
    "gemma3": Gemma3TextConfig(**SIZES, **ALTERNATING, head_dim=16),
    "phi3": Phi3Config(**SIZES, sliding_window=9),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
    "cohere2": Cohere2Config(**SIZES, **ALTERNATING, logit_scale=0.25),
    "granite": GraniteConfig(**SIZES, logits_scaling=2.0),
    "gpt-oss": GptOssConfig(**SIZES, **ALTERNATING, **EXPERTS, head_dim=16),
    "smollm3": SmolLM3Config(**SIZES, no_rope_layers=[1, 0]),
    "olmo2": Olmo2Config(**SIZES),
    "olmo3": Olmo3Config(**SIZES, **ALTERNATING),
    "glm4": Glm4Config(**SIZES, head_dim=16),
}  # fmt: skip
WITHOUT_SDPA = ("gemma2", "gpt-oss")  # transformers' knows neither capped scores nor sinks


def model_of(family):
    torch.manual_seed(3)
    config = FAMILIES[family]
    attention = "eager" if family in WITHOUT_SDPA else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():  # norms and biases away from their trivial values
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def random_groups(count=7, completions=2, seed=0):
    draw = np.random.default_rng(seed)

    def ids(low, high):
        return draw.integers(5, 131, draw.integers(low, high)).astype(np.int32)

    groups = [
        PromptGroup(ids(1, 20), tuple(ids(1, 16) for _ in range(completions))) for _ in range(count)
    ]
    begins_alike, prompt = ids(6, 7), ids(4, 5)
    # Completions that begin alike; one that is the beginning of the other; equal ones.
    tails = [ids(3, 9) for _ in range(completions)]
    groups.append(
        PromptGroup(prompt, tuple(np.concatenate([begins_alike, tail]) for tail in tails))
    )
    groups.append(
        PromptGroup(prompt, (begins_alike, *[np.concatenate([begins_alike, t]) for t in tails[1:]]))
    )
    groups.append(PromptGroup(ids(1, 2), (begins_alike,) * completions))
    return groups


def weights_of(groups):
    draw = np.random.default_rng(9)
    return [torch.from_numpy(draw.uniform(-1, 1, len(g.completions))) for g in groups]


def separate(model, groups):
    """Log-probs and gradients of each sequence on its own through the model's own forward."""
    model.zero_grad()
    found = []
    for group, weights in zip(groups, weights_of(groups), strict=True):
        row = []
        for completion, weight in zip(group.completions, weights, strict=True):
            ids = torch.from_numpy(np.concatenate([group.prompt_ids, completion])).long()[None]
            logits = model(ids, use_cache=False).logits[0, len(group.prompt_ids) - 1 : -1]
            targets = torch.from_numpy(completion).long()
            logps = torch.log_softmax(logits.double(), dim=-1).gather(1, targets[:, None]).sum()
            (logps * weight).backward()
            row.append(logps.item())
        found.append(row)
    return found, gradients(model)


def packed(model, groups, tokens=160, **layout):
    """The same by `pack_update` with the layout of `choose_packing`, or a requested one."""
    model.zero_grad()
    weights = weights_of(groups)
    found = [None] * len(groups)
    mode = choose_packing(model)
    chosen = {"packing": mode.packing, "shared_prefix": mode.shared_prefix}
    micro_batches = pack_update(groups, tokens, **chosen | layout)
    with packed_attention(model.config, mode.attention):
        for micro_batch in micro_batches:
            logps = packed_logprobs(model, micro_batch).logps
            (logps * torch.cat([weights[i] for i in micro_batch.group_indices])).sum().backward()
            rows = logps.detach().split(
                [len(groups[i].completions) for i in micro_batch.group_indices]
            )
            for index, row in zip(micro_batch.group_indices, rows, strict=True):
                found[index] = row.tolist()
    return found, gradients(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first, second, bound=1e-5):
    for a, b in zip(first[0], second[0], strict=True):
        assert np.abs(np.array(a) - b).max() <= bound * np.abs(b).max() + 1e-6
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        error = (gradient - second[1][name]).norm() / second[1][name].norm().clamp_min(1e-12)
        assert error <= bound, f"gradient of {name} is off by {error:.1e} relative"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_separate_sequences(family, checkpointing):
    model, groups = model_of(family), random_groups()
    truth = separate(model, groups)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    before = model.config._attn_implementation
    assert_same(packed(model, groups), truth)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "gpt-oss"])
def test_unshared_padded_and_more_completions(family):
    model, groups = model_of(family), random_groups(count=3, completions=4)
    truth = separate(model, groups)
    assert_same(packed(model, groups), truth)
    assert_same(packed(model, groups, shared_prefix=False), truth)
    assert_same(packed(model, groups, packing=False), truth)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gpt-oss"])
def test_groups_of_one_list_joined(family):
    model, groups = model_of(family), random_groups(count=5)
    same = [PromptGroup(groups[i % 2].prompt_ids, g.completions) for i, g in enumerate(groups)]
    lists = [i % 2 for i in range(len(groups))]
    truth = separate(model, same)
    assert_same(packed(model, same, tokens=512, lists=lists), truth)
    (joined,) = pack_update(same, 4096, lists=lists)
    (alone,) = pack_update(same, 4096)
    assert joined.num_tokens < alone.num_tokens


def test_order_size_and_sides_change_nothing_beyond_rounding():
    model, groups = model_of("llama"), random_groups()
    logps, grads = packed(model, groups)
    for tokens in (128, 384, 4096):
        assert_same(packed(model, groups, tokens=tokens), (logps, grads))
    order = np.random.default_rng(1).permutation(len(groups))
    mixed, _ = packed(model, [groups[i] for i in order])
    assert_same((mixed, {}), ([logps[i] for i in order], {}))
    swapped, _ = packed(model, [PromptGroup(g.prompt_ids, g.completions[::-1]) for g in groups])
    assert_same((swapped, {}), ([row[::-1] for row in logps], {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_do_not_depend_on_place_or_neighbours(dtype):
    model, groups = model_of("llama").to(dtype), random_groups(count=12)
    whole, _ = packed(model, groups, tokens=512)
    reordered, _ = packed(model, groups[::-1], tokens=256)
    assert reordered[::-1] == whole, "bits differ with place, neighbours or T"
    alone = [packed(model, [group], tokens=128)[0][0] for group in groups]
    assert alone == whole, "bits differ without neighbours"


def test_without_segments_the_attention_refuses():
    model = model_of("llama")
    with packed_attention(model.config), pytest.raises(ValueError, match="packed_attention"):
        model(torch.ones(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generation_from_a_padded_batch_between_packed_passes(family):
    model, groups = model_of(family), random_groups(count=2)
    ids = torch.randint(5, 131, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    before = model_of(family).eval().generate(ids, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):  # as a callback of a run does: an update, a sample, an update
        packed(model.train(), groups)
        optimizer.step()
        assert torch.equal(model.eval().generate(ids, **options), before)
    with packed_attention(model.config), pytest.raises(ValueError, match="own attention in place"):
        model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), before)
