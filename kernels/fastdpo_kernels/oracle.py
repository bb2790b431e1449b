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


def rms_norm_oracle(
    x: Tensor,  # (..., H)
    weight: Tensor,  # (H,)
    *,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    form: str = "llama",
    centered: bool = False,
) -> tuple[Tensor, Tensor]:
    """The norm and the sum before it, fp64 by definition; differentiable in fp64 inputs."""
    total = x.double() if residual is None else x.double() + residual.double()
    rows = total - total.mean(-1, keepdim=True) if centered else total
    normalized = rows / (rows.square().mean(-1, keepdim=True) + eps).sqrt()
    return normalized * (weight.double() + (1.0 if form == "gemma" else 0.0)), total


def rotary_oracle(
    x: Tensor,  # (B, heads, T, D)
    cos: Tensor,  # (B or 1, T, R)
    sin: Tensor,
    *,
    interleaved: bool = False,
) -> Tensor:
    """Rotary embedding as complex multiplication would have it, fp64, column by column."""
    half = cos.shape[-1] // 2
    out = list(x.double().unbind(-1))
    for column in range(half):
        low, high = (2 * column, 2 * column + 1) if interleaved else (column, column + half)
        first, second = out[low], out[high]
        cosines, sines = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
        out[low] = first * cosines[..., low] - second * sines[..., low]
        out[high] = second * cosines[..., high] + first * sines[..., high]
    return torch.stack(out, dim=-1)


def gated_activation_oracle(gate: Tensor, up: Tensor, *, kind: str = "silu") -> Tensor:
    """act(gate) * up in fp64, from the definitions of the activations."""
    gate, up = gate.double(), up.double()
    if kind == "silu":
        return gate / (1.0 + (-gate).exp()) * up
    if kind == "gelu":
        return 0.5 * gate * (1.0 + torch.erf(gate / 2.0**0.5)) * up
    inner = (2.0 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1.0 + torch.tanh(inner)) * up


def lora_linear_oracle(
    x: Tensor,  # (..., in)
    weight: Tensor,  # (out, in)
    lora_A: Tensor | None = None,  # (r, in)
    lora_B: Tensor | None = None,  # (out, r)
    *,
    bias: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """The layer with its branch in fp64."""
    out = x.double() @ weight.double().T
    if bias is not None:
        out = out + bias.double()
    if lora_A is not None and lora_B is not None:
        out = out + scaling * (x.double() @ lora_A.double().T) @ lora_B.double().T
    return out
