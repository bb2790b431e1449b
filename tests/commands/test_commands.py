"""The commands from their options to their files, in process."""

import errno
import importlib
import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from fastdpo import evaluate, train
from fastdpo.cli.parser import command
from fastdpo.reference import main as reference_main
from fastdpo.system.oom import DoesNotFitError
from tests.tiny_trainer import CONFIG, TOKENIZER, preference_rows


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


@pytest.mark.parametrize("is_terminal", [False, True])
def test_bars_of_libraries_are_drawn_on_a_terminal_alone(
    workplace, capsys, monkeypatch, is_terminal
):
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "0")  # is set anew, and so restored
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
    transformers_logging.enable_progress_bar()
    assert command(lambda _: AutoModelForCausalLM.from_pretrained("base")) == 0
    assert ("Loading weights" in capsys.readouterr().err) == is_terminal
    transformers_logging.enable_progress_bar()


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
    metrics = json.loads((workplace / "out" / "evaluation.json").read_text())
    assert metrics["pairs"] == 24
    assert metrics["preference"]["preference_accuracy"] > 0.9
    assert metrics["policy"]["logps_chosen"] != metrics["reference"]["logps_chosen"]
    assert len(metrics["completions"]) == 2
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
    metrics = json.loads((workplace / "evaluation.json").read_text())
    assert "--model out --reference base" in capsys.readouterr().out
    assert metrics["preference"]["rewards_margin"] != 0.0
    assert metrics["preference"]["loss"] != pytest.approx(0.6931, abs=1e-4)


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
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: there is no such file"),
        (["--config", "run.yaml", "--report_to", "abacus"], "no tracker of that name"),
        (["--config", "run.yaml", "--output_dir", "dev.jsonl"], "which --eval_dataset reads"),
        (["--config", "run.yaml", "--output_dir", "bad.jsonl"], "--output_dir bad.jsonl cannot be"),
        (
            ["--config", "run.yaml", "--resume_from_checkpoint", "nowhere"],
            "there is no folder nowhere",
        ),
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
    requested = {}

    def load(name, **options):
        requested.update(options, name=name)
        raise ValueError("no download in a test")

    monkeypatch.setattr("fastdpo.modeling.loading.load_tokenizer", lambda *_, **__: TOKENIZER)
    monkeypatch.setattr("fastdpo.trainer.prepare.load_model", load)
    monkeypatch.setattr("fastdpo.data.read_rows", lambda *_, **__: [])
    with pytest.raises(ValueError, match="no download"):
        train.main(["--model", "llama-7b", "--qlora"])
    said = capsys.readouterr().out
    assert "llama-7b means meta-llama/Llama-2-7b-hf" in said
    assert "using trl-lib/ultrafeedback_binarized" in said
    assert requested["name"] == "meta-llama/Llama-2-7b-hf"
    assert requested["load_in_4bit"] is True


def test_a_dry_run_finds_what_a_run_would_refuse_of_its_folder(workplace, capsys):
    """An earlier run's checkpoints, nothing to resume from, a checkpoint of another run."""
    few = ["--config", "run.yaml", "--lora", "--output_dir", "out", "--max_steps", "1"]
    few += ["--save_strategy", "steps", "--save_steps", "1"]
    train.main([*few, "--dry_run"])
    assert not (workplace / "out").exists()
    train.main(few)
    before = sorted(path.name for path in (workplace / "out").rglob("*"))
    for more, words in (
        ([], "checkpoints of an earlier run"),
        (["--resume_from_checkpoint", "nowhere"], "no folder nowhere"),
        (["--resume_from_checkpoint", "true", "--beta", "0.5"], "beta"),
    ):
        with pytest.raises(ValueError, match=words):
            train.main([*few, *more, "--dry_run"])
    train.main([*few, "--resume_from_checkpoint", "true", "--dry_run"])
    assert sorted(path.name for path in (workplace / "out").rglob("*")) == before


def test_evaluation_refuses_options_that_would_change_nothing(workplace, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["--adapter", "out", "--dataset", "dev.jsonl", "--lora_r", "8"])
    assert ended.value.code == 2
    assert "--lora_r changes nothing" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["evaluate", "score", "merge"])
def test_help_shows_only_what_the_command_takes(capsys, name):
    main = importlib.import_module(f"fastdpo.{name}").main
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "--qlora" in shown
    assert "--dataset_name" in shown
    for useless in ("--lora_r", "--full", "--datasets", "--mixture_seed", "--dataset_streaming"):
        assert f"{useless} " not in shown, useless


def test_what_libraries_tell_each_other_is_not_shown(capsys, recwarn):
    def warn(_argv):
        warnings.warn("one library to another", FutureWarning, stacklevel=1)
        warnings.warn("to people", UserWarning, stacklevel=1)

    assert command(warn) == 0
    assert [str(each.message) for each in recwarn] == ["to people"]


def test_the_base_is_offered_for_comparison_only_where_it_is_the_reference(workplace, capsys):
    train.main(["--config", "run.yaml", "--lora", "--max_steps", "1", "--reference", "base"])
    assert "fastdpo.evaluate" in capsys.readouterr().out
    shutil.copytree(workplace / "base", workplace / "other")
    argv = ["--config", "run.yaml", "--lora", "--max_steps", "1", "--reference", "other"]
    train.main([*argv, "--output_dir", "out2"])
    said = capsys.readouterr().out
    assert "fastdpo.merge" in said
    assert "fastdpo.evaluate" not in said


def test_a_failing_disk_is_named_with_a_remedy(capsys):
    def fill(_argv):
        raise OSError(errno.ENOSPC, "No space left on device", "/store/shard")

    assert command(fill) == 2
    said = "error: /store/shard: No space left on device; make room there, or name a folder on "
    assert capsys.readouterr().err == said + "another disk\n"


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
    for line in ("--beta 0.25\n", "--loss_type ipo\n", "--lora True\n", "--warmup_steps 0.1\n"):
        assert line in said, line
    for line in ("24 pairs, 8 an update: 3 updates an epoch", "In each pair: prompt", "The day"):
        assert line in said, line
    assert "accelerator_config" not in said, "what nobody set is not shown"
    assert sorted(path.name for path in workplace.iterdir()) == before


def test_a_dry_run_shows_the_plan_where_there_is_one(workplace, monkeypatch, capsys):
    def planned(*arguments):
        trainer = made(*arguments)
        trainer.plan = SimpleNamespace(terms={"head": 3 * 2**30, "nothing": 0}, peak_bytes=2**32)
        return trainer

    made = train.make_trainer
    monkeypatch.setattr(train, "make_trainer", planned)
    train.main(["--config", "run.yaml", "--lora", "--dry_run"])
    said = capsys.readouterr().out
    for line in (
        "head                            3.00 GiB",
        "all                             4.00",
    ):
        assert line in said
    assert "nothing" not in said


def test_building_references_trains_nothing_and_leaves_no_output(workplace, capsys):
    argv = ["--model", "base", "--dataset", "train.jsonl", "--use_cpu", "--output_dir", "out"]
    reference_main(["build", *argv])
    assert "Training" not in capsys.readouterr().out
    assert not (workplace / "out").exists()
    assert list((workplace / "cache").rglob("shard-*"))


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
    said = capsys.readouterr().out
    assert "Held-out pairs: preference accuracy" in said
    assert "--dataset train.jsonl" in said


def test_an_adapter_over_other_weights_than_those_of_its_training_is_said(workplace, capsys):
    common = ["--config", "run.yaml", "--max_steps", "1"]
    for tuning, remedy in (("--qlora", "add --qlora"), ("--lora", "leave out --qlora")):
        train.main([*common, tuning, "--output_dir", tuning[2:]])
        for flags in ([], ["--qlora"]):
            capsys.readouterr()
            argv = ["--adapter", tuning[2:], "--dataset", "dev.jsonl", "--num_completions", "0"]
            evaluate.main(argv + flags)
            same = (tuning == "--qlora") == bool(flags)
            assert (remedy in capsys.readouterr().out) == (not same)
