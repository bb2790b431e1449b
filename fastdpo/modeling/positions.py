"""Find out how long a sequence a model has positions for, and refuse longer ones."""

import logging
from dataclasses import dataclass

from torch import Tensor, nn

from fastdpo.modeling.head import get_backbone, unwrap_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PositionLimit:
    """The longest sequence that a model was made for.

    Attributes:
        tokens: of it.
        is_hard: whether there is nothing to look up beyond: a table of learned or precomputed
            positions ends there. Otherwise positions go on, untrained.
    """

    tokens: int
    is_hard: bool


def position_limit(model: nn.Module) -> PositionLimit | None:
    """The limit of a model's positions, or None where it has none (ALiBi, state spaces).

    A model without rotary frequencies in its config has a hard limit if its decoder holds a table
    of positions: a module or a tensor with `pos` or `wpe` in its name and an entry for each.
    """
    causal_lm = unwrap_model(model)
    config = causal_lm.config.get_text_config()
    if config.model_type == "mpt":  # its ALiBi biases are made for so many positions
        return PositionLimit(config.max_seq_len, is_hard=True)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    if _has_table(get_backbone(causal_lm), limit):
        return PositionLimit(limit, is_hard=True)
    if getattr(config, "rope_parameters", None) and not getattr(config, "alibi", False):
        return PositionLimit(limit, is_hard=False)
    return None


def require_positions(model: nn.Module, longest_tokens: int) -> None:
    """Refuse sequences for which the model has no positions.

    Args:
        model: a causal LM or a PeftModel on it.
        longest_tokens: of the longest prompt + completion; the last one is never an input.

    Raises:
        ValueError: there are none for such a sequence.
    """
    limit = position_limit(model)
    if limit is not None and limit.is_hard and longest_tokens - 1 > limit.tokens:
        raise ValueError(
            f"the longest sequence has {longest_tokens:,} tokens, and {_family(model)} has "
            f"positions for {limit.tokens:,}: pass --max_length {limit.tokens}."
        )


def warn_of_positions(model: nn.Module, longest_tokens: int) -> None:
    """Do as `require_positions`, and log a warning for positions that were never trained."""
    require_positions(model, longest_tokens)
    limit = position_limit(model)
    if limit is not None and not limit.is_hard and longest_tokens - 1 > limit.tokens:
        logger.warning(
            "The longest sequence has %s tokens, and %s was made for %s: positions beyond them "
            "were never trained. Pass --max_length %s, or a model with scaled rotary positions.",
            f"{longest_tokens:,}",
            _family(model),
            f"{limit.tokens:,}",
            limit.tokens,
        )


def _family(model: nn.Module) -> str:
    return unwrap_model(model).config.get_text_config().model_type


def _has_table(backbone: nn.Module, limit: int) -> bool:
    """Return True if the decoder looks positions up in a table of about `limit` entries."""
    for name, module in backbone.named_modules():
        last = name.rpartition(".")[2]
        tensors = dict(module.named_buffers(recurse=False)) | {
            key: value for key, value in vars(module).items() if isinstance(value, Tensor)
        }
        if isinstance(module, nn.Embedding) and _names_positions(last):
            tensors["pos"] = module.weight
        if callable(getattr(module, "make_weights", None)):
            continue  # sinusoidal tables that grow (XGLM)
        for key, tensor in tensors.items():
            if _names_positions(key) and tensor.dim() == 2 and 0 <= len(tensor) - limit <= 8:
                return True
    return False


def _names_positions(name: str) -> bool:
    return "pos" in name or name == "wpe"
