"""The commands from their options to their files, in process."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_trainer import CONFIG, TOKENIZER, preference_rows
from transformers import AutoModelForCausalLM

from fastdpo import evaluate, train
from fastdpo.command_line import command
from fastdpo.update import DoesNotFitError


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a tiny model, pairs, held-out pairs and a private reference store."""
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained("base")
    TOKENIZER.save_pretrained("base")
    for name, seed in (("train", 0), ("dev", 1)):
        rows = [json.dumps(row) for row in preference_rows(24, seed)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    (tmp_path / "run.yaml").write_text(
        "model: base\ndataset: train.jsonl\neval_dataset: dev.jsonl\nlearning_rate: 5e-3\n"
        "per_device_train_batch_size: 8\ndisable_tqdm: true\nuse_cpu: true\nsave_strategy: 'no'\n"
    )
    return tmp_path


@pytest.mark.parametrize("tuning", ["--lora", "--qlora"])
def test_train_then_evaluate(workplace, capsys, tuning):
    train.main(["--config", "run.yaml", tuning, "--output_dir", "out", "--num_train_epochs", "2"])
    said = capsys.readouterr().out
    assert "The adapter lies in out." in said
    assert "--adapter out" in said
    evaluate.main(
        ["--adapter", "out", "--dataset", "dev.jsonl", "--num_completions", "2"]
        + ["--max_new_tokens", "5"]
        + (["--qlora"] if tuning == "--qlora" else [])
    )
    table = capsys.readouterr().out
    figures = json.loads((workplace / "evaluation.json").read_text())
    assert figures["pairs"] == 24
    assert figures["preference"]["preference_accuracy"] > 0.9
    assert figures["policy"]["logps_chosen"] != figures["reference"]["logps_chosen"]
    assert len(figures["completions"]) == 2
    for name in (
        "logp accuracy",
        "perplexity chosen",
        "preference accuracy",
        "reference",
        "policy",
    ):
        assert name in table


def test_full_then_evaluate_against_the_model_it_started_from(workplace, capsys):
    train.main(["--config", "run.yaml", "--full", "--output_dir", "out", "--max_steps", "2"])
    evaluate.main(["--model", "out", "--reference", "base", "--dataset", "dev.jsonl"])
    figures = json.loads((workplace / "evaluation.json").read_text())
    assert "--model out --reference base" in capsys.readouterr().out
    assert figures["preference"]["rewards_margin"] != 0.0
    assert figures["preference"]["loss"] != pytest.approx(0.6931, abs=1e-4)


def test_a_stopped_run_goes_on(workplace, capsys):
    options = ["--config", "run.yaml", "--lora", "--num_train_epochs", "2", "--eval_strategy", "no"]
    saving = ["--save_strategy", "steps", "--save_steps", "2"]
    train.main([*options, "--output_dir", "whole"])
    train.main([*options, *saving, "--output_dir", "cut"])
    for step in (4, 6):
        for path in (workplace / "cut" / f"checkpoint-{step}").iterdir():
            path.unlink()
    train.main([*options, *saving, "--output_dir", "cut", "--resume_from_checkpoint", "true"])
    name = "adapter_model.safetensors"
    assert (workplace / "cut" / name).read_bytes() == (workplace / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora"], "--model is missing"),
        (["--model", "base", "--lora", "--dataset", "none.jsonl"], "there is no file none.jsonl"),
        (["--model", "./nowhere", "--lora", "--dataset", "train.jsonl"], "Pass a local folder"),
        (["--model", "llama-7b", "--qlora", "--dataset", "train.jsonl"], "Pass a local folder"),
        (["--model", "base", "--lora", "--dataset", "bad.jsonl"], "bad.jsonl:2"),
        (["--model", "base", "--lora", "--lerning_rate", "1"], "the nearest is --learning_rate"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(workplace, monkeypatch, capsys, argv, message):
    good = json.dumps(preference_rows(1)[0])
    (workplace / "bad.jsonl").write_text(f'{good}\n{{"prompt": "a", "chosen": "b"}}\n')
    monkeypatch.setattr("sys.argv", ["train", *argv])
    try:
        code = command(train.main)
    except SystemExit as stop:
        code = stop.code
    complaint = capsys.readouterr().err
    assert code == 2
    assert message in complaint
    assert "Traceback" not in complaint


def test_llama_7b_qlora_alone_is_complete_and_says_what_it_uses(workplace, monkeypatch, capsys):
    """Everything up to the download: the alias, the default data set, 4 bits."""
    asked = {}

    def load(name, **options):
        asked.update(options, name=name)
        raise ValueError("no download in a test")

    monkeypatch.setattr("fastdpo.modeling.loading.load_tokenizer", lambda *_, **__: TOKENIZER)
    monkeypatch.setattr("fastdpo.modeling.loading.load_model", load)
    monkeypatch.setattr("fastdpo.data.read_rows", lambda *_, **__: [])
    with pytest.raises(ValueError, match="no download"):
        train.main(["--model", "llama-7b", "--qlora"])
    said = capsys.readouterr().out
    assert "llama-7b means meta-llama/Llama-2-7b-hf" in said
    assert "using trl-lib/ultrafeedback_binarized" in said
    assert asked["name"] == "meta-llama/Llama-2-7b-hf"
    assert asked["load_in_4bit"] is True


def test_evaluation_refuses_options_that_would_change_nothing(workplace):
    with pytest.raises(ValueError, match="--lora_r changes nothing"):
        evaluate.main(["--adapter", "out", "--dataset", "dev.jsonl", "--lora_r", "8"])


def test_a_diverged_run_is_one_line_and_exit_1(capsys):
    def diverge(_argv):
        raise FloatingPointError("the loss of update 3 is nan")

    assert command(diverge) == 1
    assert capsys.readouterr().err == "error: the loss of update 3 is nan\n"


def test_memory_that_does_not_suffice_is_one_line_and_exit_3(capsys):
    def never_fits(argv):
        raise DoesNotFitError("a single completion does not fit")

    assert command(never_fits) == 3
    assert capsys.readouterr().err == "error: a single completion does not fit\n"


def test_a_dry_run_shows_what_would_happen_and_writes_nothing(workplace, capsys):
    before = sorted(path.name for path in workplace.iterdir())
    argv = ["--config", "run.yaml", "--lora", "--beta", "0.25", "--loss_type", "ipo", "--dry_run"]
    train.main(argv)
    said = capsys.readouterr().out
    for line in ("beta", "0.25", "['ipo']", "24 pairs, 8 an update: 3 updates an epoch", "The day"):
        assert line in said, line
    assert sorted(path.name for path in workplace.iterdir()) == before


def test_training_goes_on_from_an_adapter(workplace, capsys):
    """SFT, then DPO from its adapter, which is the reference; over 4 bits too."""
    common = ["--config", "run.yaml", "--max_steps", "2"]
    train.main([*common, "--qlora", "--loss_type", "sft", "--output_dir", "sft"])
    train.main([*common, "--qlora", "--model", "sft", "--output_dir", "dpo"])
    said = capsys.readouterr().out
    assert "Training the adapter in sft on." in said
    files = [workplace / name / "adapter_model.safetensors" for name in ("sft", "dpo")]
    sft, dpo = map(load_file, files)
    assert sft.keys() == dpo.keys()
    assert any(not torch.equal(sft[name], dpo[name]) for name in sft)


def test_a_mixture_in_yaml_is_trained_on(workplace, capsys):
    (workplace / "mixture.yaml").write_text(
        "model: base\nlora: true\nmax_steps: 1\nuse_cpu: true\nsave_strategy: 'no'\n"
        "test_split_size: 8\ndatasets:\n- path: train.jsonl\n  fraction: 0.7\n"
        "- path: dev.jsonl\n  fraction: 0.3\n"
    )
    train.main(["--config", "mixture.yaml"])
    assert "Held-out pairs: preference accuracy" in capsys.readouterr().out
