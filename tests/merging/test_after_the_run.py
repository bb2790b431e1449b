"""What GGUF converters and vLLM ask of a result, by its names and configs; neither is run here."""

import json
import re
from pathlib import Path

import pytest
from peft import LoraConfig
from safetensors.torch import load_file

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
