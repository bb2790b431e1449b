"""A plan and a layout for every family on a named GPU: what DPOTrainer does first on any GPU."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, XLMConfig

from fastdpo.batching import PairGroups, pack_update
from fastdpo.config import DPOConfig
from fastdpo.data import Pair, PairDataset
from fastdpo.modeling.activations import decoder_layers, supports_checkpointing
from fastdpo.modeling.adapters import add_adapter, lora_config
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.dropout import disable_dropout
from fastdpo.modeling.logprobs import packed_logprobs
from fastdpo.modeling.packing import choose_packing
from fastdpo.planner import UnplannableError, architecture_of, gpu_spec, plan_for_run
from fastdpo.planner.gpus import GPUSpec
from fastdpo.planner.terms import CONTEXT_BYTES
from fastdpo.trainer import layout as trainer_layout
from fastdpo.trainer.layout import choose_layout, group_lengths, plan_memory
from tests.modeling.test_dropout import ALL
from tests.modeling.test_packed_pairs import gradients, random_groups

GROUPS = PairGroups(
    PairDataset.from_pairs(
        Pair(g.prompt_ids, *g.completions, row=i) for i, g in enumerate(random_groups(3))
    )
)


def model_of(family, tuning):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(ALL[family]))
    return model if tuning == "full" else add_adapter(model, lora_config(4, 8, 0.0, None))


def planned(model, gpu, **options):
    mode = choose_packing(model)
    lengths = group_lengths(GROUPS, mode)
    config = DPOConfig("unused", report_to="none", use_cpu=True, **options)
    made = plan_for_run(
        model, config, lengths, pairs_per_update=8, scored_tokens=sum(lengths) // 2,
        max_seqlen=max(lengths), gpu=gpu, host_bytes=2**30,
    )  # fmt: skip
    return made, choose_layout(model, config, GROUPS, mode, made)


def update(model):
    """Log-probs and gradients of all pairs."""
    mode = choose_packing(model)
    (micro_batch,) = pack_update(
        GROUPS, 4096, packing=mode.packing, shared_prefix=mode.shared_prefix
    )
    model.zero_grad()
    with packed_attention(model.get_base_model().config, mode.attention):
        logps = packed_logprobs(model, micro_batch).logps
        logps.sum().backward()
    return logps.detach(), gradients(model)


@pytest.mark.parametrize("family", ALL)
def test_every_family_is_planned_and_laid_out(family):
    model = model_of(family, "lora").train()
    for module in model.modules():  # else recomputed layers draw others
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    roomy, layout = planned(model, gpu_spec("RTX 4090"))
    assert roomy.fits
    layers = len(decoder_layers(model)) if supports_checkpointing(model) else 0
    assert len(layout.activation_plan) == layers
    assert roomy.activation_counts == {"keep": len(roomy.activation_plan)}
    assert sum(roomy.terms.values()) == roomy.peak_bytes
    assert min(roomy.terms.values()) >= 0, roomy.terms
    parameters = sum(p.numel() for p in model.get_base_model().parameters() if not p.requires_grad)
    assert architecture_of(model, family).parameters == parameters
    chosen, layout = planned(model, gpu_spec("24GiB"), micro_batch_tokens=256)
    assert chosen.fits
    assert layout.micro_batch_tokens == 256


@pytest.mark.parametrize("family", ["falcon", "mamba", "gpt2", "opt", "mpt", "qwen3-moe", "bloom"])
def test_a_plan_that_saves_all_it_can_changes_no_number(family):
    model = model_of(family, "lora")
    disable_dropout(model.train())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    truth = update(model)
    tight, layout = planned(model, GPUSpec("tight", CONTEXT_BYTES + 2**20, 100, 900))
    assert not tight.fits
    assert set(layout.activation_plan) == {"offload"}
    layout.apply(model)
    found = update(model)
    assert torch.allclose(found[0], truth[0], rtol=1e-6)
    for name, gradient in truth[1].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("family", ["falcon", "mamba2", "gpt2", "xglm", "mixtral"])
def test_full_fine_tuning_is_planned_too(family):
    made, _ = planned(model_of(family, "full"), gpu_spec("80GiB"))
    assert made.fits


def test_what_cannot_be_counted_trains_without_a_plan_and_the_log_says_so(monkeypatch, caplog):
    model = model_of("llama", "lora")
    monkeypatch.setattr(
        "fastdpo.planner.architecture._layers", lambda _: (_ for _ in ()).throw(LookupError("odd"))
    )
    with pytest.raises(UnplannableError, match=r"cannot be planned \(LookupError: odd\)"):
        planned(model, gpu_spec("24GiB"))
    monkeypatch.setattr(
        trainer_layout, "plan_for_run", lambda *a, **k: planned(model, gpu_spec("24GiB"))[0]
    )
    monkeypatch.setattr(
        type(model.get_base_model()), "device", property(lambda _: torch.device("cuda"))
    )
    mode = choose_packing(model)
    config = DPOConfig("unused", report_to="none", use_cpu=True)
    assert plan_memory(model, config, GROUPS, mode, 8) is None
    assert "without a memory plan: the memory of" in caplog.text


def test_layers_that_cannot_be_recomputed_are_kept():
    model = AutoModelForCausalLM.from_config(
        XLMConfig(vocab_size=131, emb_dim=32, n_layers=2, n_heads=4, is_decoder=True, causal=True)
    )
    if supports_checkpointing(model):
        pytest.skip("this transformers can recompute them")
    made, layout = planned(model, GPUSpec("tight", CONTEXT_BYTES + 2**20, 100, 900))
    assert len(made.activation_plan) == 2
    assert (layout.activation_plan, layout.mlp_tile_tokens) == ((), None)
