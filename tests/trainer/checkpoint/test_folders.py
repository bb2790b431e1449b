"""Checkpoints: whole or refused by name, kept by step, moments by parameter name, no pickle."""

import errno
import json
import logging
import os
import shutil

import pytest

from fastdpo.system import files
from fastdpo.trainer import checkpoint
from fastdpo.trainer.checkpoint import CheckpointError

RUN = {"seed": 42, "pairs_per_update": 8, "data": "abc", "beta": 0.1, "loss_type": ["sigmoid"]}


def sealed(output_dir, step, run=RUN):
    """A checkpoint of two files, one in a folder of its own."""
    folder = output_dir / f"checkpoint-{step}"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights.safetensors").write_bytes(os.urandom(300))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    checkpoint.write_manifest(folder, run)
    return folder


def flip(path, at=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def escape(path, name):
    """Let the manifest name a file, and check out, that lies elsewhere."""
    outside = path.parents[1] / "outside"
    outside.write_text("x")
    entry = {"bytes": 1, "sha256": files.sha256_of(outside)}
    write_fields(path.parent, files={name: entry})


def write_fields(folder, **fields):
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text()) | fields
    del manifest["sha256"]
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def test_seal_and_verify(tmp_path):
    folder = sealed(tmp_path, 7)
    assert checkpoint.verify(folder).run == RUN
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    assert sorted(manifest["files"]) == ["adapter/weights.safetensors", "trainer_state.json"]
    assert manifest["files"]["adapter/weights.safetensors"]["bytes"] == 300
    assert not list(folder.rglob(f"{files.TEMPORARY_MARK}*"))


def test_everything_is_durable_before_the_manifest_has_its_name(tmp_path, monkeypatch):
    synced, fsync = [], files.fsync

    def noted(path):
        assert path == folder or not (folder / checkpoint.MANIFEST).exists(), path
        synced.append(path)
        fsync(path)

    folder = tmp_path / "checkpoint-1"
    monkeypatch.setattr(files, "fsync", noted)
    sealed(tmp_path, 1)
    contents = {folder / "adapter", folder / "adapter/weights.safetensors"}
    assert contents | {folder / "trainer_state.json", folder} <= set(synced)
    assert synced[-1] == folder


@pytest.mark.parametrize("name", ["adapter/weights.safetensors", "trainer_state.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, 0),
        lambda path: flip(path, path.stat().st_size - 1),
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:1]),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["first", "last", "missing", "empty", "one-byte", "half", "less-one", "more", "folder"],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, name, damage):
    folder = sealed(tmp_path, 7)
    damage(folder / name)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        checkpoint.verify(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff\xfe"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text("null"),
        lambda path: write_fields(path.parent, files=["trainer_state.json"]),
        lambda path: write_fields(path.parent, files={"trainer_state.json": {"bytes": 1}}),
        lambda path: write_fields(path.parent, files={"trainer_state.json": 3}),
        lambda path: write_fields(path.parent, run=5),
        lambda path: write_fields(path.parent, format=3),
        lambda path: write_fields(path.parent, plan="x"),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_bytes(b" " * (2**24 + 1)),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: escape(path, "../outside"),
        lambda path: escape(path, "/etc/hostname"),
        lambda path: escape(path, "adapter/../../outside"),
        lambda path: escape(path, ""),
        lambda path: escape(path, "a\0b"),
    ],
    ids=[
        "missing", "cut", "empty", "not-text", "list", "null", "files-a-list", "no-sha256",
        "file-a-number", "run-a-number", "newer-format", "plan-a-string", "deep", "huge", "folder",
        "above", "absolute", "above-from-below", "no-name", "nul",
    ],
)  # fmt: skip
def test_a_garbled_manifest_is_refused_by_name(tmp_path, damage):
    folder = sealed(tmp_path, 7)
    damage(folder / checkpoint.MANIFEST)
    with pytest.raises(CheckpointError, match=r"checkpoint-7.*MANIFEST\.json"):
        checkpoint.verify(folder)


def test_a_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    folder = sealed(tmp_path, 7)

    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "sha256_of", fail)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors cannot be read.*Input/output"):
        checkpoint.verify(folder)


def test_newest_that_verifies_is_taken_and_what_is_skipped_is_said(tmp_path, caplog):
    output_dir = tmp_path / "out"
    for step in (9, 10, 100, 1000):  # by number, not by name
        sealed(output_dir, step)
    (output_dir / "checkpoint-1000" / checkpoint.MANIFEST).unlink()
    flip(output_dir / "checkpoint-100" / "trainer_state.json")
    # None of these is a checkpoint.
    shutil.copytree(output_dir / "checkpoint-10", output_dir / ".tmp-0-checkpoint-2000")
    shutil.copytree(output_dir / "checkpoint-10", output_dir / "checkpoint-3000-old")
    shutil.copytree(output_dir / "checkpoint-10", output_dir / "my-checkpoint-4000")
    (output_dir / "checkpoint-5000").write_text("a file")
    os.utime(output_dir / "checkpoint-9")  # the youngest by its time

    for place in (output_dir, tmp_path / "moved"):
        if place != output_dir:
            output_dir.rename(place)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert checkpoint.newest_verified(place) == place / "checkpoint-10"
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 2
        assert "checkpoint-1000" in said[0]
        assert "MANIFEST.json" in said[0]
        assert "checkpoint-100/trainer_state.json is damaged" in said[1]


def test_nothing_to_resume_from(tmp_path):
    for output_dir in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match=r"no checkpoint-\* folder.*Start without"):
            checkpoint.newest_verified(output_dir)
    folder = sealed(tmp_path, 3)
    (folder / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is missing"):
        checkpoint.newest_verified(tmp_path)


def test_another_run_is_refused_with_both_values(tmp_path):
    run = checkpoint.verify(sealed(tmp_path, 1)).run
    checkpoint.require_same_run(run, dict(RUN))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.require_same_run(run, RUN | {"seed": 43, "beta": 0.2})
    text = str(caught.value)
    assert "seed: the checkpoint has 42, this run 43" in text
    assert "beta: the checkpoint has 0.1, this run 0.2" in text
    assert "data" not in text
    nested = {"model": {"dtype": "bf16", "base": "a"}, "beta": 0.1}
    other = {"model": {"dtype": "fp32", "base": "b"}, "beta": 0.2}
    with pytest.raises(CheckpointError, match=r"model\.base: the checkpoint has 'a', this run 'b'"):
        checkpoint.require_same_run(nested, other, ["beta"])
    assert checkpoint.require_same_run(nested, nested, ["model"]) == []
    allowed = checkpoint.require_same_run(nested, other, ["beta", "model"])
    assert [line.split(":")[0] for line in allowed] == ["model.dtype", "model.base", "beta"]
    checkpoint.require_same_run(nested, other, ["beta", "model.base", "model.dtype"])
    with pytest.raises(CheckpointError, match=r"names 'mod', and a run is described by model\."):
        checkpoint.require_same_run(nested, other, ["mod"])
    assert "--allow_config_change seed beta." in text


def test_what_one_side_does_not_know_is_no_difference():
    """As after an upgrade of fastdpo, transformers or peft; nested names too."""
    saved = {"seed": 42, "loss": {"beta": 0.1, "gone": 3}, "base": {"config": {"rope": None}}}
    now = {"seed": 42, "loss": {"beta": 0.1, "new": 1}, "base": {"config": {"rope": None, "x": 1}}}
    assert checkpoint.require_same_run(saved, {**now, "more": {"deep": 1}}) == []
    assert checkpoint.require_same_run(now, saved) == []
    now["base"]["config"]["rope"] = {"type": "yarn", "factor": 4.0}  # known to both
    for one, other in ((saved, now), (now, saved)):
        with pytest.raises(CheckpointError, match=r"\n  base\.config\.rope: the checkpoint has "):
            checkpoint.require_same_run(one, other)
    with pytest.raises(CheckpointError, match=r"\n  loss\.beta: .* 0\.1, this run 0\.2"):
        checkpoint.require_same_run(saved, {"loss": {"beta": 0.2}})


@pytest.mark.parametrize("written", [0, 3, "1", None])
def test_another_format_is_refused_with_a_sentence(tmp_path, written):
    folder = sealed(tmp_path, 1)
    write_fields(folder, format=written)
    sentence = rf"has format {written!r}, and this fastdpo reads up to 2: resume with the"
    with pytest.raises(CheckpointError, match=sentence):
        checkpoint.verify(folder)
    with pytest.raises(CheckpointError, match=sentence):
        checkpoint.newest_verified(tmp_path)


def steps(output_dir):
    return sorted(int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*"))


def test_rotation_goes_by_step(tmp_path):
    for step in (100, 20, 3, 4):  # made in this order: 4 is the youngest by its time
        sealed(tmp_path, step)
    for age, step in enumerate((100, 20, 3, 4)):
        os.utime(tmp_path / f"checkpoint-{step}", (10**9 + age, 10**9 + age))
    (tmp_path / "runs").mkdir()
    written = tmp_path / "checkpoint-100"
    for keep in (None, 0, 4, 9):
        checkpoint.rotate(tmp_path, keep, written, None)
        assert steps(tmp_path) == [3, 4, 20, 100]
    checkpoint.rotate(tmp_path, 2, written, tmp_path / "." / "checkpoint-3")
    assert steps(tmp_path) == [3, 20, 100]
    checkpoint.rotate(tmp_path, 1, written, None)
    assert steps(tmp_path) == [100]
    checkpoint.rotate(tmp_path, 1, written, None)
    assert steps(tmp_path) == [100], "the newest was deleted"
    assert (tmp_path / "runs").is_dir()
    assert checkpoint.verify(tmp_path / "checkpoint-100").run == RUN


def test_rotation_keeps_what_was_just_written_over_damaged_ones_of_higher_steps(tmp_path):
    """A run that went back behind damage must not lose the only whole checkpoint to it."""
    for step in (10, 15, 20, 30):
        sealed(tmp_path, step)
    for step in (20, 30):
        flip(tmp_path / f"checkpoint-{step}" / "trainer_state.json")
    checkpoint.rotate(tmp_path, 2, tmp_path / "checkpoint-15", None)
    assert 15 in steps(tmp_path)
    assert checkpoint.newest_verified(tmp_path) == tmp_path / "checkpoint-15"
    checkpoint.rotate(tmp_path, 1, tmp_path / "checkpoint-15", None)
    assert steps(tmp_path) == [15]


def test_rotation_leaves_links_and_what_they_point_to(tmp_path):
    output_dir, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    precious = sealed(elsewhere, 1)
    for step in (5, 6):
        sealed(output_dir, step)
    (output_dir / "checkpoint-5" / "notes").symlink_to(elsewhere)
    (output_dir / "checkpoint-2").symlink_to(precious)
    (output_dir / "checkpoint-9").symlink_to(precious)
    checkpoint.rotate(output_dir, 1, output_dir / "checkpoint-6", None)
    assert steps(output_dir) == [2, 6, 9]
    assert checkpoint.verify(precious).run == RUN


def test_leftovers_of_killed_runs_are_swept_and_nothing_else(tmp_path):
    output_dir, elsewhere = tmp_path / "out", sealed(tmp_path / "elsewhere", 1)
    kept = sealed(output_dir, 5)
    for name in ("checkpoint-6", "result"):
        leftover = files.temporary_name(output_dir / name)
        leftover.mkdir()
        (leftover / "half").write_text("x")
    files.temporary_name(output_dir / "training_args.json").write_text("{")
    (files.temporary_name(output_dir / "checkpoint-7")).symlink_to(elsewhere)
    others = [".tmp-mine", ".tmp-0-checkpoint-9", "tmp", ".tmp-" + "g" * 32 + "-x"]
    for name in others:
        (output_dir / name).mkdir()
    checkpoint.remove_stale_tmp(output_dir)
    assert sorted(path.name for path in output_dir.iterdir()) == sorted([kept.name, *others])
    assert checkpoint.verify(elsewhere).run == RUN, "a link was followed"


def test_commit_replaces(tmp_path):
    final = tmp_path / "checkpoint-5"
    for seed in (1, 2):
        temporary = sealed(tmp_path / ".tmp-x", 5, {"seed": seed})
        checkpoint.publish(temporary, final)
        assert checkpoint.verify(final).run == {"seed": seed}
        assert [path.name for path in tmp_path.iterdir() if path.name != ".tmp-x"] == [final.name]


def test_commit_replaces_a_link_and_not_what_it_points_to(tmp_path):
    precious, final = sealed(tmp_path / "elsewhere", 1), tmp_path / "checkpoint-5"
    for target in (precious, tmp_path / "nowhere"):
        final.symlink_to(target)
        checkpoint.publish(sealed(tmp_path / ".tmp-x", 5, {"seed": 1}), final)
        assert checkpoint.verify(final).run == {"seed": 1}
        shutil.rmtree(final)
    assert checkpoint.verify(precious).run == RUN


def test_a_failing_commit_leaves_the_older_one(tmp_path, monkeypatch):
    final, temporary = sealed(tmp_path, 5), sealed(tmp_path / ".tmp-x", 5, {"seed": 2})
    replace = os.replace

    def fail(source, target):
        if source == temporary:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.publish(temporary, final)
    assert checkpoint.verify(final).run == RUN
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-x", "checkpoint-5"]
