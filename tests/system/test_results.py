"""A result of several files in a folder that holds an earlier one: whole, or not there."""

import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from fastdpo.system import files, results
from tests.failing_files import FAILING, Killed, failing
from tests.ref_cache.test_faults import exit_code, in_a_child

COMMON = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", results.MARKER)
ONLY_OLD = ("chat_template.jinja", "config.json", "model-00001-of-00002.safetensors")


def writer(version, names=COMMON):
    def write(folder):
        for name in names:
            files.write_text(folder / name, version)

    return write


def lay_out(folder):
    """A folder with an earlier result of ours, a checkpoint and a file of the user."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in (*COMMON, *ONLY_OLD, "notes.txt", "checkpoint-2/adapter_config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")


def versions(folder, names=COMMON):
    return {(folder / name).read_text() for name in names if (folder / name).is_file()}


def is_old(folder):
    return versions(folder, (*COMMON, *ONLY_OLD)) == {"old"} and all(
        (folder / name).is_file() for name in (*COMMON, *ONLY_OLD)
    )


def is_new(folder):
    every = all((folder / name).is_file() for name in COMMON)
    return (
        every and versions(folder) == {"new"} and not any((folder / n).exists() for n in ONLY_OLD)
    )


def check(folder, locks):
    """No loader finds a mixture; what can be completed is; nothing else is touched."""
    before, ready = is_old(folder), pending(folder)
    if any((folder / name).is_file() for name in results.CONFIGS):
        assert len(versions(folder, (*COMMON, *ONLY_OLD))) == 1, "a mixture that a loader believes"
    results.finish(folder, locks)
    assert is_new(folder) if ready or not before else is_old(folder)
    assert not pending(folder)
    assert (folder / "notes.txt").read_text() == "old"
    assert (folder / "checkpoint-2/adapter_config.json").read_text() == "old"


def pending(folder):
    return [path for path in folder.iterdir() if (path / results.LISTING).is_file()]


def publish_under(folder, at, code=None):
    with failing(at, code), suppress(Killed, OSError):
        results.publish(folder, writer("new"))


@pytest.mark.parametrize("code", [None, FAILING], ids=["killed", "failing"])
def test_at_every_operation_of_a_publication(tmp_path, code):
    folder, seen = tmp_path / "out", []
    lay_out(folder)
    with failing(None) as disk:
        results.publish(folder, writer("new"))
    assert is_new(folder)
    for at in range(len(disk.log)):
        lay_out(folder)
        publish_under(folder, at, code)
        check(folder, tmp_path / "locks")
        seen.append(is_new(folder))
    assert seen == sorted(seen), "a later death leaves an older result"
    assert set(seen) == {True, False}


def test_a_death_while_a_death_is_mended(tmp_path):
    folder = tmp_path / "out"
    for at in range(20, 40):
        lay_out(folder)
        publish_under(folder, at)
        if not pending(folder):
            continue
        for again in range(12):
            with failing(again):
                try:
                    results.finish(folder, tmp_path / "locks")
                except Killed:
                    continue
                break
        check(folder, tmp_path / "locks")
        assert is_new(folder)


def test_nothing_that_was_written_is_an_error(tmp_path):
    folder = tmp_path / "out"
    lay_out(folder)
    for names in ((), COMMON[:1], COMMON[1:]):
        with pytest.raises(FileNotFoundError, match="a config and weights"):
            results.publish(folder, writer("new", names))
        assert is_old(folder)

    def swept(staged):
        writer("new")(staged)
        shutil.rmtree(staged)

    with pytest.raises(FileNotFoundError):
        results.publish(folder, swept)
    assert is_old(folder)
    assert not [path for path in folder.iterdir() if files.is_temporary(path)]


def test_files_of_others_stay(tmp_path):
    """Without the mark of a result of ours, what lies there is not ours to remove."""
    lay_out(tmp_path)
    (tmp_path / results.MARKER).unlink()
    results.publish(tmp_path, writer("new"))
    assert versions(tmp_path) == {"new"}
    assert versions(tmp_path, ONLY_OLD) == {"old"}


@pytest.mark.parametrize(
    "listing",
    ["{", "[]", '{"files": 1}', '{"files": ["../../precious"]}', '{"files": ["absent"]}'],
)
def test_a_listing_of_others_moves_and_removes_nothing_outside(tmp_path, listing):
    folder = tmp_path / "out"
    lay_out(folder)
    (tmp_path / "precious").write_text("x")
    staged = files.temporary_name(folder / "result")
    staged.mkdir()
    (staged / results.LISTING).write_text(listing)
    results.finish(folder, tmp_path / "locks")
    assert is_old(folder)
    assert (tmp_path / "precious").read_text() == "x"


def test_what_is_held_is_left_to_its_holder(tmp_path):
    folder, locks = tmp_path / "out", tmp_path / "locks"
    lay_out(folder)
    staged = files.temporary_name(folder / "result")
    writer("new")(staged)
    files.write_json(staged / results.LISTING, {"files": list(COMMON)})
    with files.exclusive_lock(folder, locks):
        results.finish(folder, locks)
        assert is_old(folder)
    results.finish(folder, locks)
    assert is_new(folder)
    results.finish(tmp_path / "nowhere", locks)


def test_a_real_kill(tmp_path):
    folder = tmp_path / "out"
    lay_out(folder)
    real = files.replace

    def die_before_the_config(source, target):
        if target == folder / "adapter_config.json":
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    def work():
        files.replace = die_before_the_config
        results.publish(folder, writer("new"))

    assert exit_code(in_a_child(work)) == -signal.SIGKILL
    assert not (folder / "adapter_config.json").exists(), "old config, new weights"
    assert (folder / "adapter_model.safetensors").read_text() == "new"
    results.finish(folder, tmp_path / "locks")
    assert is_new(folder)
    assert json.dumps(sorted(path.name for path in Path(folder).iterdir())) == json.dumps(
        sorted([*COMMON, "notes.txt", "checkpoint-2"])
    )
