"""Prepared pairs on disk: found by content, equal to fresh ones, and never worth a run."""

import dataclasses
import errno
import json
import logging
import os
import signal
import threading
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from safetensors.numpy import load_file
from tokenizers import AddedToken

from fastdpo.data import (
    MixedRows,
    cached_pairs,
    content,
    json_lines,
    pair_cache,
    read_rows,
    rows_from,
)
from fastdpo.data.content import preparation_identity
from fastdpo.options import TokenizationOptions
from fastdpo.system import files
from tests.data.test_workers import assert_equal, chats, odd_chats, rated
from tests.tiny_trainer import byte_tokenizer, preference_rows

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DAY = "2025-06-30"
DATED = CHATML + "{{ strftime_now('%Y') }}"


@pytest.fixture(autouse=True)
def small_sets(monkeypatch):
    monkeypatch.setattr(pair_cache, "CACHED_FROM_ROWS", 1)


def tokenizer_with(template=CHATML):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def options_in(folder, **more):
    options = {"max_length": 200, "score_turns": "assistant", "dataset_num_proc": 1}
    return TokenizationOptions(data_cache=str(folder), **(options | more))


def prepared(folder, rows, template=CHATML, **more):
    return cached_pairs(rows, tokenizer_with(template), options_in(folder, **more), progress=False)


def entries(folder):
    return sorted(folder.glob("pairs-*.safetensors"))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def never_prepares(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("they are on disk")

    return lambda: monkeypatch.setattr(pair_cache, "prepare_pairs", fail)


# A hit is a miss, bit for bit


def sources(folder):
    lines = write_lines(folder / "pairs.jsonl", odd_chats())
    table = Dataset.from_list(chats(30))
    return {
        "a file": lambda: read_rows(str(lines)),
        "a part of a file": lambda: read_rows(str(lines), split="train[10:40]"),
        "rows in memory": lambda: rows_from(odd_chats(), "mine"),
        "tuples": lambda: rows_from([(r["prompt"], r["chosen"], r["rejected"])
                                     for r in preference_rows(20)], "tuples"),
        "a table": lambda: rows_from(table, "table"),
        "some rows of a table": lambda: rows_from(table.select([3, 1, 7, 20]), "some"),
        "lists": lambda: rows_from(rated(12), "rated", rated_pairs="all"),
        "a mixture": lambda: MixedRows.of(
            [read_rows(str(lines)), rows_from(preference_rows(9), "strings")]
        ),
    }  # fmt: skip


@pytest.mark.parametrize("held", [2**26, 0])
def test_a_hit_has_the_pairs_and_the_report_of_a_miss(tmp_path, monkeypatch, never_prepares, held):
    monkeypatch.setattr(json_lines, "HELD_BYTES", held)
    first = {}
    for name, rows in sources(tmp_path).items():
        first[name] = prepared(tmp_path / name, rows())
        assert len(entries(tmp_path / name)) == 1, name
        assert_equal(first[name], prepared("off", rows()))
    assert first["a file"].masks
    assert "warning: " in first["a file"].report.describe()
    never_prepares()
    for name, rows in sources(tmp_path).items():
        found = prepared(tmp_path / name, rows())
        assert_equal(first[name], found)
        assert [p.row for p in first[name]] == [p.row for p in found]
        assert all(isinstance(place, int) for place in found.report.reasons)


def test_the_plain_template_is_set_by_a_hit_too(tmp_path, never_prepares):
    for _ in range(2):
        tokenizer = tokenizer_with(None)
        cached_pairs(rows_from(chats(3), "chats"), tokenizer, options_in(tmp_path), progress=False)
        assert tokenizer.chat_template is not None
        never_prepares()


def test_an_entry_is_safetensors_that_others_read(tmp_path):
    pairs = prepared(tmp_path, rows_from(odd_chats(), "mine"))
    arrays = load_file(entries(tmp_path)[0])
    assert (arrays["tokens"] == pairs.arrays["tokens"]).all()
    assert arrays["keys"].tobytes() == pairs.keys.tobytes()


# What finds an entry


ROWS = [*chats(9), *chats(9)]


def with_bos(tokenizer):
    tokenizer.bos_token = "</s>"


def with_another_word(tokenizer):
    tokenizer.add_tokens([AddedToken("day", special=True)])


KEY = {
    "a row": {"rows": [*ROWS[:-1], ROWS[0]]},
    "their order": {"rows": ROWS[1:] + ROWS[:1]},
    "their name": {"source": "another"},
    "columns": {"columns": {"tools": "none"}},
    "rated_pairs": {"rated_pairs": "all"},
    "template": {"template": CHATML + " "},
    "the date that a template writes": {"template": DATED, "template_date": "2025-07-01"},
    "special tokens": {"change": with_bos},
    "vocabulary of the tokenizer": {"change": with_another_word},
    "vocabulary of the model": {"vocabulary_size": 300},
    "max_length": {"max_length": 100},
    "max_prompt_length": {"max_prompt_length": 9},
    "max_completion_length": {"max_completion_length": 9},
    "truncation_mode": {"truncation_mode": "keep_start"},
    "special_tokens_in_content": {"special_tokens_in_content": "allow"},
    "score_turns": {"score_turns": "all"},
    "strict_data": {"strict_data": True},
}


def identity(
    rows=ROWS, source="mine", columns=None, rated_pairs="best_worst", template=CHATML,
    change=None, vocabulary_size=None, template_date=DAY, **options,
):  # fmt: skip
    tokenizer = tokenizer_with(template)
    if change is not None:
        change(tokenizer)
    read = rows_from(rows, source, columns=columns, rated_pairs=rated_pairs)
    options = options_in("off", template_date=template_date, **options)
    return preparation_identity(read, tokenizer, options, vocabulary_size)


def test_every_part_of_the_key_finds_another_entry():
    base = {pair_cache.entry_name(identity()), pair_cache.entry_name(identity(template=DATED))}
    names = {name: pair_cache.entry_name(identity(**changed)) for name, changed in KEY.items()}
    assert len({*names.values()} | base) == len(KEY) + 2
    options = {each.name for each in dataclasses.fields(TokenizationOptions)}
    assert options - {*KEY} == {*content.NOT_OF_PAIRS}


@pytest.mark.parametrize("part", ["FORMAT", *content.VERSIONS])
def test_the_format_and_each_library_count(part, monkeypatch):
    before = identity()
    if part == "FORMAT":
        monkeypatch.setattr(content, "FORMAT", 99)
    else:
        real = content.version
        monkeypatch.setattr(content, "version", lambda name: real(name) + ".1" * (name == part))
    assert pair_cache.entry_name(identity()) != pair_cache.entry_name(before)


def test_what_changes_no_pair_changes_no_key():
    same = identity()
    assert same == identity(dataset_num_proc=3)
    assert same == identity(template_date="2025-07-01")  # the template writes no date
    used = tokenizer_with()
    used(["a", "b"], padding=True, truncation=True, max_length=4)
    rows = rows_from(ROWS, "mine")
    assert same == preparation_identity(rows, used, options_in("off", template_date=DAY), None)


def test_lines_that_stand_elsewhere_in_the_file_have_other_places(tmp_path):
    lines = write_lines(tmp_path / "pairs.jsonl", odd_chats())
    first = prepared(tmp_path / "cache", read_rows(str(lines)))
    lines.write_text("\n" + lines.read_text())
    second = prepared(tmp_path / "cache", read_rows(str(lines)))
    assert first.report.describe() != second.report.describe()
    assert first.content_hash == second.content_hash


class Tokenizer(type(byte_tokenizer())):
    """One with Python code of its own, which no hash knows."""


def test_what_cannot_be_known_by_its_content_is_prepared_every_time(tmp_path):
    plain = byte_tokenizer()
    own = Tokenizer(tokenizer_object=plain.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    rows = preference_rows(5)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    transformed = Dataset.from_list(rows).with_transform(lambda batch: batch)
    for dataset, tokenizer in (
        (rows, own), (stream, plain), (transformed, plain), (iter(rows), plain),
        ([{**row, "extra": object()} for row in rows], plain),
    ):  # fmt: skip
        read = rows_from(dataset, "mine")
        assert len(cached_pairs(read, tokenizer, options_in(tmp_path), progress=False)) == 5
    assert not entries(tmp_path)


def test_a_file_that_changes_while_it_is_used_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "HELD_BYTES", 0)
    lines = write_lines(tmp_path / "pairs.jsonl", ROWS)
    rows = read_rows(str(lines))
    assert list(rows.rows) == ROWS
    assert rows.rows[2:4] == ROWS[2:4]
    assert rows.rows[-1] == ROWS[-1]
    write_lines(lines, ROWS[:3])
    with pytest.raises(ValueError, match=r"pairs.jsonl was changed while this run used it"):
        list(rows.rows)


# Damage, full disks, several at once


def damages():
    return {
        "a flipped bit": lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:],
        "cut off": lambda b: b[: len(b) // 2],
        "empty": lambda b: b"",
        "no header": lambda b: b"\xff" * len(b),
        "another file": lambda b: b"{}" * 50,
        "a changed report": lambda b: b.replace(b"rows_read", b"rows_reaD"),
        "a name less": lambda b: b.replace(b'"mask_sides"', b'"mask_sideZ"'),
    }


@pytest.mark.parametrize("damage", damages())
def test_a_damaged_entry_is_set_aside_and_prepared_again(tmp_path, caplog, damage):
    rows = rows_from(odd_chats(), "mine")
    first = prepared(tmp_path, rows)
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    entry.write_bytes(damages()[damage](whole))
    with caplog.at_level(logging.WARNING):
        assert_equal(first, prepared(tmp_path, rows))
    assert "is damaged" in caplog.text
    assert [path.name for path in tmp_path.glob("*.bad")] == [entry.name + ".bad"]
    assert entry.read_bytes() == whole


@pytest.mark.parametrize("operation", ["call_writer", "fsync", "sha256_of", "replace", "mkdir"])
def test_a_full_disk_costs_the_entry_and_not_the_run(tmp_path, monkeypatch, caplog, operation):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, operation, full)
    with caplog.at_level(logging.WARNING):
        pairs = prepared(tmp_path / "cache", rows_from(ROWS, "mine"))
    assert len(pairs) == len(ROWS)
    assert "No space left" in caplog.text
    assert "the next run prepares them again" in caplog.text
    assert not [*tmp_path.rglob("pairs-*")]


def test_a_read_only_folder_can_be_read(tmp_path, monkeypatch, never_prepares):
    first = prepared(tmp_path, rows_from(ROWS, "mine"))

    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files, "touch", refuse)
    never_prepares()
    assert_equal(first, prepared(tmp_path, rows_from(ROWS, "mine")))


def test_a_run_that_is_killed_while_it_writes_leaves_nothing_that_is_read(tmp_path):
    child = os.fork()
    if not child:
        try:
            files.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
            prepared(tmp_path, rows_from(ROWS, "mine"))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not entries(tmp_path)
    assert [files.is_temporary(path) for path in tmp_path.iterdir()] == [True]
    pairs = prepared(tmp_path, rows_from(ROWS, "mine"))
    assert_equal(pairs, prepared(tmp_path, rows_from(ROWS, "mine")))


def test_two_writers_leave_one_whole_entry(tmp_path):
    gate, found = threading.Barrier(2), []

    def write():
        gate.wait()
        found.append(prepared(tmp_path, rows_from(odd_chats(), "mine")))

    both = [threading.Thread(target=write) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert_equal(*found)
    assert len(entries(tmp_path)) == len(list(tmp_path.iterdir())) == 1
    assert_equal(found[0], prepared(tmp_path, rows_from(odd_chats(), "mine")))


def test_the_entries_used_last_are_kept_within_bounds(tmp_path, monkeypatch):
    for number, source in enumerate(("first", "second")):
        prepared(tmp_path, rows_from(ROWS, source))
        for path in entries(tmp_path):
            if path.stat().st_mtime > 1_000:
                os.utime(path, (number, number))
    size = max(path.stat().st_size for path in entries(tmp_path))
    prepared(tmp_path, rows_from(ROWS, "first"))  # used now
    monkeypatch.setattr(pair_cache, "MOST_BYTES", 2 * size + 100)
    prepared(tmp_path, rows_from(ROWS, "third"))
    sources = {pair_cache.summarize_entry(path).source for path in entries(tmp_path)}
    assert sources == {"first", "third"}


def test_small_sets_and_a_folder_that_is_off_keep_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(pair_cache, "CACHED_FROM_ROWS", 500)
    prepared(tmp_path, rows_from(ROWS, "mine"))
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path))
    prepared("off", rows_from(preference_rows(600), "mine"))
    assert not [*Path(tmp_path).rglob("pairs-*")]
    prepared_default = TokenizationOptions()
    rows = rows_from(preference_rows(600), "mine")
    cached_pairs(rows, byte_tokenizer(), prepared_default, progress=False)
    assert len(entries(tmp_path / "data")) == 1
