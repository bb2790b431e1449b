"""The key of a store: everything that reference log-probs depend on, and nothing else."""

import math
from pathlib import Path
from typing import Any

import torch
from fastdpo_kernels.linear_logprobs import NUMERICS_VERSION
from torch import nn

from fastdpo.modeling.attention import MODEL_ATTENTION, attention_kind
from fastdpo.modeling.dropout import configured_dropout
from fastdpo.modeling.fused import kernels_of
from fastdpo.modeling.head import get_backbone, unwrap_model
from fastdpo.modeling.reference_model import ReferenceModel
from fastdpo.modeling.state_forks import states_kind
from fastdpo.modeling.weight_hash import base_tensors, tensors_hash
from fastdpo.ref_cache.hash_cache import weights_hash

IGNORED_CONFIG_KEYS = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "use_cache",
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "attention_dropout",
    "hidden_dropout",
    "initializer_range",
    "id2label",
    "label2id",
    "problem_type",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
}
"""Config fields that change no log-prob: names, versions, dropout, what is used for generation."""


def reference_identity(
    model: nn.Module,
    compute_dtype: torch.dtype,
    hash_cache: Path | None = None,
    reference: ReferenceModel | None = None,
    attention: str = "auto",
) -> dict[str, Any]:
    """Describe a reference so that two descriptions are equal exactly if their log-probs are.

    An adapter counts where the reference has it on; the policy's own does not, nor do learning
    rate, output folder, seed, rank, beta and loss, on which no reference log-prob depends.

    Args:
        model: a causal LM or a PeftModel on it.
        compute_dtype: what the matrix products run in; the weights' own dtype is in their hash.
        hash_cache: JSON file of the hashes of known weight files; None hashes every byte.
        reference: how the model serves as the reference; None means with its adapters off.
        attention: the attention backend, as `packed_attention` takes it.

    Returns:
        Content hash of the base weights, resolved config, dtype and numerics, ready for JSON.
    """
    causal_lm = unwrap_model(model)
    with configured_dropout(causal_lm):
        config = _to_json(causal_lm.config.to_dict())
    identity = {
        "weights": weights_hash(causal_lm, base_tensors(causal_lm), hash_cache),
        "config": config,
        "dtype": str(compute_dtype),
        "attention": attention_kind(causal_lm.config, causal_lm.device, attention),
        "head_numerics": NUMERICS_VERSION,
    }
    states = states_kind(get_backbone(model), causal_lm.device, compute_dtype)
    if states and attention != MODEL_ATTENTION:
        identity["states"] = states
    if kernels_of(model) != "eager":
        identity["layers"] = kernels_of(model)  # stores from before there were fused ones stand
    if reference is not None and (tensors := reference.adapter_tensors()):
        identity["adapter"] = {
            "weights": tensors_hash(tensors),
            "scale": _to_json(reference.adapter_scale()),
        }
    return identity


def _to_json(value: Any) -> Any:
    """A config, or a part of one, in values that JSON writes and reads back unchanged."""
    if isinstance(value, dict):
        return {
            str(name): _to_json(part)
            for name, part in value.items()
            if name not in IGNORED_CONFIG_KEYS
        }
    if isinstance(value, list | tuple):
        return [_to_json(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return str(value)
