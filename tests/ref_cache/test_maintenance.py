"""Stores at rest: exported, imported, verified, pruned, listed and built by command."""

import io
import json
import logging
import os
import random
import re
import tarfile
import time

import numpy as np
import pytest

from fastdpo.cli.parser import command
from fastdpo.data import cached_pairs, pair_cache, rows_from
from fastdpo.options import TokenizationOptions
from fastdpo.ref_cache import ReferenceStore, archive, compute, maintenance
from fastdpo.ref_cache.archive import ArchiveError, export_store, import_store
from fastdpo.ref_cache.maintenance import DAY_S, prune, prune_pairs, store_folders, summarize
from fastdpo.ref_cache.store import ScoredCompletion
from fastdpo.reference import main
from fastdpo.system import files
from tests.ref_cache.test_compute import GROUPS, IDENTITY, adapted, fill, shards, temporaries
from tests.ref_cache.test_store import keys_of, logps_of, lookup, some_rows, written
from tests.tiny_trainer import byte_tokenizer, preference_rows

ROWS, MORE = some_rows(seed=1), some_rows(seed=2)


@pytest.fixture
def exported(tmp_path):
    """A file with two shards, and the root it came from."""
    root = tmp_path / "here"
    written(root, ROWS)
    written(root, MORE)
    store = ReferenceStore(root, IDENTITY)
    files.write_json(store.folder / "asked-0a.json", {"at": 1.0, "asked": {"model": "tiny"}})
    assert export_store(store.folder, tmp_path / "store.tar") == 2
    return tmp_path / "store.tar"


def test_export_and_import_carry_a_store(tmp_path, exported):
    there = tmp_path / "there"
    written(there, ROWS[:1])  # what lies there stays
    folder, new = import_store(exported, there)
    assert new == 2
    assert folder == ReferenceStore(there, IDENTITY).folder
    assert lookup(there, ROWS + MORE).tolist() == logps_of(ROWS + MORE)
    assert summarize(folder).models == ("tiny",)
    assert import_store(exported, there)[1] == 0, "a second time nothing is new"
    assert not temporaries(there)
    again = tmp_path / "again.tar"
    export_store(ReferenceStore(tmp_path / "here", IDENTITY).folder, again)
    assert again.read_bytes() == exported.read_bytes()


def test_every_flipped_byte_of_an_archive_is_noticed_or_harmless(tmp_path, exported, soak):
    content = exported.read_bytes()
    draw, refused = random.Random(5), 0
    wanted = logps_of(ROWS + MORE)
    for at in range(0, len(content), 1 if soak else 97):
        damaged = bytearray(content)
        damaged[at] ^= 1 << draw.randrange(8)
        exported.write_bytes(damaged)
        root = tmp_path / f"root-{at}"
        try:
            import_store(exported, root)
        except ArchiveError:
            refused += 1
            assert not list(root.rglob("*"))
        else:
            assert lookup(root, ROWS + MORE).tolist() == wanted, f"byte {at}"
    assert refused
    for length in (0, 1, 600, 1500, 3000):
        exported.write_bytes(content[:length])
        with pytest.raises(ArchiveError):
            import_store(exported, tmp_path / "cut")
        assert not list((tmp_path / "cut").rglob("*"))


def packed(path, members, store="0" * 32, **contents):
    """A tar with a list that fits its members, unless the list is given."""
    listed = {
        name: {"bytes": len(text), "sha256": files.hashlib.sha256(text).hexdigest()}
        for name, text in members
    }
    text = json.dumps({"format": 1, "store": store, "files": listed} | contents).encode()
    with tarfile.open(path, "w") as tar:
        for name, part in [(archive.CONTENTS, text), *members]:
            member = tarfile.TarInfo(name)
            member.size = len(part)
            tar.addfile(member, io.BytesIO(part))
    return path


MANIFEST = ("manifest.json", b"{}")
HOSTILE = {
    "path upwards": [MANIFEST, ("../shard-0.safetensors", b"x")],
    "absolute path": [MANIFEST, ("/tmp/shard-0.safetensors", b"x")],
    "folder": [MANIFEST, ("a/shard-0.safetensors", b"x")],
    "other file": [MANIFEST, ("shard-0.pickle", b"x")],
    "no shard": [MANIFEST, ("shard-0.safetensors", b"x")],
    "huge header": [MANIFEST, ("shard-0.safetensors", b"\xff" * 7 + b"\x7f{}")],
    "other manifest": [MANIFEST],
    "NaN": [("manifest.json", b'{"a": NaN}')],
    "list as manifest": [("manifest.json", b"[]")],
    "deep manifest": [("manifest.json", b"[" * 100_000)],
    "no manifest": [("asked-0.json", b"{}")],
    "twice": [MANIFEST, ("asked-0.json", b"{}"), ("asked-0.json", b"{}")],
    "large note": [MANIFEST, ("asked-0.json", b" " * 2**17)],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_refused(tmp_path, kind):
    path = packed(tmp_path / "x.tar", HOSTILE[kind])
    with pytest.raises(ArchiveError, match=r"x\.tar"):
        import_store(path, tmp_path / "root")
    assert not list((tmp_path / "root").rglob("*"))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["root", "x.tar"]


@pytest.mark.parametrize(
    "contents",
    [{"format": 2}, {"store": "../x"}, {"store": None}, {"files": []}, {"files": {}},
     {"files": {"manifest.json": 1}}, {"files": {"manifest.json": {"bytes": 2**60}}}],
)  # fmt: skip
def test_a_hostile_list_is_refused(tmp_path, contents):
    path = packed(tmp_path / "x.tar", [MANIFEST], **contents)
    with pytest.raises(ArchiveError, match="list"):
        import_store(path, tmp_path / "root")


def test_links_and_other_kinds_are_refused(tmp_path, exported):
    path = packed(tmp_path / "x.tar", [MANIFEST])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("shard-0.safetensors")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ArchiveError):
        import_store(path, tmp_path / "root")
    sparse = tarfile.TarInfo("shard-0.safetensors")
    sparse.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**31)}
    sparse.size = 1
    path = packed(tmp_path / "sparse.tar", [MANIFEST])
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(sparse, io.BytesIO(b"x"))
    with pytest.raises(ArchiveError, match="which belongs into none"):
        import_store(path, tmp_path / "root")
    with pytest.raises(ArchiveError, match="no archive of a store"):
        import_store(written(tmp_path / "other", ROWS), tmp_path / "root")
    with pytest.raises(ValueError, match="holds no reference store"):
        export_store(tmp_path, tmp_path / "y.tar")


# Prune, verify, info


def make_old(folder, days):
    then = time.time() - days * DAY_S
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (then, then))


def test_prune_removes_leftovers_and_keeps_what_lives(tmp_path):
    path = written(tmp_path, ROWS)
    bad = path.with_name(path.name + ".bad")
    bad.write_bytes(b"x")
    old, fresh = files.temporary_name(path), files.temporary_name(path)
    for each in (old, fresh):
        each.write_bytes(b"xx")
    os.utime(old, (0, 0))
    dry = prune(tmp_path, dry_run=True)
    assert set(dry.stale_files) == {bad, old}
    assert (dry.bytes, dry.unused) == (3, ())
    assert bad.exists()
    assert old.exists()
    assert prune(tmp_path) == dry
    assert not bad.exists()
    assert not old.exists()
    assert fresh.exists(), "it may belong to a writer that lives"
    assert lookup(tmp_path, ROWS).tolist() == logps_of(ROWS)


def test_prune_goes_by_last_use_and_is_safe_beside_a_reader_and_a_writer(tmp_path):
    model = adapted()
    reader = ReferenceStore(tmp_path, IDENTITY)
    reader.append(ROWS)
    assert len(reader) == 3
    make_old(reader.folder, 40)
    assert prune(tmp_path, unused_days=41).unused == ()
    assert prune(tmp_path, unused_days=39, dry_run=True).unused == (reader.folder,)
    assert prune(tmp_path).unused == ()
    assert prune(tmp_path, unused_days=39).unused == (reader.folder,)
    assert list(tmp_path.iterdir()) == []
    assert reader.lookup(keys_of(ROWS)).tolist() == logps_of(ROWS), "it has read them already"
    reader.append(MORE)  # the folder comes back, manifest and all
    assert store_folders(tmp_path) == [reader.folder]
    assert lookup(tmp_path, MORE).tolist() == logps_of(MORE)
    make_old(reader.folder, 40)
    fill(model, GROUPS[:1], tmp_path)
    make_old(reader.folder, 40)
    fill(model, GROUPS[:1], tmp_path)  # a hit is a use
    assert prune(tmp_path, unused_days=39).unused == ()


def test_a_reader_lists_again_when_a_shard_went_while_it_read(tmp_path, monkeypatch):
    """Shards that are merged into another by a later release: union before, union after."""
    first = written(tmp_path, ROWS, name="0")
    second = written(tmp_path, MORE, name="1")
    store = ReferenceStore(tmp_path, IDENTITY)
    real = store._read

    def read(path):
        if path == first and path.exists():
            written(tmp_path, ROWS + MORE, name="2")
            first.unlink()
            second.unlink()
        return real(path)

    monkeypatch.setattr(store, "_read", read)
    assert store.lookup(keys_of(ROWS + MORE)).tolist() == logps_of(ROWS + MORE)


def test_summary_counts_and_changes_nothing(tmp_path):
    path = written(tmp_path, ROWS)
    written(tmp_path, MORE)
    path.write_bytes(path.read_bytes()[:-1])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    found = summarize(path.parent)
    assert (found.rows, found.shards, list(found.damaged)) == (3, 2, [path.name])
    assert found.bytes == sum(p.stat().st_size for p in path.parent.iterdir())
    assert 0 <= found.unused_s <= found.age_s < 60
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    assert maintenance.store_folders(tmp_path / "none") == []


# The command


def run(capsys, monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["reference", *map(str, argv)])
    monkeypatch.setattr(logging.getLogger("fastdpo"), "handlers", [])  # `command` adds one
    try:
        code = command(main)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_on_stores(tmp_path, capsys, monkeypatch, exported):
    here, there = ["--ref_cache", tmp_path / "here"], ["--ref_cache", tmp_path / "there"]
    out = tmp_path / "out.tar"
    code, said, _ = run(capsys, monkeypatch, "info", *here)
    assert code == 0
    assert "1 store in" in said
    assert "tiny" in said
    assert run(capsys, monkeypatch, "export", *here, "--file", out)[0] == 0
    code, said, _ = run(capsys, monkeypatch, "import", *there, "--file", out)
    assert (code, said.split()[:3]) == (0, ["2", "new", "shards"])
    code, said, _ = run(capsys, monkeypatch, "verify", *there)
    assert (code, "2 shards are whole, 6 completions" in said) == (0, True)
    path = shards(tmp_path / "there")[0]
    path.write_bytes(path.read_bytes()[:-1])
    code, said, complaint = run(capsys, monkeypatch, "verify", *there)
    assert code == 2
    assert f"damaged and set aside: {path.name}" in said
    assert "1 damaged shards" in complaint
    assert run(capsys, monkeypatch, "verify", *there)[0] == 0
    code, said, _ = run(capsys, monkeypatch, "prune", *there, "--dry_run")
    assert "0 stores and 1 leftovers: would free" in said
    code, said, _ = run(capsys, monkeypatch, "prune", *there)
    assert "0 stores and 1 leftovers: freed" in said


def test_the_command_on_prepared_pairs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pair_cache, "CACHED_FROM_ROWS", 1)
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path))
    folder = tmp_path / "data"
    for source in ("one", "two"):
        rows = rows_from(preference_rows(5), source)
        cached_pairs(rows, byte_tokenizer(), TokenizationOptions(), progress=False)
    code, said, _ = run(capsys, monkeypatch, "info")
    assert code == 0
    assert f"2 sets of prepared pairs in {folder}" in said
    assert re.search(r"\none +5 +0\.0 +0\.0\n", said)
    assert run(capsys, monkeypatch, "verify")[0] == 0
    assert "prepared pairs" not in run(capsys, monkeypatch, "info", "--data_cache", "off")[1]
    first, second = pair_cache.entries(folder)
    first.write_bytes(first.read_bytes()[:-1])
    code, said, complaint = run(capsys, monkeypatch, "verify")
    assert code == 2
    assert f"damaged and set aside: {first}: its checksum is wrong" in said
    assert "1 damaged sets of prepared pairs" in complaint
    make_old(second, 40)
    stale, fresh = files.temporary_name(second), files.temporary_name(second)
    for each in (stale, fresh):
        each.write_bytes(b"x")
    os.utime(stale, (0, 0))
    for more, done in (["--dry_run"], "would free"), ([], "freed"):
        code, said, _ = run(capsys, monkeypatch, "prune", "--unused_days", "39", *more)
        assert f"1 sets of prepared pairs and 2 leftovers: {done}" in said
        assert second.exists() == bool(more)
    assert list(folder.iterdir()) == [fresh], "it may belong to a writer that lives"
    with pytest.raises(ValueError, match="unused_days"):
        prune_pairs(folder, unused_days=-1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["paint"], "'paint' is no action"),
        (["export"], "0 stores"),
        (["import"], "--file is missing"),
        (["import", "--file", "nowhere.tar"], "nowhere.tar"),
        (["info", "--store", "abc"], "none of 0 begins so"),
        (["info", "--ref_cache", "off"], "--ref_cache is off"),
        (["build", "--ref_cache", "off"], "--ref_cache is off"),
        (["build"], "--model is missing"),
        (["info", "--stoer", "x"], "the nearest is --store"),
    ],
)
def test_the_command_refuses(tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path))
    code, _, complaint = run(capsys, monkeypatch, *argv)
    assert code == 2
    assert message in complaint


def test_the_command_helps(capsys, monkeypatch):
    for argv in ([], ["--help"]):
        code, said, _ = run(capsys, monkeypatch, *argv)
        assert code == 0
        assert "build" in said
        assert "export" in said
    assert "--unused_days" in run(capsys, monkeypatch, "prune", "--help")[1]


def test_build_fills_what_training_then_finds(tmp_path, capsys, monkeypatch, caplog):
    from transformers import AutoModelForCausalLM

    from fastdpo import train
    from tests.tiny_trainer import CONFIG, HELD_OUT, TOKENIZER
    from tests.tiny_trainer import ROWS as PAIRS

    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    for name, rows in (("train", PAIRS), ("dev", HELD_OUT)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    options = [
        "--model", tmp_path / "model", "--dataset", tmp_path / "train.jsonl", "--eval_dataset",
        tmp_path / "dev.jsonl", "--use_cpu", "--ref_cache", tmp_path / "cache", "--output_dir",
        tmp_path / "out",
    ]  # fmt: skip
    assert run(capsys, monkeypatch, "build", *options)[0] == 0
    assert len(store_at(tmp_path / "cache")) == 2 * (len(PAIRS) + len(HELD_OUT))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    monkeypatch.setattr(compute, "score_groups", lambda *_, **__: pytest.fail("computed again"))
    train.main([*map(str, options), "--max_steps", "1", "--learning_rate", "1e-3", "--lora_r", "2"])
    said = run(capsys, monkeypatch, "info", "--ref_cache", tmp_path / "cache")[1]
    assert str(tmp_path / "model") in said


def store_at(root):
    (folder,) = store_folders(root)
    identity = json.loads((folder / "manifest.json").read_text())["identity"]
    return ReferenceStore(root, identity)


# Size


def test_many_rows(tmp_path, soak):
    """A million pairs under --soak: time to find them all, memory, bytes on disk."""
    import resource

    pairs, each = (1_000_000 if soak else 5_000), 100
    draw = np.random.default_rng(0)
    store = ReferenceStore(tmp_path, IDENTITY)
    tokens, keys = np.full(each, -0.5, np.float32), []
    for first in range(0, 2 * pairs, 4096):
        shard = [draw.bytes(32) for _ in range(min(4096, 2 * pairs - first))]
        store.append([ScoredCompletion(key, -50.0, tokens) for key in shard])
        keys += shard
    size = sum(path.stat().st_size for path in store.folder.iterdir())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for reader in (ReferenceStore(tmp_path, IDENTITY),) * 2:
        began = time.perf_counter()
        assert (reader.lookup(keys) == -50.0).all()
        times.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
        f"{pairs:,} pairs: first look-up {times[0]:.2f} s, again {times[1]:.2f} s, "
        f"{peak / 1024:.0f} MiB more at the peak, {size / 2**20:.0f} MiB on disk"
    )
    assert size < 2 * pairs * (32 + 8 + 8 + 4 * each) * 1.02


def test_an_archive_larger_than_the_disk_is_refused_before_it_is_unpacked(
    tmp_path, exported, monkeypatch
):
    monkeypatch.setattr(files, "free_bytes", lambda _: 1000)
    with pytest.raises(OSError, match=r"bytes are needed and 1,000 are free") as refused:
        import_store(exported, tmp_path / "there")
    assert refused.value.filename == str(tmp_path / "there")
    assert not list((tmp_path / "there").rglob("*"))


@pytest.mark.parametrize("days", [-1, -1e-9, float("nan"), float("inf"), -float("inf")])
def test_prune_takes_no_store_for_days_that_are_none(tmp_path, capsys, days, monkeypatch):
    written(tmp_path, ROWS)
    argv = ["prune", "--ref_cache", str(tmp_path), f"--unused_days={days}"]
    monkeypatch.setattr("sys.argv", ["reference", *argv])
    with pytest.raises(SystemExit) as ended:
        command(main)
    assert ended.value.code == 2
    assert "unused_days" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unused_days"):
        prune(tmp_path, unused_days=days)
    assert len(store_folders(tmp_path)) == 1
