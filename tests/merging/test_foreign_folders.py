"""Folders that others wrote: their names and links lead nowhere, damaged weights are refused."""

import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from fastdpo import merge
from fastdpo.merging import find_base, read_adapter
from fastdpo.merging.tensor_files import tensors_of
from tests.merging.test_merge import edit_json, llama, make

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base of several files and an adapter that fits it."""
    folder = tmp_path_factory.mktemp("made")
    make(llama(), LoraConfig(r=4, target_modules=["q_proj"]), folder / "base", folder / "adapter")
    edit_json(folder / "adapter" / "adapter_config.json", base_model_name_or_path="base")
    return folder


@pytest.fixture
def workplace(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def everything(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def account_of(*names, **changes):
    account = {"made_by": merge_marker(), "complete": False, "base": "b", "adapter": "a"}
    return json.dumps({**account, "files": list(names), **changes})


def merge_marker():
    from fastdpo.merging.folder import MADE_BY

    return MADE_BY


ACCOUNTS = {
    "the folder above": account_of(".."),
    "the folder": account_of("."),
    "nothing": account_of(""),
    "a folder inside": account_of("thesis"),
    "a path": account_of("thesis/a.txt"),
    "an absolute path": account_of("/tmp/x"),
    "a Windows path": account_of("..\\\\x"),
    "another's file": account_of("notes.txt"),
    "a number": account_of(1),
    "no list": account_of(files="config.json"),
    "no state": json.dumps({"made_by": merge_marker(), "files": []}),
}


@pytest.mark.parametrize("kind", ACCOUNTS)
def test_an_account_that_names_more_than_a_merge_writes_removes_nothing(workplace, kind):
    merged = workplace / "merged"
    (merged / "thesis").mkdir(parents=True)
    (merged / "thesis" / "a.txt").write_text("years")
    (merged / "notes.txt").write_text("mine")
    (merged / "merge.json").write_text(ACCOUNTS[kind])
    before = everything(workplace)
    for extra in ([], ["--overwrite"]):
        with pytest.raises(ValueError, match="not an earlier merge"):
            merge.main(["--adapter", "adapter", *extra])
        assert everything(workplace) == before


def test_a_folder_of_a_files_name_is_not_removed(workplace):
    merged = workplace / "merged"
    (merged / "tokenizer.json").mkdir(parents=True)
    (merged / "tokenizer.json" / "a.txt").write_text("years")
    (merged / "merge.json").write_text(account_of("tokenizer.json"))
    with pytest.raises((ValueError, OSError), match=r"tokenizer\.json"):
        merge.main(["--adapter", "adapter", "--overwrite"])
    assert (merged / "tokenizer.json" / "a.txt").read_text() == "years"


@pytest.mark.parametrize(
    "name",
    ["../base/x.safetensors", "sub/x.safetensors", "ABSOLUTE", "..", "", "config.json", 7, None],
)
def test_a_weight_map_names_plain_files_alone(workplace, name):
    index = workplace / "base" / INDEX
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"].values()))
    target = str(workplace / "outside.safetensors") if name == "ABSOLUTE" else name
    for path in (workplace / "outside.safetensors", workplace / "base" / "x.safetensors"):
        shutil.copy(workplace / "base" / first, path)
    (workplace / "base" / "sub").mkdir()
    shutil.copy(workplace / "base" / first, workplace / "base" / "sub" / "x.safetensors")
    weight_map = {n: target if f == first else f for n, f in content["weight_map"].items()}
    index.write_text(json.dumps({**content, "weight_map": weight_map}))
    before = everything(workplace)
    with pytest.raises(ValueError, match=r"plain names of \.safetensors files"):
        merge.main(["--adapter", "adapter"])
    assert everything(workplace) == before


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": []}', "{}"])
def test_an_index_that_is_none_is_refused(workplace, content):
    (workplace / "base" / INDEX).write_text(content)
    with pytest.raises(ValueError, match=INDEX):
        merge.main(["--adapter", "adapter"])


LINKED = [
    "base/tokenizer.model", "base/LICENSE", "base/modeling_x.py", "base/config.json", "base/INDEX",
    "base/SHARD", "adapter/tokenizer_config.json", "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("path", [*LINKED, "base/LICENSE through another"])
def test_links_out_of_a_models_folder_are_refused(workplace, tmp_path, path):
    path, _, through = path.partition(" through ")
    shard = next(iter(tensor_file_names(workplace)))
    link = workplace / path.replace("INDEX", INDEX).replace("SHARD", shard)
    secret = tmp_path / "secret"
    if link.exists():
        link.rename(secret)
    else:
        secret.write_text("private")
    if through:
        (link.parent / "step").symlink_to(secret)
        link.symlink_to("step")
    else:
        link.symlink_to(secret)
    with pytest.raises(ValueError, match=r"is a link to .*secret, outside"):
        merge.main(["--adapter", "adapter"])
    assert not (workplace / "merged").exists()


def tensor_file_names(workplace):
    return sorted(path.name for path in (workplace / "base").glob("*.safetensors"))


def test_links_within_the_folder_and_to_the_hubs_blobs_are_followed(workplace):
    """As the hub's cache lays a model out: snapshots/COMMIT/name -> ../../blobs/HASH."""
    merge.main(["--adapter", "adapter", "--output_dir", "expected"])
    repository = workplace / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, path in enumerate(sorted((workplace / "base").iterdir())):
        path.rename(repository / "blobs" / f"{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    (snapshot / "LICENSE.txt").write_text("free")
    (snapshot / "LICENSE").symlink_to("LICENSE.txt")
    (workplace / "base").rmdir()
    (workplace / "base").symlink_to(snapshot)  # a folder that is itself a link is the user's own
    merge.main(["--adapter", "adapter"])
    for name in tensor_file_names(workplace):
        found, expected = load_file(f"merged/{name}"), load_file(f"expected/{name}")
        assert all(torch.equal(found[each], expected[each]) for each in expected)
    assert (workplace / "merged" / "LICENSE").read_text() == "free"
    assert not (workplace / "merged" / "LICENSE").is_symlink()


def test_what_is_no_ordinary_file_is_not_waited_for(workplace):
    config = workplace / "base" / "config.json"
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(ValueError, match=r"config\.json"):
        find_base("base")
    weights = workplace / "adapter" / "adapter_model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(ValueError, match="holds no adapter"):
        read_adapter(workplace / "adapter")


def safetensors_bytes(header, data=bytes(24), text=None, length=None):
    text = json.dumps(header).encode() if text is None else text
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape=(2, 3), dtype="F32", offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


MALFORMED = {
    "empty": b"",
    "length alone": (64).to_bytes(8, "little"),
    "header cut short": safetensors_bytes({"a": entry()})[:30],
    "endless header": safetensors_bytes({"a": entry()}, length=2**63),
    "no JSON": safetensors_bytes(None, text=b"{'a'"),
    "no object": safetensors_bytes([1]),
    "no UTF-8": safetensors_bytes(None, text=b'{"\xff": 1}'),
    "overlap": safetensors_bytes(
        {"a": entry((3,), "F32", (0, 12)), "b": entry((3,), "F32", (8, 20))}, bytes(20)
    ),
    "one range for two": safetensors_bytes({"a": entry(), "b": entry()}),
    "hole": safetensors_bytes(
        {"a": entry((3,), "F32", (0, 12)), "b": entry((3,), "F32", (16, 28))}, bytes(28)
    ),
    "bytes before": safetensors_bytes({"a": entry((2,), "F32", (16, 24))}),
    "bytes behind": safetensors_bytes({"a": entry()}, bytes(32)),
    "backwards": safetensors_bytes({"a": entry(offsets=(24, 0))}),
    "negative offset": safetensors_bytes({"a": entry(offsets=(-8, 16))}),
    "beyond the end": safetensors_bytes({"a": entry((4, 3), "F32", (0, 48))}),
    "other size": safetensors_bytes({"a": entry((2, 2))}),
    "unknown dtype": safetensors_bytes({"a": entry(dtype="F33")}),
    "negative shape": safetensors_bytes({"a": entry((-2, -3))}),
    "fractional shape": safetensors_bytes({"a": entry((2.0, 3))}),
    "shape beyond 64 bits": safetensors_bytes({"a": entry((2**62, 4, 4), "F32", (0, 0))}, b""),
    "metadata of numbers": safetensors_bytes({"__metadata__": {"a": 1}, "a": entry()}),
    "no dtype": safetensors_bytes({"a": {"shape": [6], "data_offsets": [0, 24]}}),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_safetensors_are_refused(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"a": entry()}))
    assert list(tensors_of(path)) == ["a"]
    path.write_bytes(MALFORMED[kind])
    with pytest.raises(ValueError, match=r"x\.safetensors is not a whole safetensors file"):
        tensors_of(path)
