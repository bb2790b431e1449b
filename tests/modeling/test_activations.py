"""Keep, recompute and offload: exact in every mixture, and what each of them holds."""

import copy
import gc
import importlib
import itertools
import weakref

import bitsandbytes as bnb
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.batching import pack_update
from fastdpo.modeling import activations
from fastdpo.modeling.activations import ACTIVATIONS, apply_activation_plan, decoder_layers
from fastdpo.modeling.adapters import add_adapter, lora_config
from fastdpo.modeling.attention import dispatch, packed_attention
from fastdpo.modeling.embeddings import embeddings_to_host
from fastdpo.modeling.fused import use_kernels
from fastdpo.modeling.loading import load_model
from fastdpo.modeling.logprobs import packed_logprobs
from tests.modeling.test_packed_pairs import random_groups
from tests.tiny_trainer import ROWS, TOKENIZER

LAYERS = 3
CONFIG_SIZES = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
CONFIG = LlamaConfig(**CONFIG_SIZES, attention_dropout=0.1)
GROUPS = random_groups(count=4)
KEEP_ALL = ("keep",) * LAYERS


def write_base(folder):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


def policy_model(folder, kind="lora", dropout=0.25):
    """A model in train mode, its adapter's B not zero; `full` has no adapter."""
    dtype = torch.bfloat16 if kind == "qlora" else torch.float32
    model = load_model(str(folder), dtype=dtype, load_in_4bit=kind == "qlora")
    if kind != "full":
        torch.manual_seed(1)
        model = add_adapter(model, lora_config(4, 8, dropout, None))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


@pytest.fixture(scope="module")
def lora_model(base_folder):
    return policy_model(base_folder)


def log_probs(model):
    """Inside `packed_attention`, which a recomputing backward needs too."""
    (micro_batch,) = pack_update(GROUPS, 512)
    return packed_logprobs(model, micro_batch).logps


def gradients(model, seed=7):
    """Of every trainable parameter by name, with the log-probs and the random state after them."""
    model.zero_grad()
    torch.manual_seed(seed)
    with packed_attention(model.config):
        logps = log_probs(model)
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"log-probs": logps.detach(), "random state": torch.get_rng_state(), **found}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize("kind", ["lora", "qlora", "full"])
def test_every_mixture_gives_the_same_gradients_bit_for_bit(base_folder, kind):
    model = policy_model(base_folder, kind)
    wanted = gradients(model)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all((wanted[name] != 0).any() for name in trained)
    mixtures = list(itertools.product(ACTIVATIONS, repeat=LAYERS))
    for policy in mixtures if kind == "lora" else mixtures[::4]:
        apply_activation_plan(model, policy)
        assert_equal(gradients(model), wanted)
    if kind != "full":
        assert not torch.equal(gradients(model, seed=8)["log-probs"], wanted["log-probs"])


def test_dropout_is_drawn_again_and_not_anew(lora_model, monkeypatch):
    """The test above must be able to fail: without the random state, gradients differ."""
    apply_activation_plan(lora_model, KEEP_ALL)
    wanted = gradients(lora_model)
    plain = activations.checkpoint
    monkeypatch.setattr(
        activations, "checkpoint", lambda *a, **k: plain(*a, preserve_rng_state=False, **k)
    )
    apply_activation_plan(lora_model, ("recompute",) * LAYERS)
    found = gradients(lora_model)
    assert any(not torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("policy", [KEEP_ALL, ("recompute", "offload", "keep"), ("offload",) * 3])
def test_what_lies_on_the_device_between_forward_and_backward(lora_model, policy):
    apply_activation_plan(lora_model, policy)
    inputs, outputs = [], []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage()))
        )
        for layer in decoder_layers(lora_model)
    ]
    hooks += [
        layer.mlp.act_fn.register_forward_hook(
            lambda _, args, out: outputs.append(StorageWeakRef(out.untyped_storage()))
        )
        for layer in decoder_layers(lora_model)
    ]
    with packed_attention(lora_model.config):
        logps = log_probs(lora_model)
        gc.collect()
        kept = [choice != "offload" for choice in policy]
        kept[0] &= policy[0] != "keep"  # its first norm is frozen and its input has no gradient
        assert [not ref.expired() for ref in inputs] == kept
        assert [not ref.expired() for ref in outputs] == [choice == "keep" for choice in policy]
        logps.sum().backward()
    del logps
    gc.collect()
    for hook in hooks:
        hook.remove()
    assert all(ref.expired() for ref in inputs + outputs)


def test_host_memory_is_given_back_layer_by_layer_and_after_a_failure(lora_model, monkeypatch):
    there = weakref.WeakSet()

    class Counted(activations.OffloadedActivation):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            there.add(self)

    monkeypatch.setattr(activations, "OffloadedActivation", Counted)
    apply_activation_plan(lora_model, ("offload",) * LAYERS)
    waiting, fails = [], False

    def in_backward(*_):
        waiting.append(len(there))
        if fails and len(waiting) == 2:
            raise ZeroDivisionError

    hooks = [m.mlp.register_full_backward_hook(in_backward) for m in decoder_layers(lora_model)]
    wanted = gradients(lora_model)
    assert waiting == [3, 2, 1]
    assert not there
    waiting, fails = [], True
    with pytest.raises(ZeroDivisionError):
        gradients(lora_model)
    assert waiting == [3, 2]
    gc.collect()
    assert not there
    for hook in hooks:
        hook.remove()
    assert_equal(gradients(lora_model), wanted)
    with torch.no_grad(), packed_attention(lora_model.config):
        log_probs(lora_model)
    assert not there


def test_two_backwards_of_one_graph(lora_model):
    apply_activation_plan(lora_model, ("recompute", "offload", "offload"))
    adapter = [p for n, p in lora_model.named_parameters() if p.requires_grad]
    with packed_attention(lora_model.config):
        total = log_probs(lora_model).sum()
        first = torch.autograd.grad(total, adapter, retain_graph=True)
        second = torch.autograd.grad(total, adapter)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_the_last_product_of_a_layer_is_not_recomputed(base_folder, monkeypatch):
    model = policy_model(base_folder, "qlora")
    kernel, calls = importlib.import_module("fastdpo_kernels.lora_linear"), []
    plain = kernel.dense_weight
    monkeypatch.setattr(kernel, "dense_weight", lambda *a: calls.append(a[0]) or plain(*a))
    for choice, again in (("keep", 0), ("recompute", 6), ("offload", 6)):
        apply_activation_plan(model, (choice,) * LAYERS)
        calls.clear()
        gradients(model)
        inputs = 4 + 7 * (LAYERS - 1)  # the first layer's input needs no gradient: not q, k and v
        assert len(calls) == 7 * LAYERS + again * LAYERS + inputs


def kernel_runs(model, choice):
    """How often attention kernels run in an update of these activations, and its gradients."""
    runs = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            if "attention" in name and "backward" not in name:
                runs.append(name)
            return function(*args, **(kwargs or {}))

    apply_activation_plan(model, (choice,) * LAYERS)
    with Counted():
        found = gradients(model)
    return len(runs), found


def test_a_layer_that_keeps_its_attention_does_not_run_it_again(tmp_path):
    config = copy.deepcopy(CONFIG)
    config.attention_dropout = 0.0
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = policy_model(tmp_path)
    kept, wanted = kernel_runs(model, "keep")
    assert kept >= LAYERS
    for choice, times in (("keep_attention", 1), ("recompute", 2)):
        runs, found = kernel_runs(model, choice)
        assert runs == times * kept, choice
        assert_equal(found, wanted)
    with packed_attention(model.config):
        apply_activation_plan(model, ("keep_attention",) * LAYERS)
        total = log_probs(model).sum()
        total.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="backward an extra time"):
            total.backward()
    assert_equal(gradients(model), wanted)


def test_what_no_kernel_returns_is_run_again_and_said_once(caplog):
    torch.manual_seed(0)
    config = Gemma2Config(**CONFIG_SIZES, head_dim=16, attn_logit_softcapping=5.0, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).train()
    wanted = gradients(model)
    dispatch._log_not_kept.cache_clear()
    apply_activation_plan(model, ("keep_attention",) * LAYERS)
    assert_equal(gradients(model), wanted)
    said = [r.getMessage() for r in caplog.records if "attention is run again" in r.message]
    assert len(said) == 1
    assert "since scores are capped" in said[0]


@pytest.mark.parametrize("kernels", ["eager", "fused"])
def test_one_dequantization_serves_recomputation_and_backward(base_folder, monkeypatch, kernels):
    model = policy_model(base_folder, "qlora", dropout=0.0)
    use_kernels(model, kernels, backend="torch")
    calls, living = [], []
    plain = bnb.functional.dequantize_4bit

    def counted(*arguments):
        dense = plain(*arguments)
        calls.append(weakref.ref(dense))
        living.append(sum(ref() is not None for ref in calls))
        return dense

    apply_activation_plan(model, KEEP_ALL)
    wanted = gradients(model)
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", counted)
    for choice in ("recompute", "keep_attention", "offload"):
        for once in (False, True):
            apply_activation_plan(model, (choice,) * LAYERS, dequantize_once=once)
            calls.clear()
            living.clear()
            assert_equal(gradients(model), wanted)
            # Forward and backward of each, less what the first layer's input needs no gradient of;
            # a recomputation does not come to its last product.
            least = 7 * LAYERS + 4 + 7 * (LAYERS - 1)
            assert len(calls) == least + 6 * LAYERS - once * (3 + 6 * (LAYERS - 1))
            assert max(living) <= (8 if once else 3), "of one layer alone"
            gc.collect()
            assert not [ref for ref in calls if ref() is not None], "none is left behind"


def test_a_policy_takes_the_place_of_checkpointing_and_says_what_is_wrong(lora_model):
    lora_model.gradient_checkpointing_enable()
    apply_activation_plan(lora_model, KEEP_ALL)
    assert not lora_model.is_activation_checkpointing, "neither a layer nor the backbone"
    apply_activation_plan(lora_model, ("keep", "recompute", "keep"))
    flags = [layer.gradient_checkpointing for layer in decoder_layers(lora_model)]
    assert flags == [False, True, False]
    with pytest.raises(ValueError, match="2 entries and the model 3"):
        apply_activation_plan(lora_model, ("keep",) * 2)
    with pytest.raises(ValueError, match=r"\['drop'\]: need keep, keep_att.*, offload"):
        apply_activation_plan(lora_model, ("keep", "drop", "keep"))
    assert flags == [layer.gradient_checkpointing for layer in decoder_layers(lora_model)]


def trained_weights(folder, out, prepare):
    model = load_model(str(folder), dtype=torch.float32)
    arguments = {"per_device_train_batch_size": 8, "max_steps": 3, "disable_tqdm": True}
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            str(out), learning_rate=1e-2, save_strategy="no", ref_cache="off",
            activation_checkpointing=False, micro_batch_tokens=128, **arguments,
        ),
        train_dataset=ROWS,
        processing_class=TOKENIZER,
        peft_config=lora_config(4, 8, 0.2, None),
    )  # fmt: skip
    prepare(trainer.policy)
    trainer.train()
    return {n: p.detach() for n, p in trainer.policy.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def trainer_base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trainer-base")
    config = copy.deepcopy(CONFIG)
    config.vocab_size = len(TOKENIZER)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_real_updates_are_the_same_under_a_mixture_and_with_rows_from_the_host(
    trainer_base, tmp_path
):
    wanted = trained_weights(trainer_base, tmp_path / "keep", lambda model: None)

    def prepare(model):
        apply_activation_plan(model, ("offload", "keep", "recompute"))
        assert embeddings_to_host(model) == len(TOKENIZER) * 64 * 4

    assert_equal(trained_weights(trainer_base, tmp_path / "mixture", prepare), wanted)
