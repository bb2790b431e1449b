"""Which kernel attends, and the switch between it and the model's own attention.

Registered with transformers' AttentionInterface under names that have no mask function there, so
no (T, T) mask is ever built. They refuse to run without the segments of a micro-batch: a padded or
generating call under them would be silently wrong. Models therefore keep their own implementation,
and `packed_attention` switches around our passes only.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from fastdpo.modeling.attention.flex import attend_flex
from fastdpo.modeling.attention.sdpa import attend_segments
from fastdpo.modeling.attention.segments import AttentionParams, PackedSegments
from fastdpo.modeling.attention.varlen import (
    PACKAGES,
    attend_varlen,
    package_kernel,
    torch_kernel,
)

logger = logging.getLogger(__name__)

ATTENTIONS = {
    "auto": "fastdpo",
    "sdpa": "fastdpo_segments",
    "varlen": "fastdpo_varlen",
    "flex": "fastdpo_blocks",
    "flash_attention_2": "fastdpo_fa2",
    "flash_attention_3": "fastdpo_fa3",
}
"""What may be asked for, and its name in transformers' interface, where "flash" has a meaning."""

MODEL_ATTENTION = "own"
"""In place of one of `ATTENTIONS`: the model's own attention stays, for padded rows only."""

CPU_ATTENTION_KEY = "sdpa-per-segment"
"""What attends on the CPU; part of the reference store's key, see `attention_kind`."""


@contextmanager
def packed_attention(config: PreTrainedConfig, attention: str = "auto") -> Iterator[None]:
    """Let the model of this config attend over packed groups; its own implementation afterwards.

    Args:
        config: the causal LM's.
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
    """Whether the model of this config is inside `packed_attention`."""
    return config._attn_implementation in ATTENTIONS.values()


def attention_kind(config: PreTrainedConfig, device: torch.device, attention: str = "auto") -> str:
    """What will attend, as far as log-probs depend on it: for the reference store's key.

    On the CPU it is `CPU_ATTENTION_KEY`. On CUDA the kernel may differ from layer to layer, and is
    a function of the config, the dtype and the GPU, all of which the store knows besides.
    """
    if attention == MODEL_ATTENTION:
        return f"own-{config._attn_implementation}"
    if device.type != "cuda" and attention in ("auto", "sdpa"):
        return CPU_ATTENTION_KEY
    return f"{attention}-{device.type}"


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
        sliding_window, others["window"] = None, _window_of_config(module)
    _refuse_unknown(module, attention_mask, others)
    packed.layers_run += 1
    terms = AttentionParams(scaling, sliding_window or None, softcap, s_aux, dropout)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    backend = select_backend(requested, query, key, value, packed, terms)
    if backend == "sdpa":
        out = attend_segments(query, key, value, packed, terms)
    elif backend == "flex":
        out = attend_flex(query, key, value, packed, terms)
    else:
        on_torch = backend == "varlen"
        kernel = torch_kernel(query.device) if on_torch else package_kernel(backend)
        out = attend_varlen(query, key, value, packed, terms, kernel)
    return out.transpose(1, 2).contiguous(), None


def select_backend(
    requested: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedSegments,
    terms: AttentionParams,
) -> str:
    """One of `ATTENTIONS` but auto, for these inputs.

    Raises:
        ValueError: the one asked for cannot do it; says what it lacks.
    """
    lacks = {
        name: _unsupported_reason(name, query, key, value, packed, terms)
        for name in ("varlen", "flex")
    }
    if requested == "auto":
        chosen = next((name for name, lacking in lacks.items() if not lacking), "sdpa")
        reasons = [f"{name}: {lacking}" for name, lacking in lacks.items() if lacking]
        _say(chosen, "; ".join(reasons if chosen == "sdpa" else reasons[:1]))
        return chosen
    lacking = _unsupported_reason(requested, query, key, value, packed, terms)
    if lacking and packed.segments:
        raise ValueError(f"--attention {requested} cannot be used here: {lacking}. Use auto.")
    chosen = "sdpa" if lacking else requested
    _say(chosen, "asked for" if chosen == requested else lacking)
    return chosen


def _unsupported_reason(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedSegments,
    terms: AttentionParams,
) -> str:
    """What keeps a backend from doing this, or nothing."""
    if name == "sdpa":
        return ""
    if not packed.segments:
        return "rows are padded"
    if not query.is_cuda:
        return "not on a CUDA device"
    if terms.dropout:
        return "attention dropout is on"
    if query.shape[-1] != value.shape[-1]:
        return "keys and values have different sizes"
    if name == "flex" and query.shape[-1] < 16:  # what its kernel takes at least
        return f"head size is {query.shape[-1]}"
    if name == "flex":
        return "" if find_spec("triton") else "triton is not installed"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype is {query.dtype}"
    if query.shape[-1] > 256 or query.shape[-1] % 8:
        return f"head size is {query.shape[-1]}"
    if terms.sinks is not None:
        return "attention has sinks"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if name in PACKAGES:
        return ""
    if terms.softcap is not None:
        return "scores are capped"
    found = find_spec("torch.nn.attention.varlen")
    return "" if found else f"torch {torch.__version__} has no varlen_attn"


def _window_of_config(module: nn.Module) -> int | None:
    """The window that a model applies by its masks alone, if it has one."""
    config = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    sliding = types is None or "sliding_attention" in types
    return getattr(config, "sliding_window", None) if sliding else None


def _refuse_unknown(
    module: nn.Module, attention_mask: Tensor | None, others: dict[str, Any]
) -> None:
    """Whatever would change the attention and is not ours to compute."""
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
def _say(backend: str, reason: str) -> None:
    logger.info("Attention over packed pairs: %s%s", backend, f" ({reason})" if reason else "")


for _asked, _name in ATTENTIONS.items():
    AttentionInterface.register(_name, partial(_attend_packed, requested=_asked))
