"""Weights in host memory: the bits of resident ones, through every plan, order and failure."""

import copy
import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3Config,
)

from fastdpo.modeling import base_weights, host_blocks
from fastdpo.modeling.activations import ACTIVATIONS, apply_activation_plan, decoder_layers
from fastdpo.modeling.adapters import adapters_disabled, add_adapter, lora_config
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.base_weights import (
    host_weights,
    named_weights,
    weights_to_host,
    writable_weights,
)
from fastdpo.modeling.fused import use_kernels
from fastdpo.modeling.head import unwrap_model
from fastdpo.modeling.layout import ExecutionLayout
from fastdpo.modeling.loading import load_model
from fastdpo.modeling.scoring import score_pairs
from fastdpo.modeling.weight_hash import base_tensors, load_fingerprint, tensors_hash
from tests.modeling.test_activations import GROUPS, assert_equal, gradients, log_probs

LAYERS = 5
SIZES = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "attention_dropout": 0.1,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES, attention_bias=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "gemma2": Gemma2Config(
        **SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=9,
        layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    ),
    "mixtral": MixtralConfig(**SIZES, num_experts_per_tok=2, num_local_experts=4),
}  # fmt: skip
CPU = torch.device("cpu")
ONE_LAYER, TWO_LAYERS = 1, 2**18
"""Sizes from which a layer of the tiny models here is a block by itself, or two layers are."""
MIXTURE = ("recompute", "keep", "offload", "keep_attention", "keep")


@pytest.fixture(autouse=True)
def one_layer_a_block(monkeypatch):
    monkeypatch.setattr(host_blocks, "SMALL_BYTES", ONE_LAYER)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of each family's base."""
    found = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        found[name] = str(tmp_path_factory.mktemp(name))
        AutoModelForCausalLM.from_config(copy.deepcopy(config)).save_pretrained(found[name])
    return found


def policy_of(folder, *, on_host, kind="lora", targets=None, dropout=0.25):
    """In train mode, its adapter's B not zero."""
    dtype = torch.bfloat16 if kind == "qlora" else torch.float32
    model = load_model(
        folder, dtype=dtype, load_in_4bit=kind == "qlora",
        base_weights="host" if on_host else "gpu",
    )  # fmt: skip
    torch.manual_seed(1)
    model = add_adapter(model, lora_config(4, 8, dropout, targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def plans(count, seed=0):
    """Activation plans: each choice for all layers, and mixtures."""
    draw = np.random.default_rng(seed)
    uniform = [(choice,) * LAYERS for choice in ACTIVATIONS]
    return uniform + [tuple(draw.choice(ACTIVATIONS, LAYERS).tolist()) for _ in range(count)]


def reference(model):
    """The log-probs of the model with its adapter off."""
    with torch.no_grad(), packed_attention(model.config), adapters_disabled(model):
        return log_probs(model)


@pytest.fixture
def order(monkeypatch):
    """What a model asks for and fetches: ("F" or "B", layer) for a use, ("c", layer) for a copy."""
    events = []
    fetch, use = base_weights.HostWeights._fetch, base_weights.HostWeights._use

    def recorded_fetch(self, layer):
        events.append(("c", layer))
        fetch(self, layer)

    def recorded_use(self, layer, direction):
        events.append(("F" if direction == base_weights.FORWARD else "B", layer))
        use(self, layer, direction)

    monkeypatch.setattr(base_weights.HostWeights, "_fetch", recorded_fetch)
    monkeypatch.setattr(base_weights.HostWeights, "_use", recorded_use)
    return events


@pytest.mark.parametrize(
    ("family", "kind", "targets"),
    [
        ("llama", "lora", None),
        ("llama", "qlora", None),
        ("llama", "lora", ["q_proj", "down_proj"]),  # the others save views of their weights
        ("qwen3", "lora", None),
        ("gemma2", "lora", None),
        ("mixtral", "lora", ["q_proj", "v_proj"]),
    ],
)
def test_gradients_are_those_of_resident_weights_bit_for_bit(folders, family, kind, targets):
    resident = policy_of(folders[family], on_host=False, kind=kind, targets=targets)
    wanted, without_adapter = gradients(resident), reference(resident)
    model = policy_of(folders[family], on_host=True, kind=kind, targets=targets)
    weights = host_weights(model)
    for number, plan in enumerate(plans(4)):
        weights.use_buffers(2 + number % 3)
        apply_activation_plan(model, plan)
        assert_equal(gradients(model), wanted)
        assert torch.equal(reference(model), without_adapter)
    assert weights.buffer_bytes < weights.host_bytes


def test_the_order_of_copies(folders, order):
    """As the table at the head of the module has it, whatever the layers leave."""
    model = policy_of(folders["llama"], on_host=True)
    later = "F1 c2 F2 c3 F3 c4 F4 B4 B3 c2 B2 c1 B1 c0 B0"
    for number, plan in enumerate(plans(4)):
        apply_activation_plan(model, plan)
        order.clear()
        gradients(model)
        # At first nothing is there; later the first two layers have stayed from the backward.
        wanted = later if number else f"F0 c0 c1 {later}"
        assert " ".join(f"{kind}{layer}" for kind, layer in order) == wanted, plan


def test_small_layers_share_a_block(folders, order, monkeypatch):
    """Three blocks of two layers, two and one: asked for by each layer, fetched once."""
    monkeypatch.setattr(host_blocks, "SMALL_BYTES", TWO_LAYERS)
    wanted = gradients(policy_of(folders["llama"], on_host=False))
    model = policy_of(folders["llama"], on_host=True)
    later = "F0 F1 c2 F1 F2 B2 B1 c0 B1 B0 B0"
    for number, plan in enumerate(plans(4)):
        apply_activation_plan(model, plan)
        order.clear()
        assert_equal(gradients(model), wanted)
        found = " ".join(f"{kind}{block}" for kind, block in order)
        if not number:
            assert found == f"F0 c0 c1 {later}"
        else:  # the first layers have stayed from the backward, and are not asked for again
            assert found == later.removeprefix("F0 "), plan


def test_a_weight_that_was_replaced_is_refused(folders):
    """As a safe merge does, which would be lost when the layer comes from the host again."""
    model = policy_of(folders["llama"], on_host=True)
    gradients(model)
    model.merge_adapter(safe_merge=True)
    with pytest.raises(RuntimeError, match=r"was replaced .*base_weights='gpu' to merge"):
        reference(model)


def test_what_is_written_to_the_weights_is_computed_with(folders):
    model = policy_of(folders["llama"], on_host=True)
    before = gradients(model)
    name = "base_model.model.model.layers.1.mlp.up_proj.base_layer.weight"
    with torch.no_grad():
        writable_weights(model)[name].mul_(2)
    after = gradients(model)
    resident = policy_of(folders["llama"], on_host=False)
    with torch.no_grad():
        writable_weights(resident)[name].mul_(2)
    assert_equal(after, gradients(resident))
    assert not torch.equal(after["log-probs"], before["log-probs"])


def fetched_when_wanted(order):
    """The layers whose copy begins when they are to compute, and not while another does."""
    found, computing = [], None
    for kind, layer in order:
        if kind != "c":
            computing = layer
        elif layer == computing:
            found.append(layer)
    return found


def test_more_buffers_stand_for_resident_layers(folders, order):
    model = policy_of(folders["llama"], on_host=True)
    wanted = gradients(model)
    for count in range(2, LAYERS + 1):
        host_weights(model).use_buffers(count)
        assert_equal(gradients(model), wanted)
        order.clear()
        assert_equal(gradients(model), wanted)
        fetched = [layer for kind, layer in order if kind == "c"]
        assert fetched == [*range(count, LAYERS), *reversed(range(LAYERS - count))]
        assert not fetched_when_wanted(order)


def test_passes_without_gradients_come_round(folders, order):
    """The first layer is fetched while the last one computes, where it has another buffer."""
    model = policy_of(folders["llama"], on_host=True, dropout=0.0).eval()
    host_weights(model).use_buffers(3)
    with torch.no_grad(), packed_attention(model.config):
        log_probs(model)
        order.clear()
        log_probs(model)
    assert order[-2:] == [("F", LAYERS - 1), ("c", 0)]
    assert not fetched_when_wanted(order)


def weights_are_whole(model, hashed):
    return tensors_hash(base_tensors(unwrap_model(model))) == hashed


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_failures_harm_nothing_and_leave_nothing(folders, kind):
    model = policy_of(folders["llama"], on_host=True, kind=kind)
    apply_activation_plan(model, MIXTURE)
    wanted = gradients(model)
    hashed = tensors_hash(base_tensors(unwrap_model(model)))
    there = []

    def noted(_, inputs):
        there.append(StorageWeakRef(inputs[0].untyped_storage()))

    layers = decoder_layers(model)
    noting = [layer.register_forward_pre_hook(noted) for layer in layers]
    for attempt in range(20):
        calls = itertools.count()

        def fail(*_, calls=calls, at=attempt % LAYERS):
            if next(calls) == at:
                raise ZeroDivisionError

        place = "register_full_backward_hook" if attempt % 2 else "register_forward_hook"
        failing = [getattr(layer.mlp, place)(fail) for layer in layers]
        with pytest.raises(ZeroDivisionError):
            gradients(model)
        for hook in failing:
            hook.remove()
        assert weights_are_whole(model, hashed), attempt
    model.zero_grad()
    gc.collect()
    assert all(ref.expired() for ref in there), "inputs of layers are left"
    for hook in noting:
        hook.remove()
    assert_equal(gradients(model), wanted)


def test_a_copy_that_fails_is_made_again(folders, monkeypatch):
    model = policy_of(folders["llama"], on_host=True)
    wanted = gradients(model)
    hashed = tensors_hash(base_tensors(unwrap_model(model)))
    start, calls = base_weights.Copies.start, itertools.count()

    def fails(self, target, source):
        if next(calls) % 4 == 3:
            raise torch.OutOfMemoryError("injected")
        return start(self, target, source)

    with monkeypatch.context() as failing:
        failing.setattr(base_weights.Copies, "start", fails)
        for _ in range(4):
            with pytest.raises(torch.OutOfMemoryError):
                gradients(model)
            assert weights_are_whole(model, hashed)
    assert_equal(gradients(model), wanted)


def test_what_reads_the_weights_reads_them_at_any_time(folders):
    resident = policy_of(folders["llama"], on_host=False)
    model = policy_of(folders["llama"], on_host=True)
    wanted = base_tensors(unwrap_model(resident))
    for updates in range(3):
        if updates:
            gradients(model)
        assert_equal(base_tensors(unwrap_model(model)), wanted)
        assert set(dict(named_weights(model))) == {n for n, _ in resident.named_parameters()}
        assert len(list(model.parameters())) < len(list(resident.parameters()))
        apply_activation_plan(model, ("recompute",) * LAYERS)
    assert load_fingerprint(unwrap_model(model), base_tensors(unwrap_model(model)))
    first, second = (m.merge_and_unload().state_dict() for m in (model, resident))
    assert_equal(first, second)


def test_a_base_is_saved_whole(folders, tmp_path):
    model = load_model(folders["mixtral"], dtype=torch.float32, base_weights="host")
    wanted = base_tensors(load_model(folders["mixtral"], dtype=torch.float32))
    score_pairs(model, GROUPS, ExecutionLayout(256))
    model.save_pretrained(tmp_path)
    assert_equal(base_tensors(load_model(str(tmp_path), dtype=torch.float32)), wanted)


def test_generation_and_scores_between_updates(folders):
    resident = policy_of(folders["qwen3"], on_host=False, dropout=0.0)
    model = policy_of(folders["qwen3"], on_host=True, dropout=0.0)
    prompt = torch.arange(5, 20)[None]
    found, wanted = [], []
    for results, each in ((found, model), (wanted, resident)):
        for _ in range(2):
            results.append(gradients(each)["log-probs"])
            each.eval()
            results.append(each.generate(prompt, max_new_tokens=5, do_sample=False))
            results.append(score_pairs(each, GROUPS, ExecutionLayout(256)).token_logps)
            with torch.inference_mode():
                results.append(each(prompt).logits.clone())
            each.train()
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_two_graphs_at_a_time(folders):
    """Backwards in another order than the forwards: layers are fetched when they are wanted."""

    def both(model):
        with packed_attention(model.config):
            torch.manual_seed(3)
            one, other = log_probs(model).sum(), log_probs(model).square().sum()
            one.backward(retain_graph=True)
            other.backward()
            one.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    targets = ["q_proj", "down_proj"]
    wanted = both(policy_of(folders["llama"], on_host=False, targets=targets))
    model = policy_of(folders["llama"], on_host=True, targets=targets)
    for plan in (("keep",) * LAYERS, ("recompute", "keep", "offload", "recompute", "keep")):
        model.zero_grad()
        apply_activation_plan(model, plan)
        assert_equal(both(model), wanted)


def test_fused_layers(folders):
    resident = policy_of(folders["qwen3"], on_host=False, dropout=0.0)
    model = policy_of(folders["qwen3"], on_host=True, dropout=0.0)
    for each in (resident, model):
        use_kernels(each, "fused", backend="torch")
    apply_activation_plan(model, MIXTURE)
    assert_equal(gradients(model), gradients(resident))


def test_host_memory_is_taken_once(folders, monkeypatch):
    """A layer's tensors as they were loaded are gone before the next layer's block is taken."""
    before, left = [], []
    block, init = base_weights.HostBlock, base_weights._Block.__init__

    def noted(size, device):
        left.append(sum(not ref.expired() for ref in before))
        return block(size, device)

    def watched(self, layers, device, shared):
        loaded = [w for *_, w in base_weights._own_matrices(layers, shared)]
        mine = [StorageWeakRef(weight.untyped_storage()) for weight in loaded]
        init(self, layers, device, shared)
        before.extend(mine)

    monkeypatch.setattr(base_weights, "HostBlock", noted)
    monkeypatch.setattr(base_weights._Block, "__init__", watched)
    load_model(folders["llama"], dtype=torch.float32, base_weights="host")
    assert len(left) == LAYERS
    assert len(before) == 7 * LAYERS
    assert not any(left)


def test_weights_that_layers_share_and_small_ones_stay(folders):
    model = load_model(folders["llama"], dtype=torch.float32)
    layers = decoder_layers(model)
    layers[3].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    names = {n for n, _ in model.named_parameters()}
    weights = weights_to_host(model, CPU)
    assert weights_to_host(model, CPU) is weights
    kept = {n for n, _ in model.named_parameters()}
    small = {n for n in names if "layers" not in n or "norm" in n or "bias" in n}
    assert kept == small | {"model.layers.1.mlp.up_proj.weight"}
    assert weights.host_bytes == sum(t.nbytes for n, t in named_weights(model) if n not in kept)


def test_buffers_that_are_released_are_freed_and_taken_again(folders, monkeypatch):
    model = policy_of(folders["llama"], on_host=True)
    wanted, weights = gradients(model), host_weights(model)
    model.zero_grad()
    memory = [StorageWeakRef(b.memory.untyped_storage()) for b in weights._buffers]
    assert len(memory) == 2
    weights.release()
    gc.collect()
    assert all(each.expired() for each in memory)
    assert weights.buffer_bytes == 0
    with monkeypatch.context() as failing:
        failing.setattr(base_weights, "Buffer", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gradients(model)
    assert_equal(gradients(model), wanted)
    assert weights.buffer_bytes > 0


def test_layers_that_are_not_known_one_by_one_are_refused(folders, monkeypatch):
    monkeypatch.setattr(base_weights, "supports_checkpointing", lambda _: False)
    with pytest.raises(ValueError, match=r"not known one by one.*leave out --base_weights"):
        load_model(folders["llama"], dtype=torch.float32, base_weights="host")


def test_a_model_and_its_host_memory_go_together(folders):
    model = policy_of(folders["llama"], on_host=True)
    gradients(model)
    weights = weakref.ref(host_weights(model))
    blocks = [StorageWeakRef(block.host.untyped_storage()) for block in weights()._blocks]
    del model
    gc.collect()
    assert weights() is None
    assert all(block.expired() for block in blocks)
