"""The examples, each run in process: what they say is so; their first lines tell the command."""

import importlib.util
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml

from fastdpo import train
from fastdpo.losses import LOSSES
from fastdpo.planner import Training, Workload, architecture_named, gpu_spec, make_plan
from tests.taught_llama import taught_llama

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(set(EXAMPLES.glob("*.py")) - {EXAMPLES / "example_inputs.py"})
CARDS = sorted(EXAMPLES.glob("*lora/*gb.yaml"), key=lambda path: (int(path.stem[:-2]), path))
BOUND = 1e-4


@pytest.fixture(autouse=True)
def temporary_files_go_with_the_test(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def main_of(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


# DPO


@pytest.fixture
def run(monkeypatch, tmp_path):
    """What an example's main returns on the taught Llama, after a few updates."""
    demo = taught_llama()
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)

    def run(name, *more, updates=8):
        given = ["--model", demo.model_dir, "--dataset", demo.train_file, "--learning_rate", 1e-3]
        given += ["--eval_dataset", demo.dev_file, "--max_steps", updates, "--output_dir", "out"]
        return main_of(name)([str(word) for word in (*given, *more)])

    return run


def test_basic_dpo(run, tmp_path):
    before, after = run("basic_dpo")
    assert before["eval_rewards/accuracies"] == 0.5
    assert after["eval_rewards/accuracies"] > 0.8
    assert after["eval_loss"] < before["eval_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_custom_dataset(run, capsys):
    hashes = run("custom_dataset")
    assert len(hashes) == 5
    assert len(set(hashes.values())) == 1
    assert "pair 1 of 240" in capsys.readouterr().out
    columns = ("prompt=context", "chosen=good", "rejected=bad")
    assert run("custom_dataset", "--dataset", "out/renamed.jsonl", "--columns", *columns) == hashes


def test_lora(run):
    moved, apart = run("lora", "--lora_target_modules", "q_proj", "o_proj")
    assert moved > 1e-3
    assert apart < 1e-4


def test_custom_loss(run, capsys):
    rewards = {name: metrics["eval_rewards/chosen"] for name, metrics in run("custom_loss").items()}
    assert rewards["DPO"] < -0.5, "too little training to show anything"
    assert rewards["DPO-Positive"] > rewards["DPO"] / 2
    assert "DPO-Positive" in capsys.readouterr().out


def test_compare_losses(run, capsys):
    losses = ["sigmoid", "ipo", "robust", "simpo", "sigmoid+sft"]
    results = run("compare_losses", "--losses", *losses)
    assert list(results) == losses
    for name, (before, after) in results.items():
        assert after["eval_loss"] < before["eval_loss"], name
        moved = [
            after[f"eval_logps/{s}"] - before[f"eval_logps/{s}"] for s in ("chosen", "rejected")
        ]
        assert moved[0] > moved[1], name
    assert "rejected logp" in capsys.readouterr().out


def test_the_losses_that_are_compared_exist(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    named = main_of("compare_losses").__globals__["LOSSES"]
    assert {part for name in named for part in name.split("+")} <= set(LOSSES)


def test_evaluate_held_out(run):
    evaluation = run("evaluate_held_out")
    assert evaluation.pairs == 60
    assert evaluation.preference.preference_accuracy > 0.8
    assert len(evaluation.completions) == 3
    again = run("evaluate_held_out", "--adapter", "out")
    assert again.policy == evaluation.policy


def test_sft_then_dpo(run):
    sft, dpo, (base, after_sft), (start, _) = run("sft_then_dpo")
    assert after_sft["eval_logps/chosen"] > base["eval_logps/chosen"]
    assert start["eval_logps/chosen"] == pytest.approx(after_sft["eval_logps/chosen"], abs=1e-4)
    assert start["eval_rewards/margins"] == 0.0 == dpo.first_update_margin
    assert "frozen copy" in dpo.reference.reference.description
    assert "adapter off" in sft.reference.reference.description


def test_sweep(run):
    computed, _, first = next(iter(results := run("sweep").values()))
    assert computed == 600, "two completions of 240 + 60 pairs"
    assert [count for count, *_ in results] == [600, 0, 0, 0]
    assert len({metrics["eval_loss"] for *_, metrics in results}) == 4
    assert first["eval_rewards/accuracies"] > 0.5


def test_loss_from_scratch(run):
    scratch, parts, trainer = run("loss_from_scratch").values()
    assert abs(scratch - 0.6931) > 1e-3, "policy and reference are one: nothing is compared"
    assert abs(scratch - parts) < 1e-5
    assert abs(scratch - trainer) < 1e-5


def test_without_a_model_it_is_the_demos(monkeypatch, tmp_path):
    """The demo itself is tested elsewhere; here, that its paths arrive."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    inputs = importlib.import_module("example_inputs")
    monkeypatch.setattr(inputs, "make_demo", lambda folder, report: taught_llama())
    parsed = inputs.parse("What it shows.", [], lora_r=8)
    assert Path(parsed.model).is_dir()
    assert Path(parsed.eval_dataset).name == "dev.jsonl"
    assert (parsed.learning_rate, parsed.lora_r) == (3e-4, 8)
    named = inputs.parse("What it shows.", ["--model", "m", "--dataset", "d"])
    assert (named.eval_dataset, named.learning_rate) == ("d", 1e-5)
    with pytest.raises(SystemExit):
        inputs.parse("What it shows.", ["--model", "m"])


# Files for a size of GPU


def planned_line(path):
    """What the planner says of a file, in the words of its first line."""
    values = yaml.safe_load(path.read_text())
    length, batch = values["max_length"], values["per_device_train_batch_size"]
    made = make_plan(
        architecture_named(values["model"]),
        Training(tuning=path.parent.name, lora_r=values["lora_r"]),
        gpu_spec(path.stem),
        Workload(2 * length, length * batch),
        host_bytes=16 * 2**30,
        base_weights=values.get("base_weights", "gpu"),
    )
    assert made.fits, f"{path.name} does not fit: {made.describe()}"
    return made.describe().splitlines()[0]


@pytest.mark.parametrize("path", CARDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_files_fit_as_they_say(path):
    text = path.read_text()
    assert f"python -m fastdpo.train --config {path.relative_to(ROOT)}" in text
    said = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    assert planned_line(path) in said, f"write into {path.name}: {planned_line(path)}"
    length = yaml.safe_load(text)["max_length"]
    command = f"--gpu {path.stem[:-2]}GiB --max_length {length} --host_memory_gib 16"
    assert command in text, "the command beside it is of another GPU or length"


def test_files_for_a_gpu_run(monkeypatch, tmp_path):
    """On a CPU, with the options that each file names for that."""
    demo = taught_llama()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    shutil.copytree(demo.model_dir.parent, "fastdpo-demo")
    for path in CARDS:
        tried = path.read_text().split("two cores:\n")[1].split("\n#\n")[0]
        words = tried.replace("#", " ").replace("\\", " ").split()
        assert words[:5] == f"python -m fastdpo.train --config {path.relative_to(ROOT)}".split()
        words[4] = str(path)
        dry = ["--dry_run"] if path.stem != "8gb" else []  # one of each kind trains
        train.main([*words[3:], *dry])
    assert len(list(tmp_path.glob("fastdpo-output/*/adapter_model.safetensors"))) == 2


# The kernel in other trainers


def check(losses, printed, updates):
    usual, kernel = losses
    assert len(usual) == len(kernel) == updates
    assert len(set(usual)) == updates, "the losses do not move: nothing was trained"
    for one, other in zip(usual, kernel, strict=True):
        assert abs(one - other) <= BOUND
        assert f"usual {one:.6f}  kernel {other:.6f}" in printed


@pytest.mark.parametrize("name", ["kernel_in_pytorch_loop", "kernel_in_transformers_trainer"])
def test_cross_entropy_in_other_loops(name, capsys):
    losses = main_of(name)(["--updates", "4"])
    check(losses, capsys.readouterr().out, 4)


def test_logprobs_in_trl(capsys):
    utils = pytest.importorskip("trl.trainer.utils", reason="needs trl (pip install fastdpo[dev])")
    stock = utils._ChunkedLogProbFunction
    results = main_of("kernel_in_trl")([])
    assert utils._ChunkedLogProbFunction is stock
    printed = capsys.readouterr().out
    assert list(results) == ["DPOTrainer", "SFTTrainer"]
    for losses in results.values():
        check(losses, printed, 4)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_examples_are_short_and_say_their_command(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 90
    assert any(f"python examples/{path.name}" in line for line in lines[:5])
    assert any("s on two cores" in line for line in lines[:5])
    if path.stem.startswith("kernel_in_"):
        assert any("# Changed: " in line for line in lines)


def test_every_script_is_run():
    """A new example without a test of its name is not run by anything."""
    text = Path(__file__).read_text()
    for path in SCRIPTS:
        assert f'"{path.stem}"' in text, f"no test runs {path.name}"
