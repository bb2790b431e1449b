"""The result of a run: finite, saved while the folder is held, and nothing of others is removed."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastdpo import DPOConfig, train
from fastdpo.cli.parser import command
from fastdpo.reference import main as reference_main
from fastdpo.system import files
from fastdpo.trainer import DPOTrainer, checkpoint
from fastdpo.trainer.checkpoint import CheckpointError
from tests.commands.test_signals import At, send
from tests.ref_cache.test_faults import exit_code, in_a_child
from tests.tiny_trainer import TOKENIZER, preference_rows
from tests.trainer.small_runs import ADAPTER, CONFIG, build, checkpoint_names


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a tiny base and pairs, as the commands take them."""
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained("base")
    TOKENIZER.save_pretrained("base")
    Path("train.jsonl").write_text("\n".join(map(json.dumps, preference_rows(6))))
    return tmp_path


RUN = ["--model", "base", "--dataset", "train.jsonl", "--use_cpu", "--max_steps", "1"]
RUN += ["--per_device_train_batch_size", "2", "--save_strategy", "no", "--disable_tqdm"]


def ends(monkeypatch, main, argv):
    """The exit code of a command."""
    monkeypatch.setattr("sys.argv", ["command", *argv])
    try:
        return command(main)
    except SystemExit as stop:
        return stop.code


# Not finite after the step

DIVERGING = {
    "rate": {"learning_rate": 1e38, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"},
    "epsilon": {"adam_epsilon": 1e-60},  # 0 in fp32, and 0/0 where a gradient is 0
    "decay": {"weight_decay": 1e38, "learning_rate": 1e8, "lr_scheduler_type": "constant"},
}


@pytest.mark.parametrize("kind", DIVERGING)
def test_an_adapter_that_is_not_finite_is_never_saved(tmp_path, kind):
    trainer = build(tmp_path / "out", save_steps=1, save_total_limit=1, **DIVERGING[kind])
    with pytest.raises(
        FloatingPointError, match=r"weights after update \d are not finite: base_mo"
    ):
        trainer.train()
    with pytest.raises(FloatingPointError, match="None of them were saved"):
        trainer.save_model()
    for name in checkpoint_names(tmp_path / "out"):
        checkpoint.verify(tmp_path / "out" / name)
        tensors = load_file(tmp_path / "out" / name / ADAPTER).values()
        assert all(torch.isfinite(each).all() for each in tensors)
    assert not (tmp_path / "out" / ADAPTER).exists()


def test_the_last_finite_checkpoint_stays(tmp_path):
    """Divergence in the last update, one checkpoint kept."""

    def spoil():
        parameter = next(p for p in trainer.policy.parameters() if p.requires_grad)
        parameter.data.view(-1)[3] = float("nan")

    at = At("on_optimizer_step", 5, spoil)
    trainer = build(tmp_path / "out", [at], save_steps=1, save_total_limit=1, nonfinite="skip")
    with pytest.raises(FloatingPointError, match=r"after update 6 .* \(1 of 14 tensors\)"):
        trainer.train()
    assert checkpoint_names(tmp_path / "out") == ["checkpoint-5"]
    checkpoint.verify(tmp_path / "out/checkpoint-5")


def test_all_weights_are_looked_at_before_a_save(tmp_path):
    trainer = build(tmp_path / "out", tuning="full", ref_cache=str(tmp_path / "store"))
    trainer.save_model()
    kept = (tmp_path / "out/model.safetensors").read_bytes()
    frozen = trainer.policy.model.norm.weight.requires_grad_(False)
    frozen.data[0] = -float("inf")
    with pytest.raises(FloatingPointError, match=r"model.norm.weight \(1 of"):
        trainer.save_model()
    assert (tmp_path / "out/model.safetensors").read_bytes() == kept


def test_large_weights_are_finite(tmp_path):
    """A sum of squares would overflow."""
    trainer = build(tmp_path / "out")
    next(p for p in trainer.policy.parameters() if p.requires_grad).data.fill_(1e30)
    trainer.save_model()
    assert (tmp_path / "out" / ADAPTER).is_file()


# Results at the end of a run


def test_a_second_start_in_the_final_save_changes_nothing(tmp_path):
    """It is refused before it sweeps anything."""
    trainer = build(tmp_path / "out", save_strategy="no", max_steps=1)
    trainer.train()
    real, codes = trainer._write_model, []

    def second(folder, state_dict):
        real(folder, state_dict)
        codes.append(exit_code(in_a_child(start_again)))

    def start_again():
        with pytest.raises(CheckpointError, match="another process is training into"):
            build(tmp_path / "out", save_strategy="no").train()

    trainer._write_model = second
    trainer.save_model()
    assert codes == [0]
    assert (tmp_path / "out" / ADAPTER).is_file()
    assert not [path for path in (tmp_path / "out").iterdir() if files.is_temporary(path)]


def test_a_save_whose_files_are_swept_fails(tmp_path):
    trainer = build(tmp_path / "out", save_strategy="no")
    real = trainer._write_model

    def swept(folder, state_dict):
        real(folder, state_dict)
        shutil.rmtree(folder)

    trainer._write_model = swept
    with pytest.raises(FileNotFoundError):
        trainer.save_model()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_final_save_is_obeyed_after_it(workplace, monkeypatch, capsys, number):
    real = DPOTrainer._write_model

    def interrupted(self, folder, state_dict):
        send(number)
        real(self, folder, state_dict)

    monkeypatch.setattr(DPOTrainer, "_write_model", interrupted)
    assert ends(monkeypatch, train.main, [*RUN, "--output_dir", "out"]) == 128 + number
    assert "The adapter lies in out." in capsys.readouterr().out
    assert (workplace / "out" / ADAPTER).is_file()


def test_a_signal_in_a_save_from_python(tmp_path):
    trainer = build(tmp_path / "out", save_strategy="no")
    real = trainer._write_model

    def interrupted(folder, state_dict):
        send(signal.SIGTERM)
        real(folder, state_dict)

    trainer._write_model = interrupted
    with pytest.raises(SystemExit) as stopped:
        trainer.save_model()
    assert stopped.value.code == 143
    assert (tmp_path / "out" / ADAPTER).is_file()


@pytest.mark.parametrize("event", ["on_train_end", "on_log"])
def test_a_signal_after_the_last_update_keeps_it(tmp_path, event):
    at = At(event, 6, lambda: send(signal.SIGTERM))
    trainer = build(tmp_path / "out", [at], save_strategy="no")
    with pytest.raises(SystemExit):
        trainer.train()
    assert checkpoint.newest_verified(tmp_path / "out").name == "checkpoint-6"


def test_results_of_two_kinds_in_one_folder_do_not_mix(tmp_path):
    """All weights first, then an adapter: what is left of the model would be taken for it."""
    build(tmp_path / "out", tuning="full", ref_cache=str(tmp_path / "store")).save_model()
    assert (tmp_path / "out/model.safetensors").is_file()
    build(tmp_path / "out").save_model()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {ADAPTER, "adapter_config.json", "tokenizer.json"} <= names
    assert not names & {"config.json", "model.safetensors", "generation_config.json"}


def test_a_second_start_is_refused_while_the_first_one_loads(workplace, monkeypatch, capsys):
    codes = []

    def load(*_):
        codes.append(exit_code(in_a_child(start_again)))
        raise ValueError("enough")

    def start_again():
        monkeypatch.setattr("fastdpo.trainer.from_options.make_trainer", loads_nothing)
        raise SystemExit(ends(monkeypatch, train.main, [*RUN, "--output_dir", "out"]))

    def loads_nothing(*_):
        raise FloatingPointError("it was let in")

    monkeypatch.setattr("fastdpo.trainer.from_options.make_trainer", load)
    assert ends(monkeypatch, train.main, [*RUN, "--output_dir", "out"]) == 2
    assert codes == [2]
    assert not (workplace / "out").exists(), "nothing was written, nothing is left"


# What a command removes


def meanwhile(monkeypatch, folder):
    """Another run makes the folder and trains into it while this command is at work."""

    def compute(self):
        folder.mkdir(exist_ok=True)
        (folder / ADAPTER).write_text("another run's")

    monkeypatch.setattr(DPOTrainer, "compute_references", compute)
    monkeypatch.setattr("fastdpo.train.show", lambda trainer, _: compute(trainer))


def test_what_another_run_trained_meanwhile_stays(workplace, monkeypatch):
    folder = workplace / "fastdpo-output"
    meanwhile(monkeypatch, folder)
    reference_main(["build", *RUN])
    assert (folder / ADAPTER).read_text() == "another run's"
    shutil.rmtree(folder)
    train.main([*RUN, "--dry_run"])
    assert (folder / ADAPTER).read_text() == "another run's"


def test_a_build_needs_no_output_folder(workplace):
    (workplace / "file").write_text("x")
    reference_main(["build", *RUN, "--output_dir", "file"])
    assert (workplace / "file").read_text() == "x"
    assert list((workplace / "cache").rglob("shard-*"))


def test_a_run_that_fails_removes_only_the_empty_folders_that_it_made(workplace, monkeypatch):
    bad = [*RUN[:2], "--dataset", "none.jsonl", *RUN[4:], "--output_dir"]
    assert ends(monkeypatch, train.main, [*bad, "a/b/out"]) == 2
    assert not (workplace / "a").exists()
    (workplace / "mine").mkdir()
    assert ends(monkeypatch, train.main, [*bad, "mine"]) == 2
    assert (workplace / "mine").is_dir()
    real = checkpoint.preflight._write_and_remove

    def with_company(probe):
        real(probe)
        (probe.parent / "theirs").write_text("x")

    monkeypatch.setattr(checkpoint.preflight, "_write_and_remove", with_company)
    assert ends(monkeypatch, train.main, [*bad, "new/out"]) == 2
    assert (workplace / "new/out/theirs").read_text() == "x"


# Own inputs


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_training_into_the_base_is_refused(workplace, monkeypatch, capsys, tuning):
    before = {path.name: path.read_bytes() for path in (workplace / "base").iterdir()}
    argv = [*RUN, f"--{tuning}", "--output_dir", "base"]
    assert ends(monkeypatch, train.main, argv) == 2
    assert (
        "--output_dir base would overwrite or join base, which --model" in capsys.readouterr().err
    )
    args = DPOConfig("x", use_cpu=True, ref_cache="store")
    trainer = DPOTrainer("base", args=args, train_dataset=preference_rows(6))
    trainer.args.output_dir = str(workplace / "base" / ".")
    for write in (trainer.train, trainer.save_model, lambda: trainer.save_model("base")):
        with pytest.raises(CheckpointError, match="the folder of the model that training starts"):
            write()
    assert {path.name: path.read_bytes() for path in (workplace / "base").iterdir()} == before


@pytest.mark.parametrize(
    ("options", "output", "reader"),
    [
        ({"--reference": "other"}, "other", "other, which --reference reads"),
        ({"--dataset": "data"}, "data", "data, which --dataset reads"),
        ({"--dataset": "out/metrics.jsonl"}, "out", "out/metrics.jsonl, which --dataset reads"),
        ({"--ref_cache": "store"}, "./store/", "store, which --ref_cache reads"),
        ({"--model": "adapter"}, "adapter", "adapter, which --model reads"),
        ({"--model": "adapter"}, "base", "base, which the adapter of --model reads"),
        (
            {"--model": "out/checkpoint-4", "--save_total_limit": "1"},
            "out",
            "--save_total_limit would delete it",
        ),
    ],
)
def test_training_into_another_input_is_refused(
    workplace, monkeypatch, capsys, options, output, reader
):
    for folder in ("other", "data", "store", "adapter", "out/checkpoint-4"):
        Path(folder).mkdir(parents=True)
    Path("out/metrics.jsonl").write_text("{}")
    Path("adapter/adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    before = sorted(Path().rglob("*"))
    given = {"--model": "base", "--dataset": "train.jsonl", "--output_dir": output} | options
    argv = [part for pair in given.items() for part in pair]
    assert ends(monkeypatch, train.main, argv) == 2
    said = capsys.readouterr().err
    assert reader in said
    assert "give another folder" in said
    assert sorted(Path().rglob("*")) == before
