"""A second run reads its pairs and its reference from the disk, and is told where time went."""

import logging
import re

import numpy as np
import pytest

from fastdpo import DPOConfig
from fastdpo.batching import PairGroups, lists_of
from fastdpo.data import PairDataset, pair_cache
from fastdpo.data.chat_template import PLAIN_CHAT_TEMPLATE
from fastdpo.ref_cache.shards import group_keys, keys_of
from fastdpo.system.start_up import start_up
from tests.data.test_workers import assert_equal, odd_chats
from tests.tiny_trainer import ROWS, TOKENIZER, tiny_base, tiny_trainer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pair_cache, "CACHED_FROM_ROWS", 1)


def test_a_second_trainer_reads_the_pairs(tmp_path, monkeypatch, caplog):
    def run(name, **options):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            trainer = tiny_trainer(tiny_base(), tmp_path / name, rows=odd_chats(), **options)
            trainer.train()
        told = [r for r in caplog.records if "rows read" in r.message]
        return trainer, [(r.levelname, r.message) for r in told]

    monkeypatch.setattr(TOKENIZER, "chat_template", PLAIN_CHAT_TEMPLATE)
    options = {"max_length": 200, "max_steps": 2}
    fresh, told = run("off", data_cache="off", **options)
    first, told_first = run("first", **options)
    assert len(list((tmp_path / "cache/data").glob("pairs-*"))) == 2  # train and eval
    monkeypatch.setattr(pair_cache, "prepare_pairs", None)
    second, told_again = run("second", **options)
    assert told == told_first == told_again
    assert told[0][0] == "WARNING"
    assert_equal(fresh.train_groups.pairs, second.train_groups.pairs)
    assert_equal(first.train_groups.pairs, second.train_groups.pairs)
    assert [*first.sets.sampler()] == [*second.sets.sampler()]
    losses = [
        [line["loss"] for line in each.state.log_history if "loss" in line]
        for each in (fresh, first, second)
    ]
    assert losses[0] == losses[1] == losses[2]


def test_the_folder_is_named_by_the_option(tmp_path):
    folder = tmp_path / "elsewhere"
    tiny_trainer(tiny_base(), tmp_path / "out", rows=ROWS, data_cache=folder)
    assert len(list(folder.glob("pairs-*"))) == 2
    assert not (tmp_path / "cache/data").exists()
    with pytest.raises(ValueError, match="--data_cache is empty"):
        DPOConfig(str(tmp_path), data_cache=" ")


def test_what_is_computed_over_arrays_is_what_the_groups_say(tmp_path):
    trainer = tiny_trainer(tiny_base(), tmp_path / "out", rows=[*odd_chats(), *odd_chats()[:9]],
                           score_turns="assistant", max_length=200)  # fmt: skip
    groups = trainer.train_groups
    assert groups.pairs.masks
    assert np.array_equal(groups.lists, lists_of(list(groups)))
    assert len(np.unique(groups.lists)) < len(groups)
    own = np.array([group_keys(group) for group in groups], dtype="S32")
    assert np.array_equal(keys_of(groups), own)
    longest = max(len(g.prompt_ids) + max(map(len, g.completions)) for g in groups)
    assert trainer.sets.longest_tokens == longest
    again = PairGroups(PairDataset.from_pairs(groups.pairs, groups.pairs.report))
    assert_equal(groups.pairs, again.pairs)


def test_the_parts_of_the_start_are_told_once(tmp_path, capsys):
    for shown in (True, False):
        trainer = tiny_trainer(tiny_base(), tmp_path / "out", max_steps=2, logging_first_step=shown)
        trainer.train()
        said = re.findall(r"Start to the end of the first update: .*", capsys.readouterr().out)
        assert len(said) == shown
        if shown:
            assert re.fullmatch(
                r".*: [\d.]+ s \(model [\d.]+, data [\d.]+, reference [\d.]+, the rest [\d.]+\)",
                said[0],
            )
    start_up.command_began()
    start_up.imported()
    with start_up.part("model"):
        start_up.trainer_began()
    assert list(start_up.parts) == ["imports", "model"]
    assert start_up.parts["imports"] > 0
    assert start_up.told() is not None
    assert start_up.told() is None
