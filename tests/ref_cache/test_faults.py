"""What no fault may do to the reference store: full disks, kills, several writers, prunes."""

import errno
import os
import random
import resource
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fastdpo.ref_cache import ReferenceStore, StoreOptions, compute
from fastdpo.ref_cache import shards as shards_module
from fastdpo.ref_cache.store import group_keys
from fastdpo.system import files
from tests.modeling.test_packed_pairs import random_groups
from tests.ref_cache.test_compute import IDENTITY, adapted, fill, shards, temporaries
from tests.ref_cache.test_store import keys_of, logps_of, lookup, some_rows, written

OPERATIONS = ((files, "_write_bytes"), (files, "fsync"), (files, "sha256_of"), (os, "replace"))


def fail_at(patch, countdown, code):
    """Let the operation of that number fail, counted over all that touch the disk."""
    left = [countdown]

    def failing(real):
        def call(*args):
            left[0] -= 1
            if left[0] == -1:
                raise OSError(code, os.strerror(code))
            return real(*args)

        return call

    for holder, name in OPERATIONS:
        patch.setattr(holder, name, failing(getattr(holder, name)))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_every_operation_of_a_write_may_fail(tmp_path, monkeypatch, code):
    old, new = some_rows(seed=1), some_rows(seed=2)
    path = written(tmp_path, old)
    content = path.read_bytes()
    store = ReferenceStore(tmp_path, IDENTITY)
    store.lookup([])
    for countdown in range(5):
        with monkeypatch.context() as patch:
            fail_at(patch, countdown, code)
            with pytest.raises(OSError, match=f"{os.strerror(code)}.*{store.folder}/shard-") as e:
                store.append(new)
        assert e.value.errno == code
        assert not temporaries(tmp_path), f"operation {countdown} leaves its temporary file"
        named = countdown == 4  # only the last, the sync of the folder, comes after the rename
        for found in (lookup(tmp_path, new), store.lookup(keys_of(new))):
            assert found.tolist() == logps_of(new) if named else np.isnan(found).all()
        assert lookup(tmp_path, old).tolist() == logps_of(old)
        assert path.read_bytes() == content
    with monkeypatch.context() as patch:
        fail_at(patch, 5, code)
        store.append(new)  # there is no sixth operation
    assert lookup(tmp_path, new).tolist() == logps_of(new)


def test_a_really_full_disk(tmp_path):
    store = ReferenceStore(tmp_path, IDENTITY)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(OSError, match="shard-") as caught:
            store.append(some_rows())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert not shards(tmp_path)
    assert not temporaries(tmp_path)


def test_a_shard_that_another_process_sets_aside_meanwhile(tmp_path, monkeypatch):
    good, gone = some_rows(seed=1), some_rows(seed=2)
    written(tmp_path, good)
    safe_open = shards_module.safe_open
    for late in (False, True):
        path = written(tmp_path, gone, name="0")
        path.write_bytes(path.read_bytes()[:-1])

        def open_and_lose(opened, path=path, late=late, **options):
            if opened == path and not late:
                path.unlink()
            try:
                return safe_open(opened, **options)
            finally:
                if opened == path and late:
                    path.unlink()

        with monkeypatch.context() as patch:
            patch.setattr(shards_module, "safe_open", open_and_lose)
            found = lookup(tmp_path, good + gone)
        assert found[:3].tolist() == logps_of(good)
        assert np.isnan(found[3:]).all()
        assert not path.exists()


# Kills and company. The child is a fork: it has the stack loaded, which costs 7 s otherwise.

MANY = random_groups(count=24)


def in_a_child(work):
    """Run `work` in a forked process; returns its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)  # no pytest, no atexit
    return child


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def assert_same_logps(found, whole):
    """A pass that was cut short packs what is left in other company, and on some CPUs a matrix
    product rounds a row otherwise when there are more or fewer of them.
    """
    np.testing.assert_allclose(found, whole, rtol=1e-7, atol=0)


@pytest.fixture
def slow_pass(monkeypatch, tmp_path):
    """A pass of small shards that takes its time and notes every completion it computes."""
    log = tmp_path / "computed.log"
    real = compute.score_groups

    def score_groups(model, groups, **options):
        for one in real(model, groups, **options):
            time.sleep(0.004)
            with log.open("a") as out:
                keys = group_keys(groups[one.index])
                out.write("".join(f"{os.getpid()} {key.hex()}\n" for key in keys))
            yield one

    monkeypatch.setattr(compute, "score_groups", score_groups)
    monkeypatch.setattr(compute, "SHARD_COMPLETIONS", 8)
    return lambda: [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def test_kill_at_any_moment_of_a_build(tmp_path, slow_pass, soak):
    model = adapted()
    whole = fill(model, MANY, tmp_path / "whole")
    draw = random.Random(11)
    kills_wanted, kills, root = 50 if soak else 5, 0, 0
    lost, rounds = 0, 0
    while kills < kills_wanted:
        root += 1
        store = tmp_path / str(root)
        before = len(slow_pass())
        killed_here = 0
        while True:
            rounds += 1
            child = in_a_child(lambda folder=store: fill(model, MANY, folder))
            if killed_here < 5:  # then it may finish, however slow the machine is
                time.sleep(draw.uniform(0.0, 0.3))
                os.kill(child, signal.SIGKILL)
            if exit_code(child) == 0:
                break
            kills, killed_here = kills + 1, killed_here + 1
        computed = Counter(key for _, key in slow_pass()[before:])
        again = sum(computed.values()) - len(computed)
        lost += again
        assert again <= 8 * killed_here + 2, "more than the shard in hand was computed again"
        assert_same_logps(fill(model, MANY, store), whole)
        assert not list(store.rglob("*.bad")), "a killed writer left a damaged shard"
    print(f"{kills} kills, {rounds} starts, {lost} completions computed again")


def test_sigterm_inside_the_pass_keeps_what_is_done(tmp_path, slow_pass):
    model = adapted()
    child = in_a_child(lambda: fill(model, MANY, tmp_path / "store"))
    while len(slow_pass()) < 21:
        time.sleep(0.002)
    os.kill(child, signal.SIGTERM)
    assert exit_code(child) == 143
    done = len(slow_pass())
    assert done < 2 * len(MANY), "it was not interrupted"
    keys = [key for group in MANY for key in group_keys(group)]
    kept = np.isfinite(ReferenceStore(tmp_path / "store", IDENTITY).lookup(keys)).sum()
    assert kept == done, "computed and not kept"


def test_two_builders_at_once(tmp_path, slow_pass):
    model, root = adapted(), tmp_path / "store"
    whole = fill(model, MANY, tmp_path / "whole")
    children = [
        in_a_child(lambda groups=groups: fill(model, groups, root))
        for groups in (MANY, MANY[::-1], MANY[:9])
    ]
    assert [exit_code(child) for child in children] == [0, 0, 0]
    before = len(slow_pass())
    assert_same_logps(fill(model, MANY, root), whole)
    assert len(slow_pass()) == before, "the union is not complete"
    assert len(shards(root)) >= 3
    assert not temporaries(root)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_every_operation_of_a_build_may_fail(tmp_path, monkeypatch, code):
    """The manifest, the note and each shard; after any failure the same build goes on."""
    model, groups = adapted(), MANY[:6]
    monkeypatch.setattr(compute, "SHARD_COMPLETIONS", 4)
    whole = fill(model, groups, tmp_path / "whole")
    failures = 0
    for countdown in range(100):
        root = tmp_path / str(countdown)
        with monkeypatch.context() as patch:
            fail_at(patch, countdown, code)
            caught = None
            try:
                fill(model, groups, root, requested={"max_length": 8})
            except OSError as error:
                caught = error
        if caught is None and countdown > 30:
            break
        if caught is not None:
            failures += 1
            assert caught.errno == code
            assert str(root) in str(caught), "the message names no file"
        assert not temporaries(root)
        assert_same_logps(fill(model, groups, root), whole)
        assert not list(root.rglob("*.bad"))
    assert 15 <= failures <= countdown


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_shard_that_cannot_be_read_is_not_set_aside(tmp_path, monkeypatch, code):
    path = written(tmp_path, some_rows())
    real = Path.open

    def open_(self, *args, **options):
        if self == path:
            raise OSError(code, os.strerror(code), str(path))
        return real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_)
        with pytest.raises(OSError, match="shard-"):
            lookup(tmp_path, some_rows())
    assert path.exists(), "it may be whole"
    assert lookup(tmp_path, some_rows()).tolist() == logps_of(some_rows())


CHECKED = StoreOptions(spot_check_pairs=2)


def test_a_read_only_store_serves_a_hit(tmp_path, monkeypatch):
    model, groups = adapted(), MANY[:4]
    whole = fill(model, groups, tmp_path)

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(files, "_write_bytes", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    found = fill(model, groups, tmp_path, requested={"max_length": 8}, store_options=CHECKED)
    assert np.array_equal(found, whole)
