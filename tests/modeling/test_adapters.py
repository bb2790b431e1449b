"""Adapters on one set of weights: dense and 4-bit, on and off, saved and reloaded."""

import copy
import importlib
import warnings

import bitsandbytes as bnb
import pytest
import torch
from fastdpo_kernels.lora_linear import dense_weight
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, LlamaConfig

from fastdpo.batching import pack_update
from fastdpo.modeling.adapters import (
    FrozenLinear4bit,
    FusedLoraLinear,
    FusedLoraLinear4bit,
    adapters_disabled,
    add_adapter,
    check_base_frozen,
    lora_config,
    replace_lora_forward,
)
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.loading import eval_mode, load_model
from fastdpo.modeling.logprobs import packed_logprobs
from tests.modeling.test_packed_pairs import random_groups

CONFIG = LlamaConfig(
    vocab_size=131, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
GROUPS = random_groups(count=5)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    model = AutoModelForCausalLM.from_config(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def adapted(folder, *, load_in_4bit=False, dtype=torch.float32, dropout=0.0, **variant):
    """A model with an adapter whose B is not zero."""
    torch.manual_seed(1)
    model = load_model(str(folder), dtype=dtype, load_in_4bit=load_in_4bit)
    model = add_adapter(model, lora_config(8, 16, dropout, None, **variant))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def packed(model):
    (micro_batch,) = pack_update(GROUPS, 512)
    with packed_attention(model.config):
        return packed_logprobs(model, micro_batch)


def log_probs(model):
    return packed(model).logps


def token_log_probs(model):
    return packed(model).token_logps


def lora_gradients(model):
    model.zero_grad()
    log_probs(model).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), f"{name} changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_gradients_survive_passes_without_gradient(base_folder, load_in_4bit, dtype):
    """R: bitsandbytes repacks 4-bit weights on AVX512-BF16 CPUs at the first eval-mode pass."""
    model = adapted(base_folder, load_in_4bit=load_in_4bit, dtype=dtype)
    before = lora_gradients(model)
    assert all(gradient.dtype == torch.float32 for gradient in before.values())
    assert all((gradient != 0).any() for gradient in before.values())
    with eval_mode(model), torch.no_grad():
        policy = log_probs(model)
        with adapters_disabled(model):
            reference = log_probs(model)
    assert (policy != reference).all()
    assert_equal(lora_gradients(model), before)
    with adapters_disabled(model), torch.no_grad():
        assert torch.equal(log_probs(model), reference)
    assert_equal(lora_gradients(model), before)


def test_a_pass_without_gradient_leaves_4bit_weights_alone(base_folder):
    """Stock bitsandbytes repacks them on AVX512-BF16; elsewhere nothing shows the difference."""
    model = load_model(str(base_folder), dtype=torch.bfloat16, load_in_4bit=True)
    stock, ours = model.model.layers[0].mlp.up_proj, model.model.layers[1].mlp.up_proj
    replace_lora_forward(model.model.layers[1])
    before = [layer.weight.data.clone() for layer in (stock, ours)]
    with torch.no_grad():
        for layer in (stock, ours):
            layer.eval()(torch.zeros(1, 64, dtype=torch.bfloat16))
    assert torch.equal(ours.weight.data, before[1])
    if torch.equal(stock.weight.data, before[0]):
        pytest.skip("bitsandbytes does not repack on this processor (no AVX512-BF16)")


def test_layers_left_to_peft_are_named(base_folder, caplog):
    model = load_model(str(base_folder), dtype=torch.float32)
    add_adapter(copy.deepcopy(model), lora_config(8, 16, 0.0, None))
    assert "PEFT's own forward" not in caplog.text
    for variant, named in (
        ({"use_dora": True}, "DoraLinearVariant"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "a trained weight or bias of the base"),
        ({"target_modules": ["embed_tokens"]}, "Embedding on Embedding"),
    ):
        config = LoraConfig(**{"target_modules": ["q_proj"], **variant})
        biased = copy.deepcopy(model)
        for layer in biased.model.layers:
            layer.self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(64))
        caplog.clear()
        add_adapter(biased, config)
        assert f"PEFT's own forward: {named}." in caplog.text
        assert len(caplog.records) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4bit_equals_its_dequantized_dense_twin(base_folder, dtype):
    quantized = adapted(base_folder, load_in_4bit=True, dtype=dtype)
    dense = adapted(base_folder, dtype=dtype)
    layers = dict(quantized.named_modules())
    for name, module in dense.named_modules():
        if name.endswith("base_layer"):
            module.weight.data = dense_weight(layers[name].weight, dtype)
    for (name, mine), theirs in zip(quantized.named_parameters(), dense.parameters(), strict=True):
        if "lora" in name:
            theirs.data = mine.data.clone()
    found, wanted = lora_gradients(quantized), lora_gradients(dense)
    bound = 1e-6 if dtype == torch.float32 else 2e-2  # bf16: 2^-8 a product, a few deep
    for name, gradient in found.items():
        error = (gradient - wanted[name]).norm() / wanted[name].norm()
        assert error <= bound, f"{name} is off by {error:.1e}"


STOCK = {
    FusedLoraLinear: lora.Linear,
    FusedLoraLinear4bit: PeftLinear4bit,
    FrozenLinear4bit: bnb.nn.Linear4bit,
}


def stock_twin(model):
    """The same weights under the forwards of PEFT and bitsandbytes; only ever in train mode."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.__class__ = STOCK.get(type(module), type(module))
    assert not any(isinstance(module, tuple(STOCK)) for module in twin.modules())
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_equals_stock_peft(base_folder, load_in_4bit, dtype, use_rslora):
    ours = adapted(base_folder, load_in_4bit=load_in_4bit, dtype=dtype, use_rslora=use_rslora)
    layer = ours.base_model.model.model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == (16 / 8**0.5 if use_rslora else 2.0)
    stock = stock_twin(ours)
    apart = (token_log_probs(ours) - token_log_probs(stock)).abs().max()
    assert apart <= (1e-5 if dtype == torch.float32 else 0.05), f"{apart:.1e} nat a token"
    bound = 1e-5 if dtype == torch.float32 else 2e-2  # stock PEFT runs the branch in fp32
    for (name, mine), theirs in zip(
        lora_gradients(ours).items(), lora_gradients(stock).values(), strict=True
    ):
        assert (mine - theirs).norm() <= bound * theirs.norm(), name


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_merging_is_that_of_stock_peft(base_folder, load_in_4bit):
    ours = adapted(base_folder, load_in_4bit=load_in_4bit)
    stock = stock_twin(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of rounding where it merges into 4 bits
        mine, theirs = (model.merge_and_unload().state_dict() for model in (ours, stock))
    assert mine.keys() == theirs.keys()
    assert not any("lora" in name for name in mine)
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def test_merged_for_a_while_and_back(base_folder):
    model = adapted(base_folder).eval()
    with torch.no_grad():
        apart = token_log_probs(model)
        model.merge_adapter()
        merged = token_log_probs(model)
        with adapters_disabled(model):
            reference = token_log_probs(model)
    assert torch.allclose(apart, merged, atol=1e-4)
    assert not torch.allclose(apart, reference, atol=1e-2)


def test_saved_for_the_backward_are_the_inputs_once(base_folder):
    """q, k and v share one tensor, gate and up another; nothing else of that size is saved."""
    model = adapted(base_folder, load_in_4bit=True, dtype=torch.bfloat16)
    layer = model.base_model.model.model.layers[1]
    attention, mlp = layer.self_attn, layer.mlp
    x = torch.randn(1, 50, 64, dtype=torch.bfloat16, requires_grad=True)
    inside = torch.randn(1, 50, 128, dtype=torch.bfloat16, requires_grad=True)
    for modules, of in (
        ((attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj), x),
        ((mlp.down_proj,), inside),
    ):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            outs = [module(of) for module in modules]
        assert len(outs) == len(modules)
        large = [t for t in saved if t.shape[:-1].numel() == 50]
        assert len(large) == len(modules)
        assert {t.data_ptr() for t in large} == {of.data_ptr()}
        assert all(t.dtype == torch.bfloat16 for t in large)
        adapters = {p.data_ptr() for module in modules for p in module.parameters()}
        assert {t.data_ptr() for t in saved} <= adapters | {of.data_ptr()}


def test_one_dequantized_matrix_at_a_time(base_folder, monkeypatch):
    """The reason why there is no buffer per shape: the allocator hands out the last block again."""
    kernel = importlib.import_module("fastdpo_kernels.lora_linear")
    plain, made = kernel.dense_weight, []

    def watched(*arguments):
        assert all(ref.expired() for ref in made), "another dense matrix is still there"
        dense = plain(*arguments)
        made.append(StorageWeakRef(dense.untyped_storage()))
        return dense

    monkeypatch.setattr(kernel, "dense_weight", watched)
    lora_gradients(adapted(base_folder, load_in_4bit=True, dtype=torch.bfloat16))
    assert len(made) == 2 * 14 - 3, "the first layer's q, k and v need no gradient of their input"


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_dora_runs_peft_and_its_reference_is_the_base(base_folder, load_in_4bit):
    dtype = torch.bfloat16 if load_in_4bit else torch.float32
    model = adapted(base_folder, load_in_4bit=load_in_4bit, dtype=dtype, use_dora=True)
    plain = load_model(str(base_folder), dtype=dtype, load_in_4bit=load_in_4bit)
    replace_lora_forward(plain)
    found = lora_gradients(model)
    assert sum("magnitude" in name for name in found) == 14
    assert all(torch.isfinite(g).all() and (g != 0).any() for g in found.values())
    with adapters_disabled(model), torch.no_grad():
        assert torch.equal(log_probs(model), log_probs(plain.train()))


def test_flags_and_modes_are_put_back_even_after_an_exception(base_folder):
    model = adapted(base_folder)
    frozen = next(p for n, p in model.named_parameters() if "lora_A" in n)
    frozen.requires_grad_(False)
    model.model.model.layers[0].eval()

    def state():
        return (
            {n: p.requires_grad for n, p in model.named_parameters()},
            {n: m.training for n, m in model.named_modules()},
            [m.disable_adapters for m in model.modules() if hasattr(m, "disable_adapters")],
        )

    before = state()
    with adapters_disabled(model), eval_mode(model):
        log_probs(model)
    assert state() == before
    with pytest.raises(ZeroDivisionError), adapters_disabled(model), eval_mode(model):
        raise ZeroDivisionError
    assert state() == before
    with adapters_disabled(model):
        with adapters_disabled(model):
            off = log_probs(model)
        assert torch.equal(log_probs(model), off)


def test_zero_b_is_bitwise_the_base_and_dropout_does_not_touch_the_reference(base_folder):
    model = load_model(str(base_folder), dtype=torch.float32)
    plain = log_probs(copy.deepcopy(model).train())
    model = add_adapter(model, lora_config(8, 16, 0.5, None)).train()
    assert torch.equal(log_probs(model), plain)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    assert not torch.equal(log_probs(model), log_probs(model)), "dropout draws no mask"
    with adapters_disabled(model):
        state = torch.get_rng_state()
        assert torch.equal(log_probs(model), plain)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_saved_adapter_loads_with_plain_peft(base_folder, tmp_path, load_in_4bit, dtype):
    ours = adapted(base_folder, load_in_4bit=load_in_4bit, dtype=dtype).eval()
    ours.save_pretrained(tmp_path)
    base = load_model(str(base_folder), dtype=dtype)
    stock = PeftModel.from_pretrained(base, tmp_path).eval()
    mine = {n: p for n, p in ours.named_parameters() if "lora" in n}
    theirs = {n: p for n, p in stock.named_parameters() if "lora" in n}
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    if load_in_4bit:
        return  # the dense base is another model; only the adapter is compared
    with torch.no_grad():
        apart = (token_log_probs(ours) - token_log_probs(stock)).abs().max()
    assert apart <= (1e-5 if dtype == torch.float32 else 0.05), f"{apart:.1e} nat a token"


def test_a_users_own_peft_model_is_converted_in_place(base_folder):
    model = load_model(str(base_folder), dtype=torch.float32)
    theirs = get_peft_model(model, lora_config(8, 16, 0.0, ["q_proj", "v_proj"]))
    replace_lora_forward(theirs)
    replace_lora_forward(theirs)
    fused = [name for name, m in theirs.named_modules() if type(m) is FusedLoraLinear]
    assert len(fused) == 2 * CONFIG.num_hidden_layers
    with pytest.raises(ValueError, match="another adapter"):
        add_adapter(theirs, lora_config(8, 16, 0.0, None))
    merged = theirs.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_training_tensors_of_the_base_is_refused(base_folder):
    model = load_model(str(base_folder), dtype=torch.float32)
    adapted = add_adapter(model, lora_config(8, 16, 0.0, None))
    check_base_frozen(adapted)
    adapted.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight belongs to the base"):
        check_base_frozen(adapted)
