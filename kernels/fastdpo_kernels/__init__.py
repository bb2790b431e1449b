"""Kernels of fastdpo that any trainer can import: torch and the standard library only.

`linear_logprobs` is attention over the vocabulary: the log-probability of each target token
straight from hidden states and the rows of `lm_head`, without the (N, V) logits.
`linear_cross_entropy` is the same behind the signature of torch's own. `lora_linear` is a frozen
linear layer, dense or 4-bit, with its LoRA branch as one autograd node, `lora_linears` several of
them on one input; `KeptDenseWeights` spares a recomputed layer a dequantization. `rms_norm`,
`rotary` and `gated_activation` are what lies between the linear layers of Llama and its relatives;
`gated_lora_linear` is the activation with the layer after it. `missing_for_triton` says why they
run their torch twins.
"""

from ._backend import missing_for_triton
from ._dense_weights import KeptDenseWeights
from .gated_activation import gated_activation
from .gated_lora_linear import gated_lora_linear
from .linear_cross_entropy import linear_cross_entropy
from .linear_logprobs import LinearLogprobs, linear_logprobs
from .lora_linear import lora_linear
from .lora_linears import LoraModule, lora_linears
from .rms_norm import rms_norm
from .rotary import rotary

__all__ = [
    "linear_logprobs",
    "LinearLogprobs",
    "linear_cross_entropy",
    "lora_linear",
    "KeptDenseWeights",
    "lora_linears",
    "LoraModule",
    "rms_norm",
    "rotary",
    "gated_activation",
    "gated_lora_linear",
    "missing_for_triton",
]
