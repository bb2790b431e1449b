"""The head: how a model's own forward forms its logits from the last hidden states."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Config names of a factor on the logits (Cohere, Falcon-H1, Muse)."""

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Config names of a cap on the logits (Gemma, RecurrentGemma)."""

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
}
"""Config names that look as if they touched the logits and do not."""


@dataclass(frozen=True)
class Head:
    """What stands between the last hidden state and the logits."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    softcap: float | None
    logit_scale: float


def unwrap_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PeftModel, or the model itself."""
    inside: Any = getattr(model, "get_base_model", None)  # without peft, which imports for seconds
    return model if inside is None else inside()  # pyrefly: ignore


def get_lm_head(model: nn.Module) -> Head:
    """Read the head of a causal LM.

    Raises:
        ValueError: the head is something this trainer would compute wrongly: an adapter on it, a
            quantized one, or a config field that scales logits in a way it does not know.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    causal_lm = unwrap_model(model)
    lm_head = causal_lm.get_output_embeddings()
    if lm_head is None:
        raise ValueError(
            f"{type(causal_lm).__name__} has no output embeddings: load the model with "
            "AutoModelForCausalLM."
        )
    if isinstance(lm_head, BaseTunerLayer | AuxiliaryTrainingWrapper):
        raise ValueError(
            "an adapter lies on lm_head, which the log-probs are computed from directly: it would "
            "never be trained. Remove lm_head from target_modules and modules_to_save."
        )
    if not isinstance(lm_head, nn.Linear) or not lm_head.weight.is_floating_point():
        raise ValueError(
            f"the head is a {type(lm_head).__name__} of {lm_head.weight.dtype}: need a plain "
            "linear layer in floating point. Load the model with lm_head left out of quantization."
        )
    config = causal_lm.config.get_text_config()
    softcap = next((cap for name in SOFTCAPS if (cap := getattr(config, name, None))), None)
    return Head(lm_head.weight, lm_head.bias, softcap, _logit_scale(config))


def get_backbone(model: nn.Module) -> nn.Module:
    """The decoder below the head: input ids to the last hidden states."""
    causal_lm = unwrap_model(model)
    backbone = causal_lm.get_decoder()
    if backbone is None or backbone is causal_lm:
        raise ValueError(
            f"{type(causal_lm).__name__} does not show its decoder (get_decoder()): packed pairs "
            "need the hidden states below the head. Choose a decoder-only causal LM."
        )
    return backbone


def _logit_scale(config: PreTrainedConfig) -> float:
    known = {*MULTIPLIERS, "logits_scaling", *SOFTCAPS, *UNRELATED_CONFIG_KEYS}
    for name, value in config.to_dict().items():
        looks_like_it = "logit" in name or "scal" in name or name.endswith("multiplier")
        if looks_like_it and name not in known and value not in (None, False, 1, 1.0):
            raise ValueError(
                f"{config.model_type}'s config has {name}={value}, which may change the logits in "
                "a way that fastdpo does not know: the log-probs could be wrong. Choose another "
                "model, or file an issue."
            )
    scale = 1.0
    for name in MULTIPLIERS:
        scale *= getattr(config, name, None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    # HyperCLOVA X multiplies by the field that Granite divides by.
    return scale * divisor if config.model_type == "hyperclovax" else scale / divisor
