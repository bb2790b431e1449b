"""The routers' loss of every family of transformers whose config carries a weight for it."""

import contextlib

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastdpo.batching import pack_update
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.logprobs import packed_logprobs
from fastdpo.modeling.moe import aux_loss_coef, has_routers
from fastdpo.modeling.packing import choose_packing
from tests.modeling.test_packed_pairs import SIZES, random_groups

SMALL = SIZES | {
    "head_dim": 8, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "n_group": 1, "topk_group": 1, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": None, "mlp_layer_types": None,
}  # fmt: skip
"""What makes a config of any family small, as far as it has these fields."""

LARGE = ("deepseek_v4",)
"""Families that these fields do not make small; they have no routers' loss."""


def configs():
    """Every config of a causal LM that carries a weight for the routers' loss, by `model_type`."""
    found = {}
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        # Some cannot be built of nothing: several towers, or one that another model is given.
        with contextlib.suppress(ValueError, StrictDataclassError):
            usual = CONFIG_MAPPING[name]().get_text_config()
            if hasattr(usual, "router_aux_loss_coef") and name not in LARGE:
                found[usual.model_type] = type(usual)
    return found


CONFIGS = configs()


def test_the_walk_finds_the_families():
    wanted = {"qwen3_next", "qwen3_5_moe_text", "granitemoehybrid", "mixtral", "qwen3_moe", "doge"}
    assert wanted <= set(CONFIGS)
    assert len(CONFIGS) >= 20


@pytest.mark.parametrize("family", CONFIGS)
def test_a_weight_that_nobody_passed_is_never_refused(family):
    """It counts where there are routers, and these give their logits."""
    known = CONFIGS[family]().to_dict() | CONFIGS[family].attribute_map
    config = CONFIGS[family](**{name: value for name, value in SMALL.items() if name in known})
    model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    coef = aux_loss_coef(model, None)
    assert coef == (config.router_aux_loss_coef if has_routers(model) else 0.0)
    if not coef:
        return
    mode = choose_packing(model)
    layout = {"packing": mode.packing, "shared_prefix": mode.shared_prefix}
    (micro_batch,) = pack_update(random_groups(1), 512, **layout)
    with packed_attention(model.config, mode.attention):
        assert packed_logprobs(model, micro_batch, aux_loss=True).aux_loss.isfinite()
