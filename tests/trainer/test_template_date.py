"""A run with a dated chat template goes on the next morning as if no night had passed."""

import json
import logging

import pytest

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.modeling.adapters import lora_config
from fastdpo.trainer.checkpoint import MANIFEST, CheckpointError, write_manifest
from tests.data.test_template_date import LLAMA
from tests.tiny_trainer import byte_tokenizer, preference_rows, tiny_base
from tests.trainer.small_runs import adapter_of

ROWS = [
    {name: [{"role": "user" if name == "prompt" else "assistant", "content": text}]
     for name, text in row.items()}
    for row in preference_rows(8)
]  # fmt: skip
YESTERDAY, TODAY = "2025-06-30", "2025-07-01"


@pytest.fixture
def at(monkeypatch):
    def set_clock(day):
        monkeypatch.setattr("fastdpo.trainer.datasets.today", lambda: day)
        monkeypatch.setattr("fastdpo.data.rendering.today", lambda: day)

    return set_clock


@pytest.fixture
def train_in(tmp_path):
    def build(folder, **options):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = LLAMA
        return DPOTrainer(
            tiny_base(),
            args=DPOConfig(
                str(tmp_path / folder), per_device_train_batch_size=2, save_strategy="steps",
                save_steps=2, max_steps=4, ref_cache=str(tmp_path / "store"), use_cpu=True,
                disable_tqdm=True, report_to="none", learning_rate=1e-2, **options,
            ),
            train_dataset=ROWS,
            eval_dataset={"held": ROWS[:2]},
            processing_class=tokenizer,
            peft_config=lora_config(4, 8, 0.0, None),
        )  # fmt: skip

    return build


@pytest.fixture
def yesterdays(at, train_in, tmp_path):
    """The folder of a run that was finished yesterday, and its checkpoint after update 2."""
    at(YESTERDAY)
    train_in("out").train()
    return tmp_path / "out"


def test_resumed_the_next_day_it_is_the_same_run(yesterdays, at, train_in, tmp_path, caplog):
    checkpoint = yesterdays / "checkpoint-2"
    assert json.loads((checkpoint / MANIFEST).read_text())["run"]["template_date"] == YESTERDAY
    at(TODAY)
    resumed = train_in("resumed")
    assert resumed.sets.template_date == TODAY
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert f"The chat template is given {YESTERDAY}" in caplog.text
    assert "all 8 pairs found in" in caplog.text
    assert adapter_of(tmp_path / "resumed" / "checkpoint-4") == adapter_of(
        yesterdays / "checkpoint-4"
    )
    for groups in (resumed.train_groups, resumed.eval_groups["held"], resumed.train_dataset):
        assert "30 Jun 2025" in resumed.tokenizer.decode(groups[0].prompt_ids)


def test_a_new_run_the_next_day_misses_and_says_why(yesterdays, at, train_in, caplog):
    at(TODAY)
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        train_in("new").compute_references()
    assert f"(template_date {YESTERDAY} -> {TODAY})" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="fastdpo"):
        train_in("same", template_date=YESTERDAY).compute_references()
    assert "all 8 pairs found in" in caplog.text


def test_a_day_that_is_asked_for_is_not_changed(yesterdays, at, train_in):
    at(TODAY)
    other = train_in("other", template_date="2025-01-01")
    with pytest.raises(CheckpointError, match=rf"template_date: the checkpoint has '{YESTERDAY}'"):
        other.train(resume_from_checkpoint=str(yesterdays / "checkpoint-2"))


def test_a_checkpoint_that_does_not_say_is_gone_on_with_by_the_option(
    yesterdays, at, train_in, caplog
):
    folder = yesterdays / "checkpoint-2"
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["run"]["template_date"]
    write_manifest(folder, manifest["run"], manifest["plan"])
    at(TODAY)
    with pytest.raises(CheckpointError, match=r"\n  data: "):
        train_in("other").train(resume_from_checkpoint=str(folder))
    assert "pass --template_date with the day on which its run began" in caplog.text
    right = train_in("right", template_date=YESTERDAY)
    right.train(resume_from_checkpoint=str(folder))
    assert right.state.global_step == 4
