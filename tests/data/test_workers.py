"""Pairs made on several processes are those of one, with the same report and the same errors."""

import dataclasses
import logging
import os
import pickle
import sys

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from fastdpo.data import (
    DataError,
    MixedRows,
    PairDataset,
    prepare_pairs,
    rows_from,
    tokenize,
    workers,
)
from fastdpo.options import TokenizationOptions
from tests.tiny_trainer import byte_tokenizer, preference_rows

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if mood is defined %}{{ strftime_now('%Y') }}{% endif %}"
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tokenize, "_CHUNK_PAIRS", 7)
    monkeypatch.setattr(workers, "STARTED_FOR_SECONDS", 0.0)
    monkeypatch.setattr(workers, "STARTED_AFTER_SECONDS", 0.0)


def chats(count, **more):
    def turn(role, text):
        return [{"role": role, "content": text}]

    return [
        {
            "prompt": turn("user", row["prompt"]),
            "chosen": turn("assistant", row["chosen"]),
            "rejected": turn("assistant", row["rejected"]),
            **more,
        }
        for row in preference_rows(count)
    ]


def odd_chats():
    """Rows of every kind that the report counts, spread over several chunks."""
    rows = chats(60, chat_template_kwargs={"unread": 1})
    rows[9]["chosen"][0]["content"] = " "
    rows[20]["chosen"] = rows[20]["rejected"]
    rows[23]["prompt"][0]["content"] = "long " * 60
    rows[33]["chosen"][0]["content"] += "</s> and more"
    rows[41]["rejected"][0]["content"] += "\0"
    rows[50] = rows[4]
    rows[55]["chosen"] += [*rows[1]["prompt"], *rows[1]["chosen"]]
    return rows


def rated(count):
    return [
        {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"], f" no {i}"],
         "ratings": [3, 1, 2]}
        for i, row in enumerate(preference_rows(count))
    ]  # fmt: skip


def forms():
    plain = preference_rows(40)
    return {
        "chats": (CHATML, lambda: rows_from(odd_chats(), "chats")),
        "no template": (None, lambda: rows_from(odd_chats(), "chats")),
        "strings": (None, lambda: rows_from(plain, "strings")),
        "lists": (None, lambda: rows_from(rated(25), "rated", rated_pairs="all")),
        "a stream": (None, lambda: rows_from(iter(plain), "stream")),
        "a mixture": (
            None,
            lambda: MixedRows.of([rows_from(plain, "one"), rows_from(chats(20), "two")]),
        ),
        "a mixture of chats and strings": (
            None,
            lambda: MixedRows.of([rows_from(chats(20), "two"), rows_from(plain, "one")]),
        ),
    }


def prepared(template, rows, processes):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    options = TokenizationOptions(
        max_length=200, dataset_num_proc=processes, score_turns="assistant",
        template_date="2025-06-30",
    )  # fmt: skip
    return prepare_pairs(rows, tokenizer, options, progress=False), tokenizer


def assert_equal(one: PairDataset, other: PairDataset):
    for name, array in one.arrays.items():
        assert np.array_equal(array, other.arrays[name]), name
        assert array.dtype == other.arrays[name].dtype
    assert one.report == other.report
    assert one.report.describe() == other.report.describe()
    assert one.content_hash == other.content_hash
    assert one.masks.keys() == other.masks.keys()
    for index, masks in one.masks.items():
        for mask, its in zip(masks, other.masks[index], strict=True):
            assert np.array_equal(mask, its)


def test_pairs_report_and_keys_do_not_depend_on_the_number_of_processes(monkeypatch):
    begun = []
    start = workers._start
    monkeypatch.setattr(workers, "_start", lambda *given: begun.append(given[0]) or start(*given))
    for name, (template, rows) in forms().items():
        alone, its = prepared(template, rows(), 1)
        assert not begun, name
        if name in ("chats", "lists", "a mixture of chats and strings"):
            together, theirs = prepared(template, rows(), 2)
            assert begun.pop() == 2, name
            assert_equal(alone, together)
            assert its.chat_template == theirs.chat_template, name


def test_chunks_of_any_size_give_the_same_pairs_and_report(monkeypatch):
    for name, (template, rows) in forms().items():
        whole = {}
        for size in (1, 7, 500):
            monkeypatch.setattr(tokenize, "_CHUNK_PAIRS", size)
            whole[size], _ = prepared(template, rows(), 1)
        assert_equal(whole[1], whole[7])
        assert_equal(whole[7], whole[500])
        assert len(whole[7]) > 15, name


def test_the_report_of_odd_rows_is_complete():
    pairs, _ = prepared(CHATML, rows_from(odd_chats(), "chats"), 1)
    said = pairs.report.describe()
    for words in (
        "60 rows read", "empty completion: row 9", "identical completions: row 20",
        "spell a special token", "character NUL", "copies of earlier ones", "several turns",
        "does not use 'unread'",
    ):  # fmt: skip
        assert words in said, words


def failing(processes, spoil):
    rows = chats(40)
    spoil(rows)
    options = {"max_length": 200}
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    with pytest.raises(DataError) as caught:
        prepare_pairs(
            rows_from(rows, "pairs"), tokenizer,
            TokenizationOptions(dataset_num_proc=processes, **options), progress=False,
        )  # fmt: skip
    return str(caught.value)


def spoil_two(rows):
    """A template's refusal in row 30 comes before the malformed row 33, read ahead of it."""
    rows[30]["chosen"][0]["content"] = "half \ud800"
    rows[33]["chosen"] = 5


def spoil_one(rows):
    rows[33]["chosen"] = 5
    rows[35]["chosen"] = 5


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(spoil_two, "pairs row 30: a text holds"), (spoil_one, "pairs row 33: .*; 1 later rows")],
)
def test_the_first_error_and_its_place_do_not_depend_on_the_number_of_processes(spoil, words):
    alone = failing(1, spoil)
    assert failing(2, spoil) == alone
    with pytest.raises(ValueError, match=words):
        raise ValueError(alone)


def test_a_process_that_ends_is_told(monkeypatch):
    monkeypatch.setattr(workers, "_COMMAND", "import os; os._exit(9)")
    with pytest.raises(RuntimeError, match=r"ended with status 9.*lower --dataset_num_proc"):
        prepared(CHATML, rows_from(chats(30), "chats"), 2)


class OwnTokenizer(PreTrainedTokenizerFast):
    """One that another process cannot be told of."""

    def __reduce__(self):
        raise pickle.PicklingError("it holds a lock")


def test_what_cannot_be_sent_is_prepared_here_and_said(caplog):
    plain = byte_tokenizer()
    tokenizer = OwnTokenizer(
        tokenizer_object=plain.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    with caplog.at_level(logging.WARNING):
        pairs = prepare_pairs(
            rows_from(preference_rows(30), "rows"), tokenizer,
            TokenizationOptions(dataset_num_proc=2), progress=False,
        )  # fmt: skip
    assert len(pairs) == 30
    assert "prepared by one process: others cannot be started" in caplog.text


def test_small_sets_start_no_process(monkeypatch):
    monkeypatch.setattr(workers, "STARTED_FOR_SECONDS", 20.0)
    monkeypatch.setattr(workers, "_start", None)
    pairs, _ = prepared(CHATML, rows_from(chats(30), "chats"), 8)
    assert len(pairs) == 30


def test_the_usual_number_is_all_cores_but_one_shared_by_the_ranks(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)), raising=False)
    assert workers.usual_processes() == 8
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert workers.usual_processes() == 2
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert workers.usual_processes() == 1


def test_a_limit_stops_at_the_row_of_its_last_pair():
    rows = rows_from(iter(chats(40)), "stream")
    tokenizer = byte_tokenizer()
    options = TokenizationOptions(dataset_num_proc=2)
    pairs = prepare_pairs(rows, tokenizer, options, limit=17, progress=False)
    assert len(pairs) == pairs.report.rows_read == 17


def test_what_a_process_is_told_makes_an_equal_maker():
    tokenizer, options = byte_tokenizer(), TokenizationOptions(max_length=64)
    maker = tokenize.PairMaker(tokenizer, options, 300)
    told = pickle.loads(pickle.dumps(maker.told()))
    other = tokenize.PairMaker.of_told(told)
    assert other.vocabulary_size == 300
    assert other.options == dataclasses.replace(options, template_date=maker.renderer.day)
    assert sys.modules[type(other).__module__] is tokenize
