"""The peculiarities of model families: one table, read by every room.

`Family`'s defaults are the names and shapes that transformers' families share. A family that
differs has an entry in `FAMILIES` under its config's `model_type`, and a new quirk is one edit
there. Everything is read from configs and module names: no model code is imported, so the planner
reads the same table as the passes and stays quick.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class FusedForms:
    """How the ops of `fastdpo_kernels` compute a family's layer as transformers does.

    Attributes:
        prefix: how the names of its classes in transformers begin, as in LlamaMLP.
        norm_class: how the name of its norms' class goes on.
        norm: where its norms round: a form of `rms_norm`.
        centered: whether its norms subtract the mean.
        interleaved: whether the rotary embedding turns neighbors, with products in fp32.
        norm_after_sum: the norm that reads the residual sum after attention; "" where none does.
        after_attention: modules that its output passes before that sum.
        after_mlp: modules that the MLP's output passes before the second sum.
    """

    prefix: str
    norm_class: str = "RMSNorm"
    norm: str = "llama"
    centered: bool = False
    interleaved: bool = False
    norm_after_sum: str = "post_attention_layernorm"
    after_attention: tuple[str, ...] = ()
    after_mlp: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """How a family names what the trainer must know, and what it does differently.

    Attributes:
        packing_obstacle: why sequences in one packed sequence would change each other although the
            layers are of kinds that do not; completes a sentence that begins with the family's
            name.
        logit_multipliers: config fields, each a factor on the logits.
        logit_divisors: config fields that the logits are divided by.
        logit_softcaps: config fields of a cap c, logits being c * tanh(logits / c).
        attention_softcap: config field of the same cap on attention scores.
        attention_sinks: whether each head has one more key, of value 0, that takes weight.
        experts_per_token: config fields of how many experts a router chooses for a token; the
            first that is set counts.
        gated_mlps: names of the linear layers inside an MLP, as attributes of its module, the
            layer back to H last; several where the two layers up may be one matrix.
        attention_linears: names of the linear layers of an attention module.
        norm_suffix: how the class names of norms end.
        state_layers: how the class names of layers end that carry a state along the sequence, which
            forks where a prefix ends; "" where there are none, or sequences have to be padded.
        unadapted_linears: names of linear layers that take no adapter: a kernel reads their weight
            without calling them, so that none would be trained, or they return more than a product.
        fused: how the fused ops compute its layers; None leaves them to transformers.
    """

    packing_obstacle: str = ""
    logit_multipliers: tuple[str, ...] = (
        "logit_scale",  # Cohere
        "lm_head_multiplier",  # Falcon-H1
        "output_multiplier",  # Muse
    )
    logit_divisors: tuple[str, ...] = ("logits_scaling",)  # Granite
    logit_softcaps: tuple[str, ...] = (
        "final_logit_softcapping",  # Gemma
        "logits_soft_cap",  # RecurrentGemma
    )
    attention_softcap: str = "attn_logit_softcapping"
    attention_sinks: bool = False
    experts_per_token: tuple[str, ...] = (
        "num_experts_per_tok",
        "top_k_experts",
        "moe_topk",
        "moe_top_k",
        "num_experts_per_token",
    )
    gated_mlps: tuple[tuple[str, ...], ...] = (
        ("gate_proj", "up_proj", "down_proj"),
        ("gate_up_proj", "down_proj"),
    )
    attention_linears: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    norm_suffix: str = "Norm"
    state_layers: str = ""
    unadapted_linears: tuple[str, ...] = ()
    fused: FusedForms | None = None


USUAL = Family()

_MAMBA: dict[str, Any] = {"unadapted_linears": ("out_proj", "conv1d")}
_DELTA = Family(state_layers="GatedDeltaNet")
_CONVOLVED = Family(state_layers="ShortConv")

_SANDWICH: dict[str, Any] = {
    "norm": "gemma",
    "norm_after_sum": "pre_feedforward_layernorm",
    "after_attention": ("post_attention_layernorm",),
    "after_mlp": ("post_feedforward_layernorm",),
}

FAMILIES = {
    **dict.fromkeys(("falcon_mamba", "mamba"), Family(**_MAMBA)),
    **dict.fromkeys(("falcon_h1", "mamba2", "nemotron_h"), Family(state_layers="Mixer", **_MAMBA)),
    **dict.fromkeys(("bamba", "zamba2"), Family(state_layers="Mixer")),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _DELTA),
    **dict.fromkeys(("olmo_hybrid", "lara_mini"), _DELTA),
    **dict.fromkeys(("kimi_linear", "bailing_hybrid"), Family(state_layers="DeltaAttention")),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), _CONVOLVED),
    "granitemoehybrid": Family(state_layers="MambaLayer"),
    "cohere": Family(
        fused=FusedForms(
            "Cohere", "LayerNorm", "olmo2", centered=True, interleaved=True, norm_after_sum=""
        )
    ),
    "gemma": Family(fused=FusedForms("Gemma", norm="gemma")),
    "gemma2": Family(fused=FusedForms("Gemma2", **_SANDWICH)),
    "gemma3_text": Family(fused=FusedForms("Gemma3", **_SANDWICH)),
    "llama": Family(fused=FusedForms("Llama")),
    "mistral": Family(fused=FusedForms("Mistral")),
    "olmo2": Family(fused=FusedForms("Olmo2", norm="olmo2", norm_after_sum="")),
    "phi3": Family(
        fused=FusedForms(
            "Phi3", after_attention=("resid_attn_dropout",), after_mlp=("resid_mlp_dropout",)
        )
    ),
    "qwen2": Family(fused=FusedForms("Qwen2")),
    "qwen3": Family(fused=FusedForms("Qwen3")),
    "doge": Family(packing_obstacle="attends with a mask that it computes from its values"),
    "gpt_oss": Family(attention_sinks=True),
    "granite_swa": Family(attention_sinks=True),
    "granitemoe_swa": Family(attention_sinks=True),
    # It multiplies by the field that Granite divides by.
    "hyperclovax": Family(
        logit_multipliers=(*USUAL.logit_multipliers, *USUAL.logit_divisors), logit_divisors=()
    ),
    "llama4_text": Family(
        packing_obstacle="scales its queries by their place in the whole sequence",
        unadapted_linears=("router",),
    ),
    "nemotron": Family(packing_obstacle="does not hand arguments on to its attention"),
    "phimoe": Family(packing_obstacle="has a window that it does not hand on to its attention"),
}
"""The families that differ from `Family`'s defaults, by `model_type`."""

PACKABLE_LAYERS = ("full_attention", "sliding_attention")
"""The layer types, in transformers' words, in which tokens meet in our attention alone."""

LAYER_OBSTACLES = {
    "linear_attention": "linear attention or a state space",
    "conv": "convolutions",
    "hybrid": "a state space beside the attention",
    "hybrid_sliding": "a state space beside the attention",
    "chunked_attention": "attention in fixed chunks of positions",
}
"""Other layer types in words, for the log; an unknown one is named as transformers names it."""

FORKED_LAYERS = ("linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "moe", "mlp")
"""The further layer types of families whose layers with a state fork it."""

UNRELATED_CONFIG_KEYS = {
    "attn_logit_softcapping",  # inside the attention, which applies it
    "rope_scaling",
    "scale_attention_softmax_in_fp32",
    "scale_attn_by_inverse_layer_idx",
    "scale_attn_weights",
    "scale_embedding",
    "scale_fmt",
    "query_pre_attn_scalar",
    "w_init_variance_scale",
    "final_w_init_variance_scale",
    "residual_multiplier",
    "attention_multiplier",
    "embedding_multiplier",
    "output_router_logits",
    "router_logits",
    "routed_scaling_factor",  # of the experts' sum, inside the layer
    "router_scaling_factor",
    "attention_value_scale",
    "attn_scale",  # of the queries, by their position
    "floor_scale",
}
"""Config fields that look as if they scaled the logits and do not, in any family."""


def family_of(config: "PreTrainedConfig") -> Family:
    """The family of a model's text config: its entry in `FAMILIES`, or the defaults."""
    return FAMILIES.get(config.model_type, USUAL)


def packing_obstacle(config: "PreTrainedConfig") -> str:
    """Why sequences packed into one would change each other, by the text config; or nothing."""
    name = config.model_type
    forks = bool(family_of(config).state_layers)
    kinds = getattr(config, "layer_types", None) or ()
    strange = [kind for kind in kinds if not _packs(kind, forks=forks)]
    if strange:
        words = dict.fromkeys(LAYER_OBSTACLES.get(kind, kind) for kind in strange)
        return (
            f"{name} has layers of {' and '.join(words)}, which run on from one sequence into the "
            "next"
        )
    obstacle = family_of(config).packing_obstacle
    return f"{name} {obstacle}" if obstacle else ""


def _packs(layer_type: str, *, forks: bool) -> bool:
    return layer_type in PACKABLE_LAYERS or (forks and layer_type in FORKED_LAYERS)


def mixing_layers(config: "PreTrainedConfig") -> int:
    """How many of the layers let tokens meet: all but those of an MLP alone."""
    kinds = getattr(config, "layer_types", None) or ()
    return config.num_hidden_layers - sum(kind in ("moe", "mlp") for kind in kinds)


def logit_scale(config: "PreTrainedConfig") -> float:
    """The factor between a model's head and its logits.

    Raises:
        ValueError: the text config has a field that may scale the logits and is not in the table.
    """
    family = family_of(config)
    known = {*family.logit_multipliers, *family.logit_divisors, *family.logit_softcaps}
    for name, value in config.to_dict().items():
        looks_like_it = "logit" in name or "scal" in name or name.endswith("multiplier")
        listed = name in known or name in UNRELATED_CONFIG_KEYS
        if looks_like_it and not listed and value not in (None, False, 1, 1.0):
            raise ValueError(
                f"{config.model_type}'s config has {name}={value}, which may change the logits in "
                "a way that fastdpo does not know: the log-probs could be wrong. Choose another "
                "model, or file an issue."
            )
    scale = 1.0
    for name in family.logit_multipliers:
        scale *= getattr(config, name, None) or 1.0
    for name in family.logit_divisors:
        scale /= getattr(config, name, None) or 1.0
    return scale


def logit_softcap(config: "PreTrainedConfig") -> float | None:
    """The cap on a model's logits, or None."""
    return _first_set(config, family_of(config).logit_softcaps)


def attention_softcap(config: "PreTrainedConfig") -> float | None:
    """The cap on a model's attention scores, or None."""
    return getattr(config, family_of(config).attention_softcap, None)


def experts_per_token(config: "PreTrainedConfig") -> int | None:
    """How many experts a router chooses for a token, None for a model without routers."""
    return _first_set(config, family_of(config).experts_per_token)


def _first_set(config: "PreTrainedConfig", names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None))), None)


def config_value(config: "PreTrainedConfig", name: str) -> Any:
    """A field of a text config, None where it has none, the largest where its layers differ."""
    if getattr(config, "is_heterogeneous", False):
        values = [getattr(layer, name, None) for layer in config.per_layer_config]
        return max((value for value in values if value is not None), default=None)
    return getattr(config, name, None)


def head_dims(config: "PreTrainedConfig") -> tuple[int, int]:
    """Entries of one head's queries and keys, and of its values; the largest of all layers.

    Both are 0 in a model without attention.
    """
    if getattr(config, "is_heterogeneous", False):  # as Gemma 4: full layers have larger heads
        return max(head_dims(layer) for layer in config.per_layer_config)
    value_dim = getattr(config, "v_head_dim", None)
    rotary_dim = getattr(config, "qk_rope_head_dim", None)
    if value_dim and rotary_dim:  # latent attention: a rotary part beside one without positions
        return config.qk_nope_head_dim + rotary_dim, value_dim
    size = getattr(config, "head_dim", None)
    if not size and (heads := getattr(config, "num_attention_heads", None)):
        size = config.hidden_size // heads
    return size or 0, value_dim or size or 0


def masked_window(config: "PreTrainedConfig | None") -> int | None:
    """The window that a model applies by its masks alone, or None; without a config None."""
    types = getattr(config, "layer_types", None)
    sliding = types is None or "sliding_attention" in types
    return getattr(config, "sliding_window", None) if sliding else None


def rotary_limit(config: "PreTrainedConfig") -> int | None:
    """The longest sequence whose rotary frequencies do not depend on the longest of the pass.

    Dynamic and long RoPE switch all sequences of a pass at once when one is longer than what the
    model was first trained on, so a log-prob would depend on neighbours.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    limits = [
        each.get("original_max_position_embeddings") or config.max_position_embeddings
        for each in ([parameters] if "rope_type" in parameters else by_layer_type)
        if each.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)


def is_gated_mlp(module: nn.Module, family: Family) -> bool:
    """Tell whether a module is a gated MLP of this family, by its linear layers."""
    return any(
        all(isinstance(getattr(module, name, None), nn.Module) for name in names)
        for names in family.gated_mlps
    )


def is_norm(module: nn.Module, family: Family) -> bool:
    """Tell whether a module is a norm with one weight for each entry of the last axis."""
    weight = getattr(module, "weight", None)
    named = type(module).__name__.endswith(family.norm_suffix)
    return named and isinstance(weight, nn.Parameter) and weight.ndim == 1
