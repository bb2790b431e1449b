"""Text through models that see or hear: the language model is trained, and saved with the rest."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma4Config,
    Gemma4UnifiedConfig,
    Llama4Config,
    Mistral3Config,
    Qwen3_5Config,
)

from fastdpo import merge
from fastdpo.modeling.adapters import adapters_disabled
from fastdpo.modeling.head import get_backbone
from fastdpo.modeling.loading import load_model
from fastdpo.modeling.multimodal import other_towers
from fastdpo.modeling.scoring import score_pairs
from fastdpo.planner.architecture import architecture_named, architecture_of
from fastdpo.trainer.prepare import load_policy
from tests.modeling.test_packed_pairs import separate
from tests.tiny_trainer import ROWS, TOKENIZER, tiny_trainer

TEXT = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
EYES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
IMAGE = {"image_token_index": 280, "boi_token_index": 281, "eoi_token_index": 282}


def config_of(family):
    if family == "gemma3":
        text = TEXT | {"model_type": "gemma3_text", "sliding_window": 16}
        eyes = EYES | {"model_type": "siglip_vision_model"}
        return Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4, **IMAGE)
    if family == "gemma4":
        own = {
            "sliding_window": 16, "global_head_dim": 16, "vocab_size_per_layer_input": 288,
            "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
        }  # fmt: skip
        eyes = EYES | {"num_key_value_heads": 2, "head_dim": 16}
        del eyes["image_size"]
        return Gemma4Config(
            text_config=TEXT | own, vision_config=eyes, audio_config=None, image_token_id=280
        )
    if family == "gemma4_unified":
        own = {
            "sliding_window": 16, "global_head_dim": 32, "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
        }  # fmt: skip
        eyes = {"patch_size": 8, "mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64}
        return Gemma4UnifiedConfig(
            text_config=TEXT | own, vision_config=eyes, audio_config=None, image_token_id=280
        )
    if family == "qwen3_5":
        own = {
            "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
            "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        }  # fmt: skip
        eyes = {
            "hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 2,
            "patch_size": 8, "out_hidden_size": 64,
        }  # fmt: skip
        tokens = (
            "image_token_id",
            "video_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
        )
        ids = dict(zip(tokens, range(280, 284), strict=True))
        return Qwen3_5Config(text_config=TEXT | own, vision_config=eyes, **ids)
    if family == "llama4":
        own = {
            "intermediate_size_mlp": 96, "num_local_experts": 2, "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
        }  # fmt: skip
        eyes = EYES | {
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        }
        return Llama4Config(text_config=TEXT | own, vision_config=eyes, **IMAGE)
    text, eyes = TEXT | {"model_type": "mistral"}, EYES | {"model_type": "pixtral"}
    return Mistral3Config(text_config=text, vision_config=eyes, image_token_index=280)


FAMILIES = ("gemma3", "gemma4", "gemma4_unified", "qwen3_5", "llama4", "mistral3")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """The folder of a whole model, as it lies on the hub."""
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(config_of(request.param))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02 if "vision" in name else 0.1)
    path = tmp_path_factory.mktemp("models") / request.param
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def text_model(model):
    """The language model alone, as a causal LM of its own class, with the same weights."""
    config = copy.deepcopy(model.config.get_text_config())
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    config.tie_word_embeddings = head.weight is embeddings.weight
    alone = AutoModelForCausalLM.from_config(config).eval()
    get_backbone(alone).load_state_dict(get_backbone(model).state_dict())
    alone.get_output_embeddings().weight.data.copy_(head.weight.data)
    return alone


def test_log_probs_are_those_of_the_text_model(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path))
    model = load_model(str(folder), dtype=torch.float32)
    assert type(model).__name__.endswith("ForConditionalGeneration")
    groups = tiny_trainer(load_model(str(folder), dtype=torch.float32), tmp_path).eval_groups
    found = score_pairs(model.eval(), groups).logps
    alone = text_model(model)
    assert other_towers(alone) == []
    np.testing.assert_allclose(found, score_pairs(alone, groups).logps, rtol=1e-5)
    expected, _ = separate(alone, [groups[0], groups[1]])
    np.testing.assert_allclose(found[:2], expected, rtol=1e-5)
    of_whole, _ = separate(model, [groups[0], groups[1]])
    np.testing.assert_allclose(found[:2], of_whole, rtol=1e-5)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_trained_saved_and_loaded_again(folder, tmp_path, monkeypatch, tuning):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    before = load_file(folder / "model.safetensors")
    towers = other_towers(load_model(str(folder), dtype=torch.float32))
    assert towers
    model = load_model(str(folder), dtype=torch.float32)
    trainer = tiny_trainer(
        model, tmp_path / "out", tuning=tuning, rows=ROWS[:16], learning_rate=1e-3,
    )  # fmt: skip
    trainer.train()
    assert abs(trainer.first_update_margin) < 1e-3
    trained = {n for n, p in trainer.policy.named_parameters() if p.requires_grad}
    assert trained
    assert not any(tower in name for name in trained for tower in towers)
    trainer.save_model()
    expected = score_pairs(trainer.policy, trainer.eval_groups, trainer.layout).logps
    if tuning == "lora":
        out = str(tmp_path / "out")
        argv = ["--model", str(folder), "--adapter", out, "--output_dir", str(tmp_path / "merged")]
        merge.main(argv)
        whole = load_model(str(tmp_path / "merged"), dtype=torch.float32)
        assert type(whole) is type(model)
        merged = score_pairs(whole, trainer.eval_groups, trainer.layout).logps
        np.testing.assert_allclose(merged, expected, rtol=1e-4)
        with adapters_disabled(trainer.policy):
            base = score_pairs(trainer.policy, trainer.eval_groups, trainer.layout).logps
        assert not np.allclose(base, expected)
    else:
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["architectures"] == [type(trainer.policy).__name__]
        after = load_file(tmp_path / "out" / "model.safetensors")
        assert after.keys() == before.keys()
        changed = {name for name, each in after.items() if not torch.equal(each, before[name])}
        assert changed
        assert len(changed) < len(before)
    again = load_policy(str(tmp_path / "out"), dtype=torch.float32)
    found = score_pairs(again, trainer.eval_groups, trainer.layout).logps
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_plan_counts_what_is_loaded_and_trained(folder):
    model = load_model(str(folder), dtype=torch.float32)
    alone, found = architecture_of(text_model(model), "text"), architecture_of(model, "whole")
    towers = [model.get_submodule(path) for path in other_towers(model)]
    assert found.parameters == alone.parameters
    assert found.is_standard == alone.is_standard
    assert found.tower_bytes == sum(p.nbytes for tower in towers for p in tower.parameters()) > 0
    assert architecture_named(str(folder)).parameters == alone.parameters
