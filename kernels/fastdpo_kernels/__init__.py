"""Kernels of fastdpo that any trainer can import: torch and the standard library only.

`linear_logprobs` is attention over the vocabulary: the log-probability of each target token
straight from hidden states and the rows of `lm_head`, without the (N, V) logits. `lora_linear` is
a frozen linear layer, dense or 4-bit, with its LoRA branch as one autograd node.
"""

from .linear_logprobs import LinearLogprobs, linear_logprobs
from .lora_linear import lora_linear

__all__ = ["linear_logprobs", "LinearLogprobs", "lora_linear"]
