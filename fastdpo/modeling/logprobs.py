"""A packed micro-batch to log-probs: backbone once, head on the scored states, sums in fp64."""

from dataclasses import dataclass

import torch
from fastdpo_kernels import LinearLogprobs, linear_logprobs
from torch import Tensor, nn

from fastdpo.batching import MicroBatch
from fastdpo.modeling.attention import PackedSegments
from fastdpo.modeling.head import backbone_of, causal_lm_of, head_of

METRIC_OUTPUTS = ("entropy", "mean_logits", "is_top1")


@dataclass(frozen=True, eq=False)
class PackedLogprobs:
    """Log-probs of one micro-batch, completion by completion."""

    logps: Tensor  # (C,) float64, nats, summed over each completion's tokens
    token_logps: Tensor  # (M,) float32, nats; completion by completion, tokens in order
    extras: dict[str, Tensor]  # (M,) figures without gradient, by the names asked for


def packed_logprobs(
    model: nn.Module, micro_batch: MicroBatch, outputs: tuple[str, ...] = ()
) -> PackedLogprobs:
    """Run one micro-batch through backbone and head.

    Args:
        model: a causal LM or a PeftModel on it; inside `packed_attention` of its config.
        micro_batch: on the model's device.
        outputs: extra per-token figures, as `linear_logprobs` names them.

    Returns:
        Log-probs, differentiable where gradients are on.

    Raises:
        ValueError: the model does not attend through transformers' interface.
    """
    packed = PackedSegments(micro_batch.segments)
    hidden_states = backbone_of(model)(
        input_ids=micro_batch.input_ids,
        position_ids=micro_batch.position_ids,
        use_cache=False,
        packed=packed,
    ).last_hidden_state
    if packed.layers_run == 0:
        raise ValueError(
            f"{type(causal_lm_of(model)).__name__} does not attend through transformers' attention "
            "interface, so packed pairs would leak into each other: choose another model."
        )
    head = head_of(model)
    scored = linear_logprobs(
        hidden_states[0].index_select(0, micro_batch.scored_positions),
        head.weight,
        micro_batch.target_ids,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        ignore_index=None,
        outputs=outputs,
    )
    per_state = scored._asdict() if isinstance(scored, LinearLogprobs) else {"token_logps": scored}
    figures = {
        name: figure[micro_batch.token_index]
        for name, figure in per_state.items()
        if figure is not None
    }
    token_logps = figures.pop("token_logps")
    return PackedLogprobs(completion_sums(token_logps, micro_batch), token_logps, figures)


def completion_sums(per_token: Tensor, micro_batch: MicroBatch) -> Tensor:
    """Sum (M,) per-token figures over each completion: (C,) float64, in token order."""
    return torch.segment_reduce(
        per_token.double(), "sum", lengths=micro_batch.completion_tokens, unsafe=True
    )
