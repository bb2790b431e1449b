"""Our attention in transformers' interface, and the switch between it and the model's own.

Registered with transformers' AttentionInterface under names that have no mask function there, so
no (T, T) mask is ever built. They refuse to run without the segments of a micro-batch: a padded or
generating call under them would be silently wrong. Models therefore keep their own implementation,
and `packed_attention` switches around our passes only.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from fastdpo.modeling.attention.kept import keeps_attention
from fastdpo.modeling.attention.segments import AttentionParams, PackedSegments
from fastdpo.modeling.attention_backends import (
    ATTENTIONS,
    BACKENDS,
    MODEL_ATTENTION,
    AttentionNeeds,
    select_backend,
    why_not_kept,
)
from fastdpo.modeling.families import masked_window

logger = logging.getLogger(__name__)


@contextmanager
def packed_attention(config: PreTrainedConfig, attention: str = "auto") -> Iterator[None]:
    """Let a model attend over packed groups; its own implementation attends afterwards.

    Args:
        config: config of the causal LM.
        attention: one of `ATTENTIONS`, or `MODEL_ATTENTION` to change nothing.
    """
    if attention == MODEL_ATTENTION:
        yield
        return
    before = config._attn_implementation
    config._attn_implementation = ATTENTIONS[attention]
    try:
        yield
    finally:
        config._attn_implementation = before


def attends_packed(config: PreTrainedConfig) -> bool:
    """Tell whether the model of this config is inside `packed_attention`."""
    return config._attn_implementation in ATTENTIONS.values()


def _attend_packed(
    module: nn.Module,
    query: Tensor,  # (R, Hq, T, D)
    key: Tensor,  # (R, Hkv, T, D)
    value: Tensor,  # (R, Hkv, T, Dv)
    attention_mask: Tensor | None,
    *,
    requested: str,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | Literal["untold"] | None = "untold",
    softcap: float | None = None,
    packed: PackedSegments | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention over packed groups, called by transformers' models.

    Returns:
        (R, T, Hq, Dv), and None for the weights.

    Raises:
        ValueError: called without packed segments, or for a kind of attention it does not have.
    """
    if packed is None:
        raise ValueError(
            "the `fastdpo` attention needs the segments of a packed micro-batch and was called "
            "without: for generation or padded batches leave the model's own attention in place "
            "(fastdpo.modeling.attention.packed_attention switches for packed passes only)."
        )
    if sliding_window == "untold":
        sliding_window = None
        others["window"] = masked_window(getattr(module, "config", None))
    _refuse_unknown(module, attention_mask, others)
    packed.layers_run += 1
    params = AttentionParams(scaling, sliding_window or None, softcap, s_aux, dropout)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    needs = _needs_of(query, value, packed, params)
    backend, reason = select_backend(needs, query.dtype, _capability(query), requested)
    _log_choice(backend, reason)
    if keeps_attention():
        _log_not_kept(why_not_kept(needs, backend))
    out = _kernel(backend)(query, key, value, packed, params)
    return out.transpose(1, 2).contiguous(), None


def _needs_of(
    query: Tensor, value: Tensor, packed: PackedSegments, params: AttentionParams
) -> AttentionNeeds:
    return AttentionNeeds(
        query.shape[-1],
        value.shape[-1],
        softcap=params.softcap is not None,
        sinks=params.sinks is not None,
        dropout=bool(params.dropout),
        packed=bool(packed.segments),
    )


def _capability(tensor: Tensor) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else None


def _kernel(backend: str) -> Callable[..., Tensor]:
    """The function that attends, (query, key, value, segments, params) to (R, Hq, T, Dv)."""
    module, _, function = BACKENDS[backend].kernel.partition(".")
    return getattr(import_module(f"fastdpo.modeling.attention.{module}"), function)


def _refuse_unknown(
    module: nn.Module, attention_mask: Tensor | None, others: dict[str, Any]
) -> None:
    """Refuse arguments that would change the attention and that no backend computes."""
    harmless = ("position_ids", "cache_position")
    unknown = [n for n, v in others.items() if isinstance(v, Tensor) and n not in harmless]
    if others.get("window"):
        unknown.append("a window that it does not hand on")
    if not getattr(module, "is_causal", True):
        unknown.append("attention in both directions")
    if attention_mask is not None:
        unknown.append("a mask of its own")
    if unknown:
        raise ValueError(
            f"{type(module).__name__} attends with {', '.join(unknown)}, which packed pairs cannot "
            "do exactly: use --packing off."
        )


@cache
def _log_choice(backend: str, reason: str) -> None:
    """Log each choice once in a process."""
    logger.info("Attention over packed pairs: %s%s", backend, f" ({reason})" if reason else "")


@cache
def _log_not_kept(reason: str) -> None:
    """Log once in a process why attention is run again in a layer that was to keep it."""
    if reason:
        logger.warning(
            "keep_attention keeps less than planned: attention is run again for its backward, "
            "since %s. Gradients are the same; --activations recompute does the same work.",
            reason,
        )


for _requested, _name in ATTENTIONS.items():
    AttentionInterface.register(_name, partial(_attend_packed, requested=_requested))
