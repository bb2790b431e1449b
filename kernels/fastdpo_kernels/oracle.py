"""The slow truth: materializes the logits in fp64. For tests and bench only."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_logprobs_oracle(
    hidden_states: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    target_ids: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """token_logps, entropy, mean_logits, is_top1 and log_sum_sq_probs, (N,) fp64, by definition."""
    logits = hidden_states.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    logps = torch.log_softmax(logits, dim=-1)
    probabilities = logps.exp()
    token_logps = logps.gather(1, target_ids[:, None]).squeeze(1)
    target_logits = logits.gather(1, target_ids[:, None]).squeeze(1)
    return {
        "token_logps": token_logps,
        "entropy": -(probabilities * logps).nan_to_num().sum(dim=-1),
        "mean_logits": logits.mean(dim=-1),
        "is_top1": target_logits >= logits.amax(dim=-1),
        "log_sum_sq_probs": torch.log((probabilities**2).sum(dim=-1)),
    }
