"""What GGUF converters and vLLM ask of a result, by its names and configs; neither is run here."""

import json
import re
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from fastdpo import merge
from tests.merging.test_merge import llama, make, workplace  # noqa: F401

SERVED = r"base_model\.model\.(model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj)\.lora_(A|B)\.weight"


@pytest.fixture
def result(workplace):  # noqa: F811
    make(llama(), LoraConfig(r=4, target_modules="all-linear"), shards=False)
    merge.main(["--adapter", "adapter"])
    return workplace


def test_every_tensor_of_a_merged_model_has_a_gguf_name(result):
    gguf = pytest.importorskip("gguf", reason="the names are those of the package gguf")
    config = json.loads(Path("merged/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    unnamed = [
        name
        for name in load_file("merged/model.safetensors")
        if names.get_name(name, try_suffixes=(".weight", ".bias")) is None
    ]
    assert not unnamed


FAMILIES = {
    "QWEN2": Qwen2Config, "QWEN3": Qwen3Config, "GEMMA3": Gemma3TextConfig, "LLAMA": LlamaConfig,
}  # fmt: skip


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_weight_and_every_layer_with_an_adapter_has_a_gguf_name(architecture):
    gguf = pytest.importorskip("gguf", reason="the names are those of the package gguf")
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}  # fmt: skip
    model = AutoModelForCausalLM.from_config(FAMILIES[architecture](**sizes))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], 1)
    plain = list(model.state_dict())
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    adapter = [name.split(".lora_")[0] for name in get_peft_model_state_dict(model)]
    plain += [f"{name.removeprefix('base_model.model.')}.weight" for name in adapter]
    unnamed = [n for n in plain if names.get_name(n, try_suffixes=(".weight", ".bias")) is None]
    assert adapter
    assert not unnamed


def test_an_adapter_is_laid_out_as_vllm_reads_it(result):
    """Module names of the served model, an A and a B each, and no kind of LoRA that it lacks."""
    tensors = load_file("adapter/adapter_model.safetensors")
    matches = [re.fullmatch(SERVED, name) for name in tensors]
    assert all(matches)
    parts = {(match[1], match[3]) for match in matches if match}
    modules = {module for module, _ in parts}
    assert parts == {(module, part) for module in modules for part in "AB"}
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["bias"], config["use_dora"], config["modules_to_save"]) == ("none", False, None)
    targets = {name.rpartition(".")[2] for name in config["target_modules"]}
    assert {name.rpartition(".")[2] for name in modules} == targets
    ranks = {t.shape[0] for n, t in tensors.items() if n.endswith("lora_A.weight")}
    assert ranks == {config["r"]}
