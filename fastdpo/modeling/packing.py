"""How the pairs of a run go through its model: packed, with shared prefixes, or neither, and why.

Packing several sequences into one is exact where tokens meet in attention alone. A layer that
carries a state along the sequence (state space, linear attention, convolution) would carry it from
one into the next, unless its state is forked (`state_forks`); other such models run every
completion in a padded sequence of its own.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from fastdpo.modeling.attention_backends import ATTENTIONS, MODEL_ATTENTION
from fastdpo.modeling.families import attention_softcap, family_of, packing_obstacle
from fastdpo.modeling.head import get_backbone, unwrap_model
from fastdpo.modeling.state_forks import forks_states, state_layers


@dataclass(frozen=True)
class PackingMode:
    """How the pairs of a run go through its model.

    Attributes:
        packing: completions one after another in one sequence; else each in a padded one.
        shared_prefix: what the completions of a group have in common is computed once.
        attention: what `packed_attention` is to be given.
        reason: what is off, and why; empty where nothing is.
    """

    packing: bool = True
    shared_prefix: bool = True
    attention: str = "auto"
    reason: str = ""

    def describe(self) -> str:
        """One sentence for the log."""
        sequences = "packed sequences" if self.packing else "padded sequences of one completion"
        shared = "each prompt computed once" if self.shared_prefix else "no prompt shared"
        because = f": {self.reason}" if self.reason else ""
        return f"Pairs run in {sequences}, {shared}{because}."


def choose_packing(
    model: nn.Module, *, packing: str = "auto", shared_prefix: str = "auto", attention: str = "auto"
) -> PackingMode:
    """Choose how pairs run through a model.

    Args:
        model: a causal LM or a PeftModel on it.
        packing: auto, where it is exact; off, padded sequences under the model's own attention.
        shared_prefix: auto, where sequences are packed; off, every completion with its own prompt.
        attention: one of `ATTENTIONS`.

    Raises:
        ValueError: the model is no causal decoder, or it cannot do what the options ask of it.
    """
    causal_lm = unwrap_model(model)
    _refuse_not_causal(causal_lm)
    obstacle = why_not_packable(causal_lm)
    if obstacle and attention != "auto":
        raise ValueError(
            f"--attention {attention} is for packed sequences, and {obstacle}. Leave --attention "
            "out."
        )
    if obstacle:
        return PackingMode(False, False, MODEL_ATTENTION, obstacle)
    if packing == "off":
        # transformers' sdpa drops the cap on the scores; ours has it.
        theirs = attention == "auto" and not attention_softcap(causal_lm.config.get_text_config())
        kind = MODEL_ATTENTION if theirs else attention
        return PackingMode(False, False, kind, "--packing is off")
    if shared_prefix == "off":
        return PackingMode(True, False, attention, "--shared_prefix is off")
    assert attention in ATTENTIONS, "checked by the options"
    return PackingMode(attention=attention)


def why_not_packable(causal_lm: PreTrainedModel) -> str:
    """Why sequences packed into one would change each other in this model, or nothing."""
    config = causal_lm.config.get_text_config()
    if obstacle := packing_obstacle(config):
        return obstacle
    forking = family_of(config).state_layers
    layers = state_layers(get_backbone(causal_lm))
    if forking and not all(forks_states(type(layer)) for layer in layers):
        return (
            f"{config.model_type}'s layers do not call the functions by which their state could be "
            "forked in this release of transformers"
        )
    if causal_lm._is_stateful and not forking:
        return f"{config.model_type} keeps a state that runs on from one sequence into the next"
    if not causal_lm._supports_attention_backend and not forking:
        return f"{config.model_type} does not attend through transformers' attention interface"
    return ""


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
