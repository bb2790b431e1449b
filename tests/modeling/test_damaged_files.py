"""Models and tokenizers with damaged, cut or foreign files: one sentence each."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from fastdpo.modeling.adapters import add_adapter, load_adapter, lora_config
from fastdpo.modeling.loading import ModelError, load_model, load_tokenizer
from tests.tiny_trainer import TOKENIZER

CONFIG = LlamaConfig(
    vocab_size=288, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a tiny model, its tokenizer and, in `adapter`, an adapter."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG)
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    add_adapter(model, lora_config(2, 4, 0.0, None)).save_pretrained(folder / "adapter")
    edit_json("adapter/adapter_config.json", base_model_name_or_path=str(folder))(folder)
    return folder


def edit(path, change):
    path.write_bytes(change(path.read_bytes()))


def edit_json(name, **values):
    def damage(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def edit_tensors(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return damage


def in_shards(folder):
    """As a download that ended before its second file."""
    tensors = load_file(folder / WEIGHTS)
    weight_map = {name: f"model-0000{1 + (i > 3)}-of-00002.safetensors" for i, name in
                  enumerate(tensors)}  # fmt: skip
    (folder / WEIGHTS).unlink()
    first = "model-00001-of-00002.safetensors"
    save_file(
        {name: tensors[name] for name, file in weight_map.items() if file == first},
        folder / first, {"format": "pt"},
    )  # fmt: skip
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def wide(tensors):
    tensors["model.embed_tokens.weight"] = torch.zeros(300, 16)


DAMAGED_MODELS = {
    "half of the weights": lambda f: edit(f / WEIGHTS, lambda b: b[: len(b) // 2]),
    "no byte": lambda f: edit(f / WEIGHTS, lambda b: b""),
    "seven bytes": lambda f: edit(f / WEIGHTS, lambda b: b[:7]),
    "half of the header": lambda f: edit(f / WEIGHTS, lambda b: b[:200]),
    "zeros": lambda f: edit(f / WEIGHTS, lambda b: bytes(len(b))),
    "a long header": lambda f: edit(f / WEIGHTS, lambda b: b"\xff" * 8 + b[8:]),
    "no JSON": lambda f: edit(f / WEIGHTS, lambda b: b[:8] + b"x" + b[9:]),
    "a pointer of git LFS": lambda f: edit(f / WEIGHTS, lambda b: b"version https://git-lfs\n"),
    "a page of HTML": lambda f: edit(f / WEIGHTS, lambda b: b"<!doctype html>" * 9),
    "a missing tensor": edit_tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
    "a missing head": edit_tensors(lambda t: t.pop("lm_head.weight")),
    "a tensor of another shape": edit_tensors(wide),
    "a missing file of two": in_shards,
    "a wider config": edit_json("config.json", hidden_size=32),
    "a larger vocabulary": edit_json("config.json", vocab_size=300),
    "a config of more layers": edit_json("config.json", num_hidden_layers=3),
    "a config of fewer layers": edit_json("config.json", num_hidden_layers=1),
    "a config of text": edit_json("config.json", hidden_size="sixteen"),
    "a config of nulls": edit_json("config.json", num_attention_heads=None),
    "heads of no width": edit_json("config.json", num_attention_heads=0),
    "an unknown kind": edit_json("config.json", model_type="nothing", architectures=["Nothing"]),
    "half a config": lambda f: edit(f / "config.json", lambda b: b[: len(b) // 2]),
    "a config that is a list": lambda f: edit(f / "config.json", lambda b: b"[1, 2]"),
    "a config nested for ever": lambda f: edit(f / "config.json", lambda b: b"[" * 100_000),
}  # fmt: skip
DAMAGED_TOKENIZERS = {
    "half": lambda b: b[: len(b) // 2],
    "no byte": lambda b: b"",
    "an empty object": lambda b: b"{}",
    "a list": lambda b: b"[]",
    "an unknown model": lambda b: b.replace(b'"BPE"', b'"XXX"'),
    "no UTF-8": lambda b: b.replace(b"BPE", b"\xff\xfe\xfd"),
    "another type": lambda b: b.replace(b'"added_tokens": [', b'"added_tokens": 7, "x": ['),
}


def damaged(whole, tmp_path, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    damage(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGED_MODELS)
def test_a_damaged_model_is_refused_in_a_sentence(whole, tmp_path, damage):
    folder = damaged(whole, tmp_path, DAMAGED_MODELS[damage])
    with pytest.raises(ModelError, match=r"cannot load the model '.*damaged': .*\.$") as refused:
        load_model(str(folder), dtype=torch.float32)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", DAMAGED_TOKENIZERS)
def test_a_damaged_tokenizer_is_refused_in_a_sentence(whole, tmp_path, damage):
    folder = damaged(
        whole, tmp_path, lambda f: edit(f / "tokenizer.json", DAMAGED_TOKENIZERS[damage])
    )
    with pytest.raises(ModelError, match=r"cannot load the tokenizer of '.*damaged': .*\.$"):
        load_tokenizer(str(folder))


ADAPTER = "adapter/adapter_model.safetensors"
DAMAGED_ADAPTERS = {
    "half of the weights": lambda f: edit(f / ADAPTER, lambda b: b[: len(b) // 2]),
    "no byte": lambda f: edit(f / ADAPTER, lambda b: b""),
    "zeros": lambda f: edit(f / ADAPTER, lambda b: bytes(len(b))),
    "no file": lambda f: (f / ADAPTER).unlink(),
    "half a config": lambda f: edit(f / "adapter/adapter_config.json", lambda b: b[:300]),
    "a config that is a list": lambda f: edit(f / "adapter/adapter_config.json", lambda b: b"[]"),
    "a rank of text": edit_json("adapter/adapter_config.json", r="four"),
    "another rank": edit_json("adapter/adapter_config.json", r=4),
    "an unknown kind": edit_json("adapter/adapter_config.json", peft_type="NOTHING"),
    "modules that are not there": edit_json("adapter/adapter_config.json", target_modules=["no"]),
    "no regular expression": edit_json("adapter/adapter_config.json", target_modules="(a"),
    "one that runs for ever": edit_json(
        "adapter/adapter_config.json", target_modules=r"(([a-z_.0-9]+)+)+!"
    ),
    "a rank's that runs for ever": edit_json(
        "adapter/adapter_config.json", rank_pattern={r"(([a-z_.0-9]+)+)+!": 3}
    ),
    "an excluded one's that runs for ever": edit_json(
        "adapter/adapter_config.json", exclude_modules=r"(([a-z_.0-9]+)+)+!"
    ),
}  # fmt: skip


ADAPTER_SAID = {
    "": r"(the adapter in .*|holds no adapter .*)\.$",
    "no regular expression": r"has '\(a' as target_modules .* no regular expression .*\.$",
} | {
    damage: r"has patterns .* stopped after 0\.2 seconds of computing.*\.$"
    for damage in DAMAGED_ADAPTERS
    if "for ever" in damage
}


@pytest.mark.parametrize("damage", DAMAGED_ADAPTERS)
def test_a_damaged_adapter_is_refused_in_a_sentence(whole, tmp_path, damage, monkeypatch):
    monkeypatch.setattr("fastdpo.modeling.adapter_config.MOST_SECONDS", 0.2)
    folder = damaged(whole, tmp_path, DAMAGED_ADAPTERS[damage])
    model = AutoModelForCausalLM.from_config(CONFIG)
    with pytest.raises(ValueError, match=ADAPTER_SAID.get(damage, ADAPTER_SAID[""])) as refused:
        load_adapter(model, str(folder / "adapter"))
    assert "\n" not in str(refused.value)
