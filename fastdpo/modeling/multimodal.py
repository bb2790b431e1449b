"""Models that see or hear: their language model is trained, on text, and the rest stays as it is.

Such a model is loaded, trained and saved as the class that its checkpoint names, so that what comes
out can still be shown an image. Its other towers have no part in the log-probs of text.
"""

import logging
import re
from typing import Any

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from fastdpo.modeling.head import get_backbone, unwrap_model

logger = logging.getLogger(__name__)


def auto_class(config: PreTrainedConfig) -> Any:
    """The Auto class that loads a model as the class which its config names.

    Args:
        config: of the whole model.

    Returns:
        AutoModelForImageTextToText for a model of several towers, AutoModelForCausalLM else.
    """
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    of_text = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if whole is not None and (whole in (config.architectures or []) or not of_text):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def other_towers(model: nn.Module) -> list[str]:
    """The paths of the modules that lie outside the language model; none in a causal LM."""
    causal_lm = unwrap_model(model)
    if causal_lm.config.get_text_config() is causal_lm.config:
        return []
    inside = {get_backbone(causal_lm), causal_lm.get_output_embeddings()}

    def outside(module: nn.Module, path: str) -> list[str]:
        if module in inside:
            return []
        if inside.isdisjoint(module.modules()):
            return [path]
        children = module.named_children()
        return [found for name, child in children for found in outside(child, f"{path}.{name}")]

    return [path.removeprefix(".") for path in outside(causal_lm, "")]


def freeze_other_towers(model: nn.Module) -> None:
    """Let nothing but the language model be trained; no other weight has a gradient from text."""
    towers = other_towers(model)
    for path in towers:
        unwrap_model(model).get_submodule(path).requires_grad_(False)
    if towers:
        logger.info(
            "Of %s the language model is trained, on text; %s stay as they are.",
            type(unwrap_model(model)).__name__,
            ", ".join(towers),
        )


def tower_pattern(model: nn.Module) -> str | None:
    """A regular expression that a module's path matches as a whole inside any other tower."""
    towers = other_towers(model)
    return rf"({'|'.join(map(re.escape, towers))})(\..+)?" if towers else None
