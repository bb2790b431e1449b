"""What a family of models can do: packed rows, shared prompts, or neither, and why.

Packing several sequences into a row is exact where tokens meet in attention alone. A layer that
carries a state along the row (state space, linear attention, convolution) would carry it from one
sequence into the next, so such models run every completion in a padded row of its own.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from fastdpo.modeling.attention import ATTENTIONS, MODEL_ATTENTION
from fastdpo.modeling.head import get_backbone, unwrap_model

PACKABLE_LAYERS = ("full_attention", "sliding_attention")
"""Of transformers' layer types, those that our attention computes."""

LAYERS = {
    "linear_attention": "linear attention or a state space",
    "conv": "convolutions",
    "hybrid": "a state space beside the attention",
    "hybrid_sliding": "a state space beside the attention",
    "chunked_attention": "attention in fixed chunks of positions",
}
"""What other layer types are, in words."""

OWN_ATTENTION = {
    "doge": "attends with a mask that it computes from its values",
    "nemotron": "does not hand arguments on to its attention",
    "phimoe": "has a window that it does not hand on to its attention",
}
"""Families that have transformers' attention interface and yet cannot use ours, by model_type."""


@dataclass(frozen=True)
class PackingMode:
    """How the pairs of a run go through its model."""

    packing: bool = True  # completions one after another in a row; else a padded row each
    shared_prefix: bool = True  # what a group's rows share is computed once
    attention: str = "auto"  # what `packed_attention` is to be given
    why: str = ""  # what is off, and why; empty where nothing is

    def describe(self) -> str:
        """One sentence for the log."""
        rows = "packed rows" if self.packing else "padded rows of one completion each"
        shared = "each prompt computed once" if self.shared_prefix else "no prompt shared"
        return f"Pairs run in {rows}, {shared}{f': {self.why}' if self.why else ''}."


def choose_packing(
    model: nn.Module, *, packing: str = "auto", shared_prefix: str = "auto", attention: str = "auto"
) -> PackingMode:
    """Choose how pairs run through a model.

    Args:
        model: a causal LM or a PeftModel on it.
        packing: auto, where it is exact; off, padded rows under the model's own attention.
        shared_prefix: auto, where rows are packed; off, every completion with its own prompt.
        attention: one of `ATTENTIONS`.

    Raises:
        ValueError: the model is no causal decoder, or is asked for what it cannot do.
    """
    causal_lm = unwrap_model(model)
    _refuse_not_causal(causal_lm)
    obstacle = why_not_packable(causal_lm)
    if obstacle and attention != "auto":
        raise ValueError(
            f"--attention {attention} is for packed rows, and {obstacle}. Leave --attention out."
        )
    if obstacle:
        return PackingMode(False, False, MODEL_ATTENTION, obstacle)
    if packing == "off":
        # transformers' sdpa drops the cap on the scores; ours has it.
        capped = getattr(causal_lm.config.get_text_config(), "attn_logit_softcapping", None)
        theirs = attention == "auto" and not capped
        return PackingMode(
            False, False, MODEL_ATTENTION if theirs else attention, "--packing is off"
        )
    if shared_prefix == "off":
        return PackingMode(True, False, attention, "--shared_prefix is off")
    assert attention in ATTENTIONS, "checked by the options"
    return PackingMode(attention=attention)


def why_not_packable(causal_lm: PreTrainedModel) -> str:
    """Why sequences in one row would change each other in this model, or nothing."""
    config = causal_lm.config.get_text_config()
    family = config.model_type
    types = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    strange = [kind for kind in types if kind not in PACKABLE_LAYERS]
    if strange:
        named = " and ".join(dict.fromkeys(LAYERS.get(kind, kind) for kind in strange))
        return f"{family} has layers of {named}, which run on from one sequence into the next"
    if causal_lm._is_stateful:
        return f"{family} keeps a state that runs on from one sequence into the next"
    if family in OWN_ATTENTION:
        return f"{family} {OWN_ATTENTION[family]}"
    if not causal_lm._supports_attention_backend:
        return f"{family} does not attend through transformers' attention interface"
    return ""


def rotary_limit(causal_lm: PreTrainedModel) -> int | None:
    """The longest row for which rotary frequencies do not depend on the longest row of the pass.

    Dynamic and long RoPE switch all rows of a pass at once when one is longer than what the model
    was first trained on, so a log-prob would depend on neighbours.
    """
    config = causal_lm.config.get_text_config()
    found = getattr(config, "rope_parameters", None) or {}
    sets = [found] if "rope_type" in found else [v for v in found.values() if isinstance(v, dict)]
    limits = [
        each.get("original_max_position_embeddings") or config.max_position_embeddings
        for each in sets
        if each.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)


def _refuse_not_causal(causal_lm: PreTrainedModel) -> None:
    config = causal_lm.config.get_text_config()
    backbone = get_backbone(causal_lm)
    both_ways = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    modules = (m for m in backbone.modules() if getattr(m, "is_causal", True) is False)
    if causal_lm.config.is_encoder_decoder or both_ways or next(modules, None) is not None:
        raise ValueError(
            f"{type(causal_lm).__name__} attends in both directions or has an encoder, so a "
            "token's log-prob is not that of the text before it: choose a decoder-only causal LM."
        )
