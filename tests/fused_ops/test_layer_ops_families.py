"""The ops of a layer against transformers' own modules, alone and in whole tiny models."""

import copy
import importlib

import pytest
import torch
from fastdpo_kernels import gated_activation, rms_norm, rotary
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.activations import ACT2FN

from tests.fused_ops.fused_modules import KINDS, NORMS, eps_of, fuse_layers
from tests.fused_ops.layer_ops import error, normal

SIZES = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, head_dim=16),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "gemma": GemmaConfig(**SIZES, head_dim=16),
    "gemma2": Gemma2Config(**SIZES, head_dim=16),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16),
    "olmo2": Olmo2Config(**SIZES),
    "phi3": Phi3Config(**SIZES, partial_rotary_factor=0.5),
    "cohere": CohereConfig(**SIZES),
}
OWN_MODULES = ("llama", "gemma2", "gemma3", "olmo2", "phi3", "qwen3", "cohere")
"""Families for the interpreter, which is slow; the others' modules are copies of these."""

ON_BACKENDS = [("torch", family) for family in FAMILIES]
if not torch.cuda.is_available():  # there tests/gpu/test_layer_ops.py runs the compiled kernels
    ON_BACKENDS += [("triton", family) for family in OWN_MODULES]

TIPPED = {torch.bfloat16: 2e-3, torch.float32: 1e-6}
"""A sum in another order tips few roundings: the norm of what differs, of the whole."""


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("where there is a GPU tests/gpu/test_layer_ops.py runs the compiled kernels")
    return request.param


def classes_of(family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    norm = next(getattr(module, name) for name in NORMS if hasattr(module, name))
    return module, norm


def compare(backend, dtype, found, wanted, exact):
    """Equal bit for bit, where `exact`; else but for roundings that another order tips."""
    for place, (got, want) in enumerate(zip(found, wanted, strict=True)):
        assert got.dtype == want.dtype
        if backend == "torch" and exact[place]:
            assert torch.equal(got, want), place
        else:
            assert error(got, want) <= TIPPED[dtype], place


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("backend", "family"), ON_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms(backend, dtype, family, strided):
    _, kind = classes_of(family)
    module = kind(90).to(dtype)
    module.weight.data = normal(90, dtype=dtype, seed=1)
    form, centered = NORMS[kind.__name__]
    x = normal(3, 5, 180 if strided else 90, dtype=dtype, scale=3)[..., :90]
    upstream = normal(3, 5, 90, dtype=dtype, seed=2)

    def run(norm):
        leaf = x.detach().requires_grad_()
        out = norm(leaf)
        return [out, *torch.autograd.grad(out, (leaf, module.weight), upstream)]

    options = {"eps": eps_of(module), "form": form, "centered": centered, "backend": backend}
    found = run(lambda leaf: rms_norm(leaf, module.weight, **options))
    wanted = run(module)
    # The weight's gradient is summed before it is rounded, transformers' after, in this form.
    rounds_late = form == "llama" and dtype == torch.bfloat16
    compare(backend, dtype, found[:2], wanted[:2], (True, not centered))
    if rounds_late:
        assert error(found[2], wanted[2]) <= 1e-2
    else:
        compare(backend, dtype, found[2:], wanted[2:], (True,))


@pytest.mark.parametrize(("backend", "family"), ON_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rotary_and_the_norms_before_it(backend, dtype, family):
    module, kind = classes_of(family)
    heads, size, turned = (5, 3), 24, 16 if family == "phi3" else 24
    half = normal(2, 7, turned // 2, seed=3, scale=4)
    interleaved = family == "cohere"
    both = half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)
    angles = torch.float32 if family == "olmo2" else dtype
    cos, sin = both.cos().to(angles), both.sin().to(angles)
    widths = {"qwen3": (size,) * 2, "gemma3": (size,) * 2, "olmo2": [size * n for n in heads]}
    norms = [kind(width).to(dtype) for width in widths.get(family, ())]
    for norm in norms:
        norm.weight.data = normal(len(norm.weight), dtype=dtype, seed=4)
        norm.requires_grad_(False)
    upstream = [normal(2, n, 7, size, dtype=dtype, seed=n) for n in heads]

    def run(turn, with_norms):
        leaves = [normal(2, 7, n * size, dtype=dtype, seed=n).requires_grad_() for n in heads]
        states = [leaf * 1.0 for leaf in leaves]
        if with_norms and norms and family == "olmo2":
            states = [norm(t) for norm, t in zip(norms, states, strict=True)]
        states = [t.unflatten(-1, (-1, size)) for t in states]
        if with_norms and norms and family != "olmo2":
            states = [norm(t) for norm, t in zip(norms, states, strict=True)]
        outs = turn(*(t.transpose(1, 2) for t in states), cos, sin)
        return [*outs, *torch.autograd.grad(outs, leaves, [t.clone() for t in upstream])]

    options = {"interleaved": interleaved, "upcast": interleaved, "backend": backend}
    if norms:
        options |= {
            "q_weight": norms[0].weight, "k_weight": norms[1].weight, "eps": eps_of(norms[0]),
            "form": NORMS[kind.__name__][0],
        }  # fmt: skip
    found = run(lambda *given: rotary(*given, in_place=True, **options), False)
    wanted = run(module.apply_rotary_pos_emb, True)
    compare("torch" if not norms else backend, dtype, found, wanted, (True,) * 4)


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh", "gelu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations(backend, dtype, name):
    act = ACT2FN[name]
    gate, up, upstream = (normal(5, 301, dtype=dtype, seed=s, scale=2) for s in range(3))

    def run(formula):
        leaves = [t.detach().requires_grad_() for t in (gate, up)]
        out = formula(*leaves)
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    options = {"kind": KINDS[type(act).__name__], "backend": backend}
    found = run(lambda gate, up: gated_activation(gate, up, **options))
    wanted = run(lambda gate, up: act(gate) * up)
    compare(backend, dtype, found, wanted, (True,) * 3)


def model_of(family, dtype, layers):
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    attention = "eager" if family == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.ndim == 1 else 0.15
        torch.nn.init.normal_(parameter, std=scale, mean=float(name.endswith("norm.weight")))
    return model.to(dtype)


def logps_and_gradients(model, tokens):
    ids = torch.arange(2 * tokens).view(2, tokens) % 61
    logits = model(ids, use_cache=False).logits
    logps = logits.float().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    model.zero_grad()
    (logps * torch.linspace(-1, 1, tokens)).sum().backward()
    return logps.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whole_models(dtype, family):
    """Log-probs bit for bit; in bf16 gradients too, but for sums that are rounded later."""
    model = model_of(family, dtype, 2)
    wanted, gradients = logps_and_gradients(model, 13)
    assert fuse_layers(model, "torch") >= 7
    found, fused = logps_and_gradients(model, 13)
    assert torch.equal(found, wanted)
    rounds_late = family in ("llama", "mistral", "qwen2", "qwen3", "phi3", "cohere")
    for name, want in gradients.items():
        if dtype == torch.float32:
            assert error(fused[name], want) <= 2e-6, name
        elif rounds_late and (family == "cohere" or name.endswith("norm.weight")):
            assert error(fused[name], want) <= 1e-2, name
        else:
            assert torch.equal(fused[name], want), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in the interpreter")
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_whole_models_in_the_interpreter(family):
    model = model_of(family, torch.bfloat16, 1)
    wanted, gradients = logps_and_gradients(model, 5)
    fuse_layers(model, "triton")
    found, fused = logps_and_gradients(model, 5)
    assert error(found, wanted) <= 5e-3
    for name, want in gradients.items():
        assert error(fused[name], want) <= 2e-2, name


def test_recomputed_layers_give_the_same_gradients(backend):
    """What is written in place lies in tensors that a recomputation makes anew."""
    model = model_of("llama", torch.bfloat16, 1).train()
    fuse_layers(model, backend)
    kept, wanted = logps_and_gradients(model, 4)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed, found = logps_and_gradients(model, 4)
    assert torch.equal(recomputed, kept)
    for name, want in wanted.items():
        assert torch.equal(found[name], want), name
