"""Embedding rows served from host memory: the same numbers, names and files."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastdpo.modeling.embeddings import HostEmbedding, embeddings_to_host, ids_on_host
from fastdpo.modeling.weight_hash import base_tensors
from fastdpo.ref_cache.identity import reference_identity
from tests.modeling.test_activations import (
    CONFIG,
    assert_equal,
    gradients,
    policy_model,
    write_base,
)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


def test_rows_from_the_host_are_the_rows_of_the_table(base_folder, tmp_path):
    model = policy_model(base_folder)
    wanted, names = gradients(model), list(model.state_dict())
    identity = reference_identity(model, torch.float32)
    model.save_pretrained(tmp_path / "card")
    assert embeddings_to_host(model) == 131 * 64 * 4
    assert embeddings_to_host(model) == 0
    model.to("cpu", torch.float32)
    assert type(model.get_base_model().get_input_embeddings()) is HostEmbedding
    assert_equal(gradients(model), wanted)
    assert list(model.state_dict()) == names
    assert reference_identity(model, torch.float32) == identity
    model.save_pretrained(tmp_path / "host")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        first, second = ((tmp_path / side / name).read_bytes() for side in ("card", "host"))
        assert first == second
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name, tensor in base_tensors(merged).items():
        assert torch.equal(again[name], tensor), name


def test_moving_the_model_leaves_the_table_on_the_host(base_folder):
    model = policy_model(base_folder)
    embeddings_to_host(model)
    moved = model.to("meta").get_base_model()
    assert moved.get_input_embeddings().weight.device.type == "cpu"
    assert moved.device.type == "meta"


def test_tables_that_must_stay_are_left_and_named(base_folder, caplog):
    assert embeddings_to_host(policy_model(base_folder, "full")) == 0
    assert "they are trained" in caplog.text
    tied = copy.deepcopy(CONFIG)
    tied.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(tied).requires_grad_(False)
    before = model.get_input_embeddings().weight
    assert embeddings_to_host(model) == 0
    assert "the head shares the table" in caplog.text
    assert model.get_input_embeddings().weight is before


def test_ids_of_the_host_are_used_and_forgotten(monkeypatch):
    """The device is not asked for ids that the micro-batch had on the host."""
    table = HostEmbedding(7, 3)
    weight = table.weight.detach()
    del table.weight
    table.weight = weight
    model = SimpleNamespace(get_input_embeddings=lambda: table)
    monkeypatch.setattr("fastdpo.modeling.embeddings.unwrap_model", lambda model: model)
    ids = torch.tensor([[1, 2, 2]])
    elsewhere = torch.tensor([[0, 0, 0]])  # stands for ids on a device, which are not looked at
    with ids_on_host(model, ids):
        assert torch.equal(table(elsewhere), weight[ids])
        assert torch.equal(table(elsewhere[:, :2]), weight[elsewhere[:, :2]]), "another shape"
    assert torch.equal(table(elsewhere), weight[elsewhere])
    with ids_on_host(model, None):
        assert torch.equal(table(elsewhere), weight[elsewhere])
