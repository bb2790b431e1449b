"""A model whose layers run the fused ops: what attaching them could look like, for the tests.

Classes of instances change, nothing of transformers is patched. A function that a forward looks up
by name is replaced in a copy of that forward's globals, for one instance.
"""

import inspect
from types import FunctionType, MethodType

from fastdpo_kernels import gated_activation, rms_norm, rotary

NORMS = {
    "LlamaRMSNorm": ("llama", False),
    "MistralRMSNorm": ("llama", False),
    "Qwen2RMSNorm": ("llama", False),
    "Qwen3RMSNorm": ("llama", False),
    "Phi3RMSNorm": ("llama", False),
    "Olmo2RMSNorm": ("olmo2", False),
    "GemmaRMSNorm": ("gemma", False),
    "Gemma2RMSNorm": ("gemma", False),
    "Gemma3RMSNorm": ("gemma", False),
    "CohereLayerNorm": ("olmo2", True),
}
"""Form and centering of each norm."""

KINDS = {
    "SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh", "GELUActivation": "gelu",
}  # fmt: skip
SUM_BEFORE_NORM = tuple(f"{name}DecoderLayer" for name in ("Llama", "Mistral", "Qwen2", "Qwen3"))


def eps_of(norm):
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def fused_norm(norm, backend):
    form, centered = NORMS[type(norm).__name__]

    def forward(self, x):
        options = {"form": form, "centered": centered, "backend": backend}
        return rms_norm(x, self.weight, eps=eps_of(self), **options)

    return forward


def fused_mlp(mlp, backend):
    """Gate and up of their projections, whose results nobody else reads."""
    kind = KINDS[type(getattr(mlp, "act_fn", None) or mlp.activation_fn).__name__]
    options = {"kind": kind, "overwrite": True, "backend": backend}
    if hasattr(mlp, "gate_up_proj"):
        return lambda self, x: self.down_proj(gated_activation(self.gate_up_proj(x), **options))
    return lambda self, x: self.down_proj(
        gated_activation(self.gate_proj(x), self.up_proj(x), **options)
    )


def fused_attention(attention, backend):
    """The same code with the rotary embedding replaced; norms of q and k are folded in."""
    cohere = type(attention).__name__.startswith("Cohere")
    options = {"interleaved": cohere, "upcast": cohere, "in_place": True, "backend": backend}
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if None not in norms and not cohere:
        options |= {
            "q_weight": norms[0].weight, "k_weight": norms[1].weight, "eps": eps_of(norms[0]),
            "form": NORMS[type(norms[0]).__name__][0],
        }  # fmt: skip
        for norm in norms:
            norm.forward = lambda x: x  # done by the rotary embedding

    def turn(q, k, cos, sin, unsqueeze_dim=1):
        assert unsqueeze_dim == 1
        return rotary(q, k, cos, sin, **options)

    forward = inspect.unwrap(type(attention).forward)
    names = {**forward.__globals__, "apply_rotary_pos_emb": turn}
    copy = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def fused_layer(layer, backend):
    """The residual sum in one pass with the norm after it."""

    def forward(self, hidden_states, **options):
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=hidden_states, **options)
        norm = self.post_attention_layernorm
        hidden_states, residual = rms_norm(
            hidden_states, norm.weight, eps=eps_of(norm), residual=residual, backend=backend
        )
        return residual + self.mlp(hidden_states)

    return forward


def fused_forward_of(module, backend):
    """The forward of the fused ops for a module that they are exact for, or None."""
    name = type(module).__name__
    if name in NORMS and module.weight.ndim == 1:
        return fused_norm(module, backend)
    if name.endswith("MLP") and hasattr(module, "down_proj"):
        return fused_mlp(module, backend)
    if name.endswith("Attention") and hasattr(module, "o_proj"):
        return fused_attention(module, backend)
    if name in SUM_BEFORE_NORM:
        return fused_layer(module, backend)
    return None


def fuse_layers(model, backend):
    """Every module that `fused_forward_of` knows, in place; how many."""
    count = 0
    for module in list(model.modules()):
        forward = fused_forward_of(module, backend)
        if forward is not None and "forward" not in vars(module):
            module.forward = MethodType(forward, module)
            count += 1
    return count
