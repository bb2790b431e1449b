"""Offloading, tiles, 4-bit layers, host embeddings and 8-bit optimizers on a CUDA device."""

import gc
import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fastdpo.batching import PromptGroup, pack_update
from fastdpo.modeling import activations
from fastdpo.modeling.activations import ACTIVATIONS, apply_activation_plan
from fastdpo.modeling.adapters import add_adapter, lora_config
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.embeddings import embeddings_to_host
from fastdpo.modeling.loading import load_model
from fastdpo.modeling.logprobs import packed_logprobs
from fastdpo.modeling.tiles import tile_mlps, tile_norms
from tests.failing_backward import backward_breaks_off

pytestmark = pytest.mark.gpu

LAYERS, HIDDEN, INNER, TOKENS = 6, 1024, 2816, 8192
CONFIG = LlamaConfig(
    vocab_size=4096, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=8192,
)  # fmt: skip
KEEP_ALL = ("keep",) * LAYERS
INPUT_BYTES = TOKENS * HIDDEN * 2


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def model(base_folder):
    torch.manual_seed(1)
    model = load_model(str(base_folder), dtype=torch.bfloat16, load_in_4bit=True)
    model = add_adapter(model, lora_config(16, 32, 0.1, None))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    yield model.train()
    del model
    gc.collect()
    torch.cuda.empty_cache()


def micro_batch():
    """One pair of TOKENS tokens: a prompt of half of them."""
    draw = np.random.default_rng(0)
    sizes = (TOKENS // 2, TOKENS // 4, TOKENS // 4)
    prompt, chosen, rejected = (draw.integers(0, 4096, n).astype(np.int32) for n in sizes)
    (row,) = pack_update([PromptGroup(prompt, (chosen, rejected))], TOKENS)
    return row.to("cuda")


def gradients(model, peak=None):
    model.zero_grad()
    torch.manual_seed(7)
    row = micro_batch()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with packed_attention(model.config):
        logps = packed_logprobs(model, row).logps
        (logps[0] - logps[1]).backward()
    torch.cuda.synchronize()
    if peak is not None:
        peak.append(torch.cuda.max_memory_allocated() - before)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"log-probs": logps.detach(), **found}


def assert_close(found, wanted, bound):
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        error = (tensor - wanted[name]).norm() / wanted[name].norm()
        assert error <= bound, f"{name}: {error:.1e}"


def test_mixtures_give_the_same_gradients(model):
    """To the order of atomic sums in the attention's backward; a copy too late is far off."""
    wanted = gradients(model)
    again = gradients(model)
    noise = max(float((again[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)
    draw = np.random.default_rng(0)
    mixtures = [(choice,) * LAYERS for choice in ACTIVATIONS]
    mixtures += [tuple(draw.choice(ACTIVATIONS, LAYERS)) for _ in range(20)]
    for policy in mixtures:
        apply_activation_plan(model, policy)
        found = gradients(model)
        assert torch.equal(found["log-probs"], wanted["log-probs"]), policy
        assert_close(found, wanted, max(1e-4, 4 * noise))
    print(f"run to run: {noise:.1e}")


def test_offloading_leaves_two_inputs_on_the_card_and_pins_the_rest(model, monkeypatch):
    peaks = []
    for choice in ("recompute", "offload"):
        apply_activation_plan(model, (choice,) * LAYERS)
        gradients(model)
        gradients(model, peaks)
    saved = peaks[0] - peaks[1]
    print(f"recompute {peaks[0] / 2**20:.0f}, offload {peaks[1] / 2**20:.0f} MiB")
    assert saved >= (LAYERS - 3) * INPUT_BYTES

    pinned = []
    plain = activations.OffloadedActivation.load

    def load(self):
        pinned.extend(page.is_pinned() for page in self._pages)
        return plain(self)

    monkeypatch.setattr(activations.OffloadedActivation, "load", load)
    gradients(model)
    assert len(pinned) == LAYERS * -(-INPUT_BYTES // activations.PAGE_BYTES)
    assert all(pinned)


def test_a_backward_that_breaks_off_harms_nothing(model):
    """Out of memory half way: copies under way must not write into what is allocated next."""
    apply_activation_plan(model, ("offload",) * LAYERS)
    wanted = gradients(model)
    noise = max(
        float((g - wanted[n]).norm() / wanted[n].norm()) for n, g in gradients(model).items()
    )
    gc.collect()
    before = torch.cuda.memory_allocated()
    for stop in itertools.islice(itertools.cycle(range(1, LAYERS)), 20):
        with backward_breaks_off(model, stop), pytest.raises(torch.OutOfMemoryError):
            gradients(model)
        filled = torch.ones(INPUT_BYTES, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        assert bool((filled == 1).all())
        del filled
        model.zero_grad()
        gc.collect()
        assert torch.cuda.memory_allocated() <= before
    assert_close(gradients(model), wanted, max(1e-4, 4 * noise))


def test_tiles_hold_less(model):
    apply_activation_plan(model, ("recompute",) * LAYERS)
    wanted, peaks = gradients(model), []
    gradients(model, peaks)
    tile_mlps(model, 1024)
    tiled = gradients(model)
    gradients(model, peaks)
    tile_norms(model, 1024)
    assert_close(gradients(model), tiled, 1e-2)
    gradients(model, peaks)
    print("plain, tiled MLPs, tiled norms too:", *(f"{p / 2**20:.0f} MiB" for p in peaks))
    # Compared without dropout, whose masks are drawn per tile.
    assert tiled.keys() == wanted.keys()
    assert peaks[1] <= peaks[0] - 2 * TOKENS * INNER * 2
    assert peaks[2] < peaks[1]


def test_tiles_change_nothing_but_rounding(base_folder):
    torch.manual_seed(1)
    model = load_model(str(base_folder), dtype=torch.bfloat16, load_in_4bit=True)
    model = add_adapter(model, lora_config(16, 32, 0.0, None)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    wanted = gradients(model)
    tile_mlps(model, 1024)
    tile_norms(model, 1024)
    assert_close(gradients(model), wanted, 2e-2)


def test_one_dequantized_matrix_at_a_time(base_folder):
    """What an MLP's three products hold beside their inputs and outputs is one matrix."""
    model = load_model(str(base_folder), dtype=torch.bfloat16, load_in_4bit=True)
    mlp = add_adapter(model, lora_config(16, 32, 0.0, None)).get_base_model().model.layers[0].mlp
    x = torch.randn(1, 16, HIDDEN, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        mlp(x).sum().backward()
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
    matrix = HIDDEN * INNER * 2
    print(f"{extra / 2**20:.2f} MiB beside a matrix of {matrix / 2**20:.2f} MiB")
    assert matrix <= extra <= 1.6 * matrix


def test_rows_from_the_host_are_those_of_the_card(model):
    wanted = gradients(model)
    gc.collect()
    before = torch.cuda.memory_allocated()
    saved = embeddings_to_host(model)
    assert saved == 4096 * HIDDEN * 2
    assert torch.cuda.memory_allocated() <= before - saved
    table = model.get_base_model().get_input_embeddings().weight
    assert table.device.type == "cpu"
    assert table.is_pinned()
    assert model.get_base_model().device.type == "cuda"
    assert torch.equal(gradients(model)["log-probs"], wanted["log-probs"])


def test_loading_in_4_bits_never_holds_the_dense_model(base_folder):
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_model(str(base_folder), dtype=torch.bfloat16, load_in_4bit=True)
    own = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    dense = sum(
        module.in_features * module.out_features * 2
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    )
    print(f"peak {peak / 2**20:.0f}, own {own / 2**20:.0f}, dense {dense / 2**20:.0f} MiB")
    assert peak <= own + 4 * HIDDEN * INNER * 2 < own + dense
