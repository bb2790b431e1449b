"""A packed micro-batch to log-probs: backbone once, head on the scored states, sums in fp64."""

from dataclasses import dataclass
from typing import Any

import torch
from fastdpo_kernels import LinearLogprobs, linear_logprobs
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fastdpo.batching import MicroBatch
from fastdpo.modeling.attention import PackedSegments, attends_packed
from fastdpo.modeling.embeddings import ids_on_host
from fastdpo.modeling.families import experts_per_token, mixing_layers, rotary_limit
from fastdpo.modeling.head import get_backbone, get_lm_head, unwrap_model
from fastdpo.modeling.moe import load_balancing_loss
from fastdpo.modeling.state_forks import fork_states

METRIC_OUTPUTS = ("entropy", "mean_logits", "is_top1")


@dataclass(frozen=True, eq=False)
class PackedLogprobs:
    """Log-probs of one micro-batch, completion by completion."""

    logps: Tensor  # (C,) float64, nats, summed over each completion's tokens
    token_logps: Tensor  # (M,) float32, nats; completion by completion, tokens in order
    extras: dict[str, Tensor]  # (M,) metrics without gradient, by the requested names
    aux_loss: Tensor | None = None  # () float32, the routers' loss over real tokens, if requested


def packed_logprobs(
    model: nn.Module,
    micro_batch: MicroBatch,
    outputs: tuple[str, ...] = (),
    *,
    aux_loss: bool = False,
) -> PackedLogprobs:
    """Run one micro-batch through backbone and head.

    Args:
        model: a causal LM or a PeftModel on it; for packed sequences inside `packed_attention` of
            its config. Padded ones run with whatever attends.
        micro_batch: on the model's device.
        outputs: extra per-token metrics, as `linear_logprobs` names them.
        aux_loss: also give the load-balancing loss of the model's routers.

    Returns:
        Log-probs, differentiable where gradients are on.

    Raises:
        ValueError: the model cannot do this exactly: not all of its layers attend through
            transformers' interface, or it has no routers and their loss is requested.
    """
    states, aux = _last_states(model, micro_batch, aux_loss)
    head = get_lm_head(model)
    scored = linear_logprobs(
        states.flatten(0, 1).index_select(0, micro_batch.scored_positions),
        head.weight,
        micro_batch.target_ids,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        ignore_index=None,
        outputs=outputs,
    )
    per_state = scored._asdict() if isinstance(scored, LinearLogprobs) else {"token_logps": scored}
    metrics = {
        name: metric[micro_batch.token_index]
        for name, metric in per_state.items()
        if metric is not None
    }
    token_logps = metrics.pop("token_logps")
    return PackedLogprobs(completion_sums(token_logps, micro_batch), token_logps, metrics, aux)


def _last_states(
    model: nn.Module, micro_batch: MicroBatch, aux_loss: bool
) -> tuple[Tensor, Tensor | None]:
    """The last hidden states (R, L, H), and the routers' loss where it is requested."""
    causal_lm = unwrap_model(model)
    config = causal_lm.config
    options: dict[str, Any] = {"output_router_logits": True} if aux_loss else {}
    packed = PackedSegments(micro_batch.segments)
    if attends_packed(config):
        options |= {"position_ids": micro_batch.position_ids, "packed": packed}
    elif micro_batch.segments:
        raise ValueError(
            "packed sequences need packed_attention(model.config) around them; under the model's "
            "own attention they would leak into each other."
        )
    limit = rotary_limit(config.get_text_config())
    if limit is not None and micro_batch.max_seqlen > limit:
        raise ValueError(
            f"a sequence of {micro_batch.max_seqlen} tokens is beyond the {limit} up to which "
            f"{config.model_type}'s rotary frequencies do not depend on the other sequences: use "
            f"--max_length {limit}."
        )
    if micro_batch.segments:
        fork_states(get_backbone(model))
    with ids_on_host(model, micro_batch.host_input_ids):
        output = get_backbone(model)(input_ids=micro_batch.input_ids, use_cache=False, **options)
    layers = mixing_layers(config.get_text_config())
    if micro_batch.segments and packed.layers_run < layers:
        raise ValueError(
            f"{type(causal_lm).__name__} attends through transformers' attention interface in "
            f"{packed.layers_run} of its {layers} layers, so packed pairs would leak into each "
            "other: use --packing off."
        )
    return output.last_hidden_state, _aux_loss(output, config, micro_batch) if aux_loss else None


def _aux_loss(output: Any, config: PreTrainedConfig, micro_batch: MicroBatch) -> Tensor:
    logits = getattr(output, "router_logits", None)
    experts = experts_per_token(config.get_text_config())
    if not logits or experts is None:
        raise ValueError(
            f"{config.model_type} gives no router logits, so there is no load to balance: leave "
            "--router_aux_loss_coef out."
        )
    return load_balancing_loss(tuple(logits), micro_batch.token_mask.flatten(), experts)


def completion_sums(per_token: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Sum (M,) per-token metrics over each completion: (C,) float64, in token order."""
    return torch.segment_reduce(
        per_token.double(), "sum", lengths=micro_batch.completion_tokens, unsafe=True
    )
