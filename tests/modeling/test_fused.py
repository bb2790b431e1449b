"""Fused layers in whole models, on the trainer's own path: against eager, undone, copied, named."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig
from transformers.activations import ACT2FN

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.batching import PromptGroup, pack_update
from fastdpo.modeling.activations import apply_activation_plan
from fastdpo.modeling.adapters import FusedLoraLinear, adapters_disabled, add_adapter, lora_config
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.fused import choose_kernels, kernels_of, runs_fused, use_kernels
from fastdpo.modeling.head import unwrap_model
from fastdpo.modeling.loading import eval_mode
from fastdpo.modeling.logprobs import packed_logprobs
from fastdpo.modeling.shared_input import SharedInput
from fastdpo.modeling.tiles import tile_mlps, tile_norms
from fastdpo.ref_cache.identity import reference_identity
from tests.fused_ops.layer_ops import error
from tests.fused_ops.test_layer_ops_families import FAMILIES, SIZES, model_of
from tests.modeling.test_packed_pairs import random_groups
from tests.tiny_trainer import CONFIG, ROWS, TOKENIZER

SUMS_WEIGHTS_LATE = ("llama", "mistral", "qwen2", "qwen3", "phi3", "cohere")
"""The gradient of a norm's weight is rounded after the sum over tokens, by transformers before."""

LORA_BOUND = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""Of stacked branches: the small products are of other shapes, so their sums in another order."""


def adapted(model, dropout=0.0, zero=False):
    torch.manual_seed(1)
    model = add_adapter(model, lora_config(4, 8, dropout, None))
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not zero:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


GROUPS = [
    PromptGroup(group.prompt_ids % 61, tuple(ids % 61 for ids in group.completions))
    for group in random_groups(count=3)
]


FEW = [PromptGroup(GROUPS[0].prompt_ids[:3], tuple(ids[:2] for ids in GROUPS[0].completions))]


def logps_of(model, groups=GROUPS):
    (micro_batch,) = pack_update(groups, 512)
    with packed_attention(unwrap_model(model).config):
        return packed_logprobs(model, micro_batch).logps


def run(model, groups=GROUPS):
    """Log-probs and every gradient of one packed micro-batch."""
    model.zero_grad()
    with packed_attention(unwrap_model(model).config):
        logps = logps_of(model, groups)
        (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return logps.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_trained_log_probs_are_those_of_eager_to_the_bit(family, dtype):
    model = model_of(family, dtype, 2).train()
    apply_activation_plan(model, ("recompute", "keep"))
    wanted, gradients = run(model)
    use_kernels(model, "fused", backend="torch")
    found, fused = run(model)
    assert torch.equal(found, wanted)
    for name, want in gradients.items():
        if dtype == torch.float32:
            assert error(fused[name], want) <= 5e-6, name
        elif family in SUMS_WEIGHTS_LATE and "norm" in name:
            assert error(fused[name], want) <= 1e-2, name
        else:
            assert torch.equal(fused[name], want), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_an_adapter_the_reference_is_eager_s_and_the_first_margin_zero(family, dtype):
    model = adapted(model_of(family, dtype, 2))
    apply_activation_plan(model, ("recompute", "keep"))
    wanted, gradients = run(model)
    with adapters_disabled(model), eval_mode(model), torch.no_grad():
        base = logps_of(model)
    use_kernels(model, "fused", backend="torch")
    found, fused = run(model)
    assert error(found, wanted) <= LORA_BOUND[dtype] / 10
    for name, want in gradients.items():
        assert error(fused[name], want) <= LORA_BOUND[dtype], name
    with adapters_disabled(model), eval_mode(model), torch.no_grad():
        assert torch.equal(logps_of(model), base)  # without adapter nothing is stacked
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    assert torch.equal(logps_of(model), base)
    apply_activation_plan(model, ("keep", "keep"))
    kept = run(model)[1]
    apply_activation_plan(model, ("recompute", "recompute"))
    for name, want in run(model)[1].items():
        assert torch.equal(kept[name], want), name


def test_eager_comes_back_to_the_bit_and_a_copy_stands_alone():
    model = adapted(model_of("qwen3", torch.float32, 2))
    wanted, gradients = run(model)
    use_kernels(model, "fused", backend="torch")
    fused, _ = run(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(run(other)[0], fused)
    for module in other.modules():
        if isinstance(module, FusedLoraLinear) and module.shared_input is not None:
            assert any(layer is module for layer in module.shared_input.layers)
    use_kernels(other, "eager")
    assert kernels_of(other) == "eager"
    found, back = run(other)
    assert torch.equal(found, wanted)
    for name, want in gradients.items():
        assert torch.equal(back[name], want), name


def test_tiles_and_fused_layers_in_either_order():
    model = adapted(model_of("llama", torch.float32, 2))
    wanted, gradients = run(model)
    tile_norms(model, 16)
    tile_mlps(model, 16)
    use_kernels(model, "fused", backend="torch")
    for _ in range(2):
        assert tile_norms(model, 16) == 0  # a fused norm holds nothing that a tile would bound
        assert tile_mlps(model, 16) == 2
        seen = []
        gate = unwrap_model(model).model.layers[0].mlp.gate_proj
        hook = gate.register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(given[0].shape[-2])
        )
        found, fused = run(model)
        hook.remove()
        assert max(seen) == 16
        assert error(found, wanted) <= 1e-6
        assert all(error(fused[n], want) <= 2e-5 for n, want in gradients.items())
    use_kernels(model, "eager")
    assert tile_norms(model, None) == 5
    tile_mlps(model, None)
    assert torch.equal(run(model)[0], wanted)


def says(caplog):
    return next(r for r in caplog.records if "Fused in the layers" in r.message)


def test_what_is_fused_and_what_is_not_is_said_once(caplog):
    caplog.set_level(logging.INFO)
    model = adapted(model_of("olmo2", torch.float32, 1))
    for _ in range(2):
        use_kernels(model, "fused")
    said = [r.message for r in caplog.records if "Fused in the layers" in r.message]
    assert said == [
        "Fused in the layers: 5 norms, 1 MLPs, 1 rotary embeddings, 5 LoRA layers stacked. As "
        "transformers computes it: Olmo2DecoderLayer: no norm reads the residual sum in the middle."
    ]


def granite():
    sizes = SIZES | {"pad_token_id": 0}
    return AutoModelForCausalLM.from_config(GraniteConfig(**sizes))


def odd_activation():
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, hidden_act="gelu_new"))


def python_gelu():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, hidden_act="gelu"))
    for layer in model.model.layers:
        layer.mlp.act_fn = ACT2FN["gelu_python"]
    return model


def replaced_forward():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    norm = model.model.layers[0].post_attention_layernorm
    own = norm.forward
    norm.forward = lambda x: own(x) * 2
    return model


def subclassed():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))

    class Louder(type(model.model.layers[0].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.layers[0].mlp.__class__ = Louder
    return model


def trained_norms():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["post_attention_layernorm"]
    )
    return add_adapter(model, config)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (granite, "granite is not in the table of families"),
        (odd_activation, "LlamaMLP: its activation is NewGELUActivation"),
        (python_gelu, "LlamaMLP: its activation is GELUActivation"),
        (replaced_forward, "LlamaRMSNorm: its forward has been replaced"),
        (subclassed, "everything else"),
        (trained_norms, "LlamaDecoderLayer: post_attention_layernorm is not plain"),
    ],
)
def test_what_the_ops_are_not_exact_for_stays_transformers_own(build, reason, caplog):
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    model = build()
    wanted = logps_of(model)
    use_kernels(model, "fused", backend="torch")
    assert reason in says(caplog).message
    assert torch.equal(logps_of(model), wanted)
    if build is granite:
        assert says(caplog).levelno == logging.WARNING
        assert not any(map(runs_fused, model.modules()))


def test_layers_on_one_input_are_stacked_only_where_they_are_plain_lora(monkeypatch):
    model = adapted(model_of("llama", torch.float32, 1), dropout=0.5)
    use_kernels(model, "fused", backend="torch")
    calls = []
    plain = SharedInput.output_of

    def noted(self, layer, x):
        out = plain(self, layer, x)
        calls.append(out is not None)
        return out

    monkeypatch.setattr(SharedInput, "output_of", noted)
    logps_of(model)
    assert calls == [False] * 5  # each has a mask of its own
    calls.clear()
    model.eval()
    stacked = logps_of(model)
    assert calls == [True] * 5
    attention = unwrap_model(model).model.layers[0].self_attn
    assert not attention.shared_input._waiting
    x = torch.randn(3, 48)
    q = attention.q_proj(x)
    assert len(attention.shared_input._waiting) == 2
    again = attention.q_proj(x)  # called twice on the same tensor: computed twice
    assert torch.equal(q, again)
    attention.k_proj(torch.randn(3, 48))  # of another tensor: nothing of the first is taken
    torch.testing.assert_close(logps_of(model), stacked)


def test_auto_is_eager_on_the_cpu_and_a_store_of_fused_log_probs_is_its_own():
    model = model_of("llama", torch.float32, 1)
    assert choose_kernels(model, "auto") == "eager"
    use_kernels(model, "auto")
    eager = reference_identity(model, torch.float32)
    assert "layers" not in eager  # as stores of releases before have it
    use_kernels(model, "fused")
    assert reference_identity(model, torch.float32) == eager | {"layers": "fused"}


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_run_fused_is_the_run_eager_to_rounding(tmp_path, tuning):
    curves = []
    for kernels in ("eager", "fused"):
        torch.manual_seed(0)
        args = DPOConfig(
            str(tmp_path / kernels), per_device_train_batch_size=8, max_steps=3, logging_steps=1,
            learning_rate=1e-2, use_cpu=True, disable_tqdm=True, report_to="none",
            ref_cache=str(tmp_path / "store"),
            save_strategy="no", kernels=kernels,
        )  # fmt: skip
        trainer = DPOTrainer(
            AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG)),
            args=args,
            train_dataset=ROWS,
            processing_class=TOKENIZER,
            peft_config=lora_config(4, 8, 0.0, None) if tuning == "lora" else None,
        )
        assert kernels_of(trainer.policy) == kernels == trainer.layout.kernels
        for module in trainer.policy.modules():
            if runs_fused(module):
                module.backend = "torch"  # auto is eager code on inputs as small as these
        trainer.train()
        assert trainer.first_update_margin == 0.0
        log = [line for line in trainer.state.log_history if "loss" in line]
        curves.append(torch.tensor([(line["loss"], line["grad_norm"]) for line in log]))
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in the interpreter")
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_the_kernels_with_adapters_kept_and_recomputed(family, soak):
    """What is written in place is what no other node has saved, with stacked adapters too."""
    if family != "llama" and not soak:
        pytest.skip("takes seconds in the interpreter; run by make soak")
    model = adapted(model_of(family, torch.bfloat16, 1))
    use_kernels(model, "fused", backend="torch")
    wanted, gradients = run(model, FEW)
    use_kernels(model, "fused", backend="triton")
    kept, found = run(model, FEW)
    assert error(kept, wanted) <= 5e-3
    for name, want in gradients.items():
        assert error(found[name], want) <= 4e-2, name
    apply_activation_plan(model, ("recompute",))
    again, recomputed = run(model, FEW)
    assert torch.equal(again, kept)
    for name, want in found.items():
        assert torch.equal(recomputed[name], want), name
