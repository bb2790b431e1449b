"""Layers with a state over packed pairs: prefixes run once, suffixes from forks of the state."""

import inspect

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    CONFIG_MAPPING,
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
from fastdpo.modeling import packing, state_forks
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

LATENT = {
    "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "num_key_value_heads": 4, "layer_types": DELTA["layer_types"],
    "mlp_layer_types": ["dense", "sparse"], "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1,
}  # fmt: skip
NEWER = {
    "kimi_linear": LATENT | {"linear_head_dim": 8, "linear_num_heads": 2},
    "bailing_hybrid": LATENT | {"head_dim": 8},
    "lfm3": {"layer_types": ["conv", "sliding_attention"], "sliding_window": 9, "head_dim": 8},
    "lara_mini": DELTA | {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
}  # fmt: skip
"""Families that not every supported release of transformers has, by `model_type`."""

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
} | {
    name: CONFIG_MAPPING[name](**SIZES | values)
    for name, values in NEWER.items()
    if name in CONFIG_MAPPING
}  # fmt: skip
ROUNDING = {"bailing_hybrid": 1e-4}
"""Bounds wider than 1e-5: with all of Bailing's code in fp64 its gradients agree to 2e-14, in fp32
those of its decay are sums in which most cancels."""


def forking_model(family, std=0.15):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(FORKED[family])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    reason = choose_packing(model).reason
    if reason and Version(transformers.__version__) < Version("5.22"):
        pytest.skip(reason)
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
    assert_same(packed(model, groups), truth, ROUNDING.get(family, 1e-5))
    assert any(isinstance(module, ForkingLayer) for module in get_backbone(model).modules())
    assert choose_packing(model) == mode


def of_lengths(prompt, *completions):
    draw = np.random.default_rng(prompt)
    ids = [draw.integers(5, 131, count).astype(np.int32) for count in (prompt, *completions)]
    for number, completion in enumerate(ids[1:]):  # nothing is shared beyond the prompt
        completion[0] = 10 + number
    return PromptGroup(ids[0], tuple(ids[1:]))


@pytest.mark.parametrize("family", FORKED)
def test_prefixes_and_suffixes_of_every_length(family):
    """Prefixes shorter than the convolution's kernel, suffixes of one token; one and four."""
    model = forking_model(family)
    groups = [of_lengths(n, 5, 1) for n in (1, 2, 3, 4, 70)]
    groups += [of_lengths(9, 2), of_lengths(3, 1, 2, 3, 40)]
    truth, bound = separate(model, groups), ROUNDING.get(family, 1e-5)
    assert_same(packed(model, groups, tokens=512), truth, bound)
    assert_same(packed(model, groups, tokens=512, shared_prefix=False), truth, bound)
    assert_same(packed(model, groups, tokens=512, packing=False), truth, bound)


@pytest.mark.parametrize("family", FORKED)
def test_bits_of_chosen_stay_whatever_rejected_says(family):
    """On one thread, so that products are split in one way."""
    model = forking_model(family).eval()
    first, second = of_lengths(13, 11, 14), of_lengths(70, 30, 20)
    draw = np.random.default_rng(5)

    def logps(groups):
        (micro_batch,) = pack_update(groups, 512)
        with torch.no_grad(), packed_attention(model.config):
            return packed_logprobs(model, micro_batch).logps.view(-1, 2)

    def other(group):
        said, rejected = group.completions[0], group.completions[1].copy()
        rejected[1:] = draw.integers(5, 131, len(rejected) - 1)
        return PromptGroup(group.prompt_ids, (said, rejected))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        before, after = logps([first, second]), logps([other(first), other(second)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(after[:, 0], before[:, 0])
    assert (after[:, 1] != before[:, 1]).all()


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


# Kernels that take sequences one after another


def in_place_of_a_kernel(torch_form, calls):
    """As flash-linear-attention's: a single row, `cu_seqlens`, a state for each sequence."""

    def kernel(
        q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False, cu_seqlens=None,
    ):  # fmt: skip
        assert scale is None
        assert output_final_state
        assert {len(tensor) for tensor in (q, k, v, g, beta)} == {1}
        lengths = cu_seqlens.diff().tolist()
        assert min(lengths) > 0
        assert initial_state is None or len(initial_state) == len(lengths)
        calls.append((lengths, initial_state is not None))
        outputs, states = [], []
        split = (tensor.split(lengths, 1) for tensor in (q, k, v, g, beta))
        for number, parts in enumerate(zip(*split, strict=True)):
            out, state = torch_form(
                *parts,
                initial_state=None if initial_state is None else initial_state[number][None],
                output_final_state=True,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            )
            outputs.append(out)
            states.append(state)
        return torch.cat(outputs, 1), torch.cat(states)

    return kernel


def put_kernel(monkeypatch, model, calls):
    layer = next(layer for layer in state_forks.state_layers(get_backbone(model)))
    own = inspect.getmodule(inspect.unwrap(type(layer).forward))
    for name, scan in state_forks.SCANS.items():
        if scan.varlen and hasattr(own, name):
            torch_form = inspect.unwrap(getattr(own, name))
            monkeypatch.setattr(own, name, in_place_of_a_kernel(torch_form, calls))
    monkeypatch.setattr(state_forks, "runs_kernel", lambda package, *_: package == "fla")


@pytest.mark.parametrize(
    "family", [name for name in ("qwen3.5", "olmo-hybrid", "kimi_linear") if name in FORKED]
)
@pytest.mark.parametrize("shared", [True, False])
def test_a_kernel_runs_all_prefixes_and_then_all_suffixes(monkeypatch, family, shared):
    model, calls = forking_model(family), []
    groups = [of_lengths(n, 5, 1) for n in (1, 3, 70)] + [of_lengths(3, 1, 2, 3, 40)]
    truth = separate(model, groups)
    put_kernel(monkeypatch, model, calls)
    assert_same(packed(model, groups, tokens=512, shared_prefix=shared), truth)
    (starts, first), *others = calls
    assert not first
    if shared:
        ((suffixes, started),) = others
        assert started
        assert starts[:4] == [1, 3, 70, 3], "then there is filler"
        assert suffixes == [4, 4, 4, 1, 2, 39]
    else:
        assert not others, "nothing goes on from a state"


def test_their_own_forward_stays_as_it_was():
    model = forking_model("qwen3.5")
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
        score_pairs(model, random_groups(1), ExecutionLayout(256))
        assert torch.allclose(model(ids).logits, before, atol=1e-5)
        generated = model.generate(ids[:, :7], max_new_tokens=5, do_sample=False)
    assert generated.shape == (1, 12)


def test_layers_that_call_no_function_of_the_table_run_padded(monkeypatch):
    """As in earlier releases of transformers."""
    model = forking_model("qwen3.5")
    layer = next(m for m in model.modules() if type(m).__name__.endswith("GatedDeltaNet"))

    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        return hidden_states

    monkeypatch.setattr(type(layer), "forward", forward)
    mode = choose_packing(model)
    assert not mode.packing
    assert "in this release of transformers" in mode.describe()


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


def test_llama_has_none():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    assert not has_routers(model)
