"""What evaluate, score, merge and reference write: never onto what they read, found out at once."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastdpo import evaluate, merge, score
from fastdpo.cli.parser import command
from fastdpo.evaluation import load_both
from fastdpo.reference import main as reference_main
from fastdpo.system import files, results
from tests.evaluation.test_scored_rows import ADAPTER, made, workplace  # noqa: F401

EVALUATE = [*ADAPTER, "--num_completions", "0"]
MAINS = {"evaluate": evaluate.main, "score": score.main, "merge": merge.main}


def ends(monkeypatch, capsys, name, *argv):
    """The exit code of a command and what it said on standard error."""
    monkeypatch.setattr("sys.argv", [name, *argv])
    try:
        code = command(MAINS.get(name, reference_main))
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return code, said


def snapshot():
    return {path: path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}


@pytest.fixture
def loads_nothing(monkeypatch):
    """No model may be loaded before the refusal."""
    monkeypatch.setattr(load_both, "load_model", lambda *_, **__: pytest.fail("it was loaded"))
    monkeypatch.setattr(load_both, "load_tokenizer", lambda *_, **__: pytest.fail("loaded"))


@pytest.mark.parametrize(
    ("name", "output", "reader"),
    [
        ("evaluate", "rows.jsonl", "--dataset rows.jsonl"),
        ("score", "rows.jsonl", "--dataset rows.jsonl"),
        ("score", "base/../rows.jsonl", "--dataset rows.jsonl"),
        ("score", "link.jsonl", "--dataset rows.jsonl"),
        ("score", "hard.jsonl", "--dataset rows.jsonl"),
        ("evaluate", "adapter/adapter_config.json", "--adapter adapter"),
        ("evaluate", "adapter/config.json", "--adapter adapter"),
        ("evaluate", "base/model.safetensors", "--model base"),
        ("evaluate", "base/tokenizer.json", "--model base"),
        ("evaluate", "run.yaml", "--config run.yaml"),
        ("evaluate", "linked/adapter_config.json", "--adapter adapter"),
    ],
)
@pytest.mark.usefixtures("workplace", "loads_nothing")
def test_an_output_that_is_an_input_is_refused(monkeypatch, capsys, name, output, reader):
    Path("link.jsonl").symlink_to("rows.jsonl")
    os.link("rows.jsonl", "hard.jsonl")
    Path("linked").symlink_to("adapter")
    Path("run.yaml").write_text("beta: 0.2\n")
    before = snapshot()
    argv = [*ADAPTER, "--config", "run.yaml", "--output_file", output]
    code, said = ends(monkeypatch, capsys, name, *argv)
    assert code == 2
    flag, path = reader.split()
    assert f"--output_file {output} would overwrite or join {path}, which {flag} reads" in said
    assert snapshot() == before


@pytest.mark.usefixtures("workplace", "loads_nothing")
def test_relatives_that_are_inputs_too(monkeypatch, capsys):
    """The base that only the adapter names; the reference of a full model; a folder of data."""
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(Path("base").resolve())
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    Path("data").mkdir()
    shutil.copy("rows.jsonl", "data/train.jsonl")
    full = ["--model", "trained", "--reference", "base", "--dataset", "data"]
    before = snapshot()
    for argv, output in (
        (ADAPTER[2:], "base/config.json"),
        (full, "base/config.json"),
        (full, "trained/generation_config.json"),
        (full, "data/train.jsonl"),
        (full, "data/more.jsonl"),
    ):
        code, said = ends(monkeypatch, capsys, "evaluate", *argv, "--output_file", output)
        assert (code, snapshot() == before) == (2, True), output
        assert "would overwrite or join" in said


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("file/scores.jsonl", "Not a directory"),
        ("folder.jsonl", "Is a directory"),
        ("/proc/nowhere/scores.jsonl", "/proc/nowhere/scores.jsonl: "),
    ],
)
@pytest.mark.parametrize("name", ["score", "evaluate"])
@pytest.mark.usefixtures("workplace", "loads_nothing")
def test_an_impossible_output_is_found_before_the_work(monkeypatch, capsys, name, output, message):
    Path("file").write_text("x")
    Path("folder.jsonl").mkdir()
    before = snapshot()
    code, said = ends(monkeypatch, capsys, name, *ADAPTER, "--output_file", output)
    assert code == 2
    assert message in said
    assert snapshot() == before


@pytest.mark.usefixtures("workplace")
def test_what_is_said_is_said_before_it_is_written(monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdpo.cli.outputs.require_new_file", lambda *_: None)
    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate.main(EVALUATE)
    assert "preference accuracy" in capsys.readouterr().out


@pytest.mark.usefixtures("workplace")
def test_beside_the_model_an_evaluation_may_lie(capsys):
    """Twice: nobody reads a file of that name."""
    for _ in range(2):
        evaluate.main([*EVALUATE, "--output_file", "adapter/evaluation.json"])
    assert json.loads(Path("adapter/evaluation.json").read_text())["pairs"] == 5


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(("main", "name"), [(evaluate, "adapter/evaluation"), (score, "scores")])
def test_an_output_that_nobody_named_is_not_overwritten(capsys, main, name):
    ending = "json" if main is evaluate else "jsonl"
    for number in ("", "-2", "-3"):
        main.main(EVALUATE if main is evaluate else ADAPTER)
        assert f"written to {name}{number}.{ending}\n" in capsys.readouterr().out
        assert Path(f"{name}{number}.{ending}").is_file()


@pytest.mark.parametrize("name", ["manifest.json", "new.tar", "../hash_cache.json"])
def test_an_export_into_the_stores_is_refused(tmp_path, monkeypatch, capsys, name):
    store = tmp_path / "stores" / ("a" * 64)
    store.mkdir(parents=True)
    (store / "manifest.json").write_text("{}")
    file = store / name
    argv = ["export", "--ref_cache", str(tmp_path / "stores"), "--file", str(file)]
    code, said = ends(monkeypatch, capsys, "reference", *argv)
    assert code == 2
    assert "the folder of the stores: name a file elsewhere" in said
    assert (store / "manifest.json").read_text() == "{}"
    assert [path.name for path in store.iterdir()] == ["manifest.json"]


# Not finite


def spoil(folder, value, name="lora_A"):
    path = Path(folder) / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if name in key)
    tensors[key].view(-1)[2] = value
    save_file(tensors, path, {"format": "pt"})
    return key


COMMANDS = {
    "merge": ["--model", "base", "--adapter", "adapter"],
    "score": ADAPTER,
    "evaluate": EVALUATE,
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.usefixtures("workplace")
def test_an_adapter_that_is_not_finite_is_refused_by_name(monkeypatch, capsys, name, value):
    key = spoil("adapter", value, "lora_B" if name == "score" else "lora_A")
    code, said = ends(monkeypatch, capsys, name, *COMMANDS[name])
    assert code == 2
    assert f"the adapter in adapter is not finite: {key} (1 of" in said
    assert not any(Path(each).exists() for each in ("merged", "scores.jsonl", "evaluation.json"))


SCALES = {
    "lora_alpha": float("nan"),
    "lora_alpha ": float("inf"),
    "lora_alpha  ": 10**400,
    "lora_alpha   ": "16",
    "alpha_pattern": {"q_proj": float("inf")},
    "r": 0,
    "rank_pattern": {"q_proj": 0},
}


@pytest.mark.parametrize("name", ["merge", "evaluate"])
@pytest.mark.parametrize("key", SCALES)
@pytest.mark.usefixtures("workplace")
def test_a_scale_that_is_no_finite_number_is_refused_by_name(monkeypatch, capsys, name, key):
    path = Path("adapter/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key.strip(): SCALES[key]}))
    code, said = ends(monkeypatch, capsys, name, *COMMANDS[name])
    assert code == 2
    assert f"{key.strip()}" in said
    assert "adapter" in said
    assert "must be a" in said


@pytest.mark.usefixtures("workplace")
def test_a_merge_that_overflows_is_refused_by_name(monkeypatch, capsys):
    tensors = load_file("base/model.safetensors")
    half = {name: each.half() for name, each in tensors.items()}
    save_file(half, "base/model.safetensors", {"format": "pt"})
    path = Path("adapter/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 1e8}))
    code, said = ends(monkeypatch, capsys, "merge", *COMMANDS["merge"])
    assert code == 2
    assert "proj.weight" in said
    assert "is not finite in float16" in said
    assert not Path("merged/config.json").exists()


@pytest.mark.parametrize("name", ["score", "evaluate"])
@pytest.mark.usefixtures("workplace")
def test_a_model_that_is_not_finite_is_refused_by_name(monkeypatch, capsys, name):
    tensors = load_file("trained/model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, "trained/model.safetensors", {"format": "pt"})
    argv = ["--model", "trained", "--reference", "base", "--dataset", "rows.jsonl"]
    code, said = ends(monkeypatch, capsys, name, *argv)
    assert code == 2
    assert "rows.jsonl:1: the log-probs are [nan, nan] under the policy" in said
    assert "model.norm.weight" in said


# A result whose save was cut short


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.usefixtures("workplace")
def test_a_save_that_was_cut_short_is_completed_by_who_reads_it(monkeypatch, capsys, name):
    """The weights have their name already, the config does not: the state that a kill leaves."""
    folder = Path("adapter")
    Path(folder, results.MARKER).write_text("{}")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    staged = files.temporary_name(folder / "result")
    staged.mkdir()
    (folder / "adapter_config.json").rename(staged / "adapter_config.json")
    (staged / results.LISTING).write_text(json.dumps({"files": names}))
    assert ends(monkeypatch, capsys, name, *COMMANDS[name])[0] == 0
    assert (folder / "adapter_config.json").is_file()
    assert not staged.exists()


@pytest.mark.usefixtures("workplace")
def test_a_second_merge_into_the_same_folder_waits_outside(monkeypatch, capsys):
    Path("merged").mkdir()
    with files.exclusive_lock(Path("merged"), Path("locks")):
        code, said = ends(monkeypatch, capsys, "merge", *COMMANDS["merge"])
    assert code == 2
    assert "another process is writing into --output_dir merged" in said
