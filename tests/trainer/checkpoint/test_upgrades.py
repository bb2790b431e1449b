"""What commit a23bd71 wrote, before rooms and names moved, is read: `written_by_a23bd71`."""

import json
import logging
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastdpo import DPOConfig, reference, train
from fastdpo.cli.parser import parse
from fastdpo.options import DataOptions, ModelOptions
from fastdpo.ref_cache import compute
from fastdpo.trainer import checkpoint
from fastdpo.trainer.checkpoint import CheckpointError

WRITTEN = Path(__file__).with_name("written_by_a23bd71")
OPTIONS = shlex.split(
    "--model model --lora --lora_r 4 --lora_dropout 0.1 --dataset pairs.jsonl --output_dir out "
    "--ref_cache store --per_device_train_batch_size 2 --gradient_accumulation_steps 1 "
    "--learning_rate 1e-2 --max_steps 6 --save_steps 3 --save_strategy steps --logging_steps 1 "
    "--report_to none --use_cpu --disable_tqdm"
)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    shutil.copytree(WRITTEN, tmp_path / "written")
    for path in (tmp_path / "written" / "store").rglob("*"):
        os.utime(path)
    monkeypatch.chdir(tmp_path / "written")
    return tmp_path / "written"


@pytest.fixture
def scored(monkeypatch):
    """Whether the reference pass computed anything: the calls of its scoring."""
    calls, real = [], compute.score_groups
    monkeypatch.setattr(
        compute, "score_groups", lambda *some, **named: calls.append(1) or real(*some, **named)
    )
    return calls


def shards_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "store").glob("*/shard-*")}


def test_a_run_goes_on_from_the_checkpoint_and_finds_the_store(workplace, caplog, scored):
    """The adapter after update 6 is the one that the old commit ended with, to rounding."""
    before = shards_of(workplace)
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        train.main([*OPTIONS, "--resume_from_checkpoint", "true"])
    assert "Resuming from out/checkpoint-3" in caplog.text
    assert "all 12 pairs found in" in caplog.text
    assert not scored
    assert shards_of(workplace) == before
    found = load_file(workplace / "out" / "adapter_model.safetensors")
    wanted = load_file(workplace / "final_adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    log = json.loads((workplace / "out" / "checkpoint-6" / "trainer_state.json").read_text())
    assert [line["step"] for line in log["log_history"] if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_the_store_is_taken_by_build_and_verify(workplace, caplog, capsys, scored):
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        reference.main(["build", *OPTIONS])
    assert "all 12 pairs found in" in caplog.text
    assert "Spot check: 4 pairs scored again" in caplog.text
    assert not scored
    reference.main(["verify", "--ref_cache", "store"])
    assert "1 shards are whole, 24 completions" in capsys.readouterr().out


def test_what_really_differs_is_refused_still(workplace):
    with pytest.raises(CheckpointError, match=r"\n  loss\.beta: the checkpoint has 0\.1, this run"):
        train.main([*OPTIONS, "--beta", "0.2", "--resume_from_checkpoint", "true"])


def test_a_checkpoint_in_another_format_is_refused_with_a_sentence(workplace):
    manifest = workplace / "out" / "checkpoint-3" / checkpoint.MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 3', 1))
    with pytest.raises(CheckpointError, match="has format 3, and this fastdpo reads up to 2: resu"):
        train.main([*OPTIONS, "--resume_from_checkpoint", "out/checkpoint-3"])


def test_every_option_of_the_old_run_is_known(workplace):
    """Its `training_args.json` makes a DPOConfig again, those that are gone apart."""
    values = json.loads((workplace / "out" / "checkpoint-3" / "training_args.json").read_text())
    del (
        values["base_in_4bit"],
        values["merge_prompts"],
        values["hub_token"],
        values["accelerator_config"],
    )
    assert DPOConfig(**values).beta == 0.1
    assert DPOConfig(**values | {"embeddings": "card"}).embeddings == "gpu"


def test_the_former_name_of_a_value_is_read_everywhere(tmp_path):
    groups = [ModelOptions, DataOptions]
    (tmp_path / "old.yaml").write_text("embeddings: card\n")
    for argv in (["--embeddings", "card"], ["--config", str(tmp_path / "old.yaml")]):
        assert parse("train", groups, argv, training=True).training.embeddings == "gpu"
    for argv in (["--embeddings", "host"], ["--embeddings", "gpu"]):
        assert parse("train", groups, argv, training=True).training.embeddings == argv[1]
    with pytest.raises(SystemExit):
        parse("train", groups, ["--embeddings", "kard"], training=True)
