"""MLPs and norms run tile by tile: to rounding what they are in one piece, and never whole."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from fastdpo.batching import pack_update
from fastdpo.modeling.activations import apply_activation_plan, decoder_layers
from fastdpo.modeling.tiles import run_in_tiles, tile_mlps, tile_norms
from tests.modeling.test_activations import (
    GROUPS,
    KEEP_ALL,
    LAYERS,
    assert_equal,
    gradients,
    policy_model,
    write_base,
)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", ["lora", "qlora", "full"])
def test_tiles_change_nothing_but_rounding(base_folder, kind):
    model = policy_model(base_folder, kind, dropout=0.0)
    wanted = gradients(model)
    assert tile_mlps(model, 50) == LAYERS
    bound = 2e-2 if kind == "qlora" else 1e-5
    for policy in (KEEP_ALL, ("recompute", "offload", "keep")):
        apply_activation_plan(model, policy)
        found = gradients(model)
        assert found.keys() == wanted.keys()
        for name in wanted.keys() - {"random state"}:
            error = (found[name] - wanted[name]).norm() / wanted[name].norm()
            assert error <= bound, f"{name}: {error:.1e}"
    apply_activation_plan(model, KEEP_ALL)
    tile_mlps(model, None)
    assert_equal(gradients(model), wanted)


@pytest.mark.parametrize("kind", ["lora", "qlora", "full"])
def test_norms_in_tiles_change_nothing_but_the_order_of_sums(base_folder, kind):
    model = policy_model(base_folder, kind)
    wanted = gradients(model)
    assert tile_norms(model, 50) == 2 * LAYERS + 1
    for policy in (KEEP_ALL, ("recompute", "offload", "keep")):
        apply_activation_plan(model, policy)
        found = gradients(model)
        assert torch.equal(found["log-probs"], wanted["log-probs"])
        if kind == "qlora":
            assert_equal(found, wanted)
        for name in wanted.keys() - {"random state"}:
            error = (found[name] - wanted[name]).norm() / wanted[name].norm()
            assert error <= 1e-5, f"{name}: {error:.1e}"


def test_norms_in_tiles_save_their_input_and_work_tile_by_tile():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=131, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).requires_grad_(False)
    assert tile_norms(model, 50) == 2 * 4 + 1  # over queries and keys too, along the tokens
    norm, per_head = model.model.norm, model.model.layers[0].self_attn.q_norm
    for module, shape in ((norm, (1, 120, 64)), (per_head, (1, 120, 4, 16))):
        states = torch.randn(shape).bfloat16().requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            out = module(states)
        assert [t.data_ptr() for t in saved] == [states.data_ptr()]
        (found,) = torch.autograd.grad(out.float().square().sum(), states)
        tile_norms(model, None)
        plain = module(states)
        (wanted,) = torch.autograd.grad(plain.float().square().sum(), states)
        tile_norms(model, 50)
        assert torch.equal(out, plain)
        assert torch.equal(found, wanted)


def test_tiles_draw_their_dropout_again(base_folder):
    """Against the plain MLP run over the same tiles, with the same masks."""
    plain = policy_model(base_folder, dropout=0.3)
    tiled = copy.deepcopy(plain)
    tile_mlps(tiled, 32)
    states = torch.randn(1, 70, 64)
    results = []
    for model, cut in ((plain, 32), (tiled, 70)):
        mlp, leaf = decoder_layers(model)[0].mlp, states.clone().requires_grad_()
        torch.manual_seed(3)
        out = torch.cat([mlp(tile) for tile in leaf.split(cut, dim=1)], dim=1)
        after = torch.get_rng_state()
        out.square().sum().backward()
        assert torch.equal(torch.get_rng_state(), after)
        grads = [p.grad for p in mlp.parameters() if p.requires_grad]
        results.append([out.detach(), after, leaf.grad, *grads])
    assert len(results[0]) == 3 + 6
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(results[0][0], results[1][0])


def test_mixed_precision_reaches_the_tiles(base_folder):
    """In the backward too, which runs outside of autocast."""
    mlp = decoder_layers(policy_model(base_folder, "full"))[0].mlp
    states, dtypes, found = torch.randn(1, 70, 64), [], []
    mlp.act_fn.register_forward_hook(lambda _, args, out: dtypes.append(out.dtype))
    for tile in (None, 32):
        run_in_tiles([mlp], tile)
        leaf = states.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = mlp(leaf)
        mlp.zero_grad()
        out.float().sum().backward()
        found.append([out.detach(), leaf.grad, *(p.grad for p in mlp.parameters())])
    assert dtypes == [torch.bfloat16] * (1 + 3 + 3)
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= 1e-2 * other.norm()


def test_the_inside_of_a_tiled_mlp_is_never_there_whole(base_folder):
    model = policy_model(base_folder, dropout=0.0)
    tile_mlps(model, 64)
    sizes = []
    for layer in decoder_layers(model):
        layer.mlp.act_fn.register_forward_hook(lambda _, args, out: sizes.append(out.shape[-2]))
    apply_activation_plan(model, ("recompute",) * LAYERS)
    gradients(model)
    tokens = pack_update(GROUPS, 512)[0].input_ids.shape[1]
    assert max(sizes) == 64 < tokens
    assert sum(sizes) == 2 * LAYERS * tokens, "forward and backward, and not once more"
