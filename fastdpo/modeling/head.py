"""The head: how a model's own forward forms its logits from the last hidden states."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.modeling.families import logit_scale, logit_softcap


@dataclass(frozen=True)
class Head:
    """How a model forms its logits from the last hidden states.

    They are logit_scale * (states @ weight.T + bias), capped where there is a softcap.
    """

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
            "never be trained. Remove lm_head from target_modules and modules_to_save; where it "
            "shares the embeddings, trainable_token_indices too."
        )
    if not isinstance(lm_head, nn.Linear) or not lm_head.weight.is_floating_point():
        raise ValueError(
            f"the head is a {type(lm_head).__name__} of {lm_head.weight.dtype}: need a plain "
            "linear layer in floating point. Load the model with lm_head left out of quantization."
        )
    config = causal_lm.config.get_text_config()
    return Head(lm_head.weight, lm_head.bias, logit_softcap(config), logit_scale(config))


def get_backbone(model: nn.Module) -> nn.Module:
    """The decoder below the head: input ids to the last hidden states."""
    causal_lm = unwrap_model(model)
    backbone = causal_lm.get_decoder()
    if hasattr(backbone, "lm_head"):  # Llama 4, alone or below its image model: a causal LM too
        backbone = getattr(backbone, "model", None)
    if backbone is None or backbone is causal_lm or isinstance(backbone, nn.Linear):
        raise ValueError(
            f"{type(causal_lm).__name__} does not show its decoder (get_decoder()): packed pairs "
            "need the hidden states below the head. Choose a decoder-only causal LM."
        )
    return backbone
