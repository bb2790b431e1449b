"""Checkpoints: whole or refused by name, kept by step, moments by parameter name, no pickle."""

import errno
import json
import logging
import os
import pickletools
import random
import resource
import shutil

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from torch import nn

from fastdpo import checkpoint, files
from fastdpo.checkpoint import CheckpointError

RUN = {"seed": 42, "pairs_per_update": 8, "data": "abc", "beta": 0.1, "loss_type": ["sigmoid"]}


def sealed(output_dir, step, run=RUN):
    """A checkpoint of two files, one in a folder of its own."""
    folder = output_dir / f"checkpoint-{step}"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights.safetensors").write_bytes(os.urandom(300))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    checkpoint.seal(folder, run)
    return folder


def flip(path, at=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def write_fields(folder, **fields):
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text()) | fields
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def test_seal_and_verify(tmp_path):
    folder = sealed(tmp_path, 7)
    assert checkpoint.verify(folder) == RUN
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    assert sorted(manifest["files"]) == ["adapter/weights.safetensors", "trainer_state.json"]
    assert manifest["files"]["adapter/weights.safetensors"]["bytes"] == 300
    assert not list(folder.rglob(f"{files.TEMPORARY_MARK}*"))


def test_everything_is_durable_before_the_manifest_has_its_name(tmp_path, monkeypatch):
    synced, sync = [], files.sync

    def noted(path):
        assert path == folder or not (folder / checkpoint.MANIFEST).exists(), path
        synced.append(path)
        sync(path)

    folder = tmp_path / "checkpoint-1"
    monkeypatch.setattr(files, "sync", noted)
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
        lambda path: write_fields(path.parent, format=2),
    ],
    ids=[
        "missing", "cut", "empty", "not-text", "list", "null", "files-a-list", "no-sha256",
        "file-a-number", "run-a-number", "newer-format",
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
    run = checkpoint.verify(sealed(tmp_path, 1))
    checkpoint.require_same_run(run, dict(RUN))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.require_same_run(run, RUN | {"seed": 43, "beta": 0.2, "new": 1})
    text = str(caught.value)
    assert "seed: the checkpoint has 42, this run 43" in text
    assert "beta: the checkpoint has 0.1, this run 0.2" in text
    assert "new: the checkpoint has None, this run 1" in text
    assert "data" not in text
    without_seed = {name: value for name, value in RUN.items() if name != "seed"}
    with pytest.raises(CheckpointError, match="seed: the checkpoint has 42, this run None"):
        checkpoint.require_same_run(run, without_seed)


def steps(output_dir):
    return sorted(int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*"))


def test_rotation_goes_by_step(tmp_path):
    for step in (100, 20, 3, 4):  # made in this order: 4 is the youngest by its time
        sealed(tmp_path, step)
    for age, step in enumerate((100, 20, 3, 4)):
        os.utime(tmp_path / f"checkpoint-{step}", (10**9 + age, 10**9 + age))
    (tmp_path / "runs").mkdir()
    for keep in (None, 0, 4, 9):
        checkpoint.rotate(tmp_path, keep, None)
        assert steps(tmp_path) == [3, 4, 20, 100]
    checkpoint.rotate(tmp_path, 2, tmp_path / "." / "checkpoint-3")
    assert steps(tmp_path) == [3, 20, 100]
    checkpoint.rotate(tmp_path, 1, None)
    assert steps(tmp_path) == [100]
    checkpoint.rotate(tmp_path, 1, None)
    assert steps(tmp_path) == [100], "the newest was deleted"
    assert (tmp_path / "runs").is_dir()
    assert checkpoint.verify(tmp_path / "checkpoint-100") == RUN


def test_rotation_leaves_links_and_what_they_point_to(tmp_path):
    output_dir, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    precious = sealed(elsewhere, 1)
    for step in (5, 6):
        sealed(output_dir, step)
    (output_dir / "checkpoint-2").symlink_to(precious)
    (output_dir / "checkpoint-9").symlink_to(precious)
    checkpoint.rotate(output_dir, 1, None)
    assert steps(output_dir) == [2, 6, 9]
    assert checkpoint.verify(precious) == RUN


def test_commit_replaces(tmp_path):
    final = tmp_path / "checkpoint-5"
    for seed in (1, 2):
        temporary = sealed(tmp_path / ".tmp-x", 5, {"seed": seed})
        checkpoint.commit(temporary, final)
        assert checkpoint.verify(final) == {"seed": seed}
        assert [path.name for path in tmp_path.iterdir() if path.name != ".tmp-x"] == [final.name]


def test_commit_replaces_a_link_and_not_what_it_points_to(tmp_path):
    precious, final = sealed(tmp_path / "elsewhere", 1), tmp_path / "checkpoint-5"
    for target in (precious, tmp_path / "nowhere"):
        final.symlink_to(target)
        checkpoint.commit(sealed(tmp_path / ".tmp-x", 5, {"seed": 1}), final)
        assert checkpoint.verify(final) == {"seed": 1}
        shutil.rmtree(final)
    assert checkpoint.verify(precious) == RUN


def test_a_failing_commit_leaves_the_older_one(tmp_path, monkeypatch):
    final, temporary = sealed(tmp_path, 5), sealed(tmp_path / ".tmp-x", 5, {"seed": 2})
    replace = os.replace

    def fail(source, target):
        if source == temporary:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.commit(temporary, final)
    assert checkpoint.verify(final) == RUN
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-x", "checkpoint-5"]


# Moments


class Model(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.first = nn.Linear(5, width)
        self.second = nn.Linear(width, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adamw(model, reverse=False, betas=(0.9, 0.95)):
    """Two groups, as Trainer makes them; in reverse, groups and parameters run backwards."""
    parameters = dict(model.named_parameters())
    decayed = [p for name, p in parameters.items() if "weight" in name]
    others = [p for name, p in parameters.items() if "bias" in name]
    groups = [
        {"params": decayed, "weight_decay": 0.1, "lr": 1e-2},
        {"params": others, "weight_decay": 0.0, "lr": 3e-2},
    ]
    if reverse:
        groups = [{**group, "params": group["params"][::-1]} for group in groups[::-1]]
    return torch.optim.AdamW(groups, betas=betas)


def train(model, optimizer, updates, seed):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        optimizer.zero_grad()
        model(torch.randn(4, 5, generator=draw)).square().sum().backward()
        optimizer.step()


def trained(**options):
    torch.manual_seed(0)
    model = Model()
    optimizer = adamw(model, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(model, optimizer, 3, seed=1)
    schedule.step()
    return model, optimizer, schedule


def moments(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]} {key}": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def assert_bitwise(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), f"{name} differs"


@pytest.mark.parametrize("reverse", [False, True])
def test_optimizer_state_by_name(tmp_path, reverse):
    model, optimizer, schedule = trained()
    checkpoint.save_optimizer(tmp_path, optimizer, schedule.state_dict(), model)
    resumed = Model()
    resumed.load_state_dict(model.state_dict())
    other = adamw(resumed, reverse=reverse, betas=(0.5, 0.5))
    other_schedule = torch.optim.lr_scheduler.LambdaLR(other, lambda step: 1 / (1 + step))
    other_schedule.load_state_dict(checkpoint.load_optimizer(tmp_path, other, resumed))

    saved = moments(model, optimizer)
    assert len(saved) == 4 * 3
    assert len({str(value.tolist()) for value in saved.values()}) > 8, "moments are all alike"
    assert_bitwise(moments(resumed, other), saved)
    by_decay = {group["weight_decay"]: group for group in other.param_groups}
    for group in optimizer.param_groups:
        twin = by_decay[group["weight_decay"]]
        assert twin["lr"] == group["lr"]
        assert tuple(twin["betas"]) == (0.9, 0.95)
        assert {p.shape for p in twin["params"]} == {p.shape for p in group["params"]}
    assert other_schedule.last_epoch == schedule.last_epoch == 1

    train(model, optimizer, 2, seed=2)
    train(resumed, other, 2, seed=2)
    assert_bitwise(dict(resumed.named_parameters()), dict(model.named_parameters()))


def test_optimizer_before_its_first_update(tmp_path):
    model = Model()
    checkpoint.save_optimizer(tmp_path, adamw(model), {}, model)
    optimizer = adamw(model)
    assert checkpoint.load_optimizer(tmp_path, optimizer, model) == {}
    assert not optimizer.state


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW"])
def test_bitsandbytes_moments(tmp_path, kind):
    """Its state_dict() nests the moments, and all parameters share one code book."""
    model = Model()
    optimizer = getattr(bnb.optim, kind)(model.parameters(), lr=1e-2)
    book = torch.linspace(-1, 1, 256)
    for seed, parameter in enumerate(model.parameters()):
        draw = torch.Generator().manual_seed(seed)
        size = tuple(parameter.shape)
        optimizer.state[parameter] = {"step": 3 + seed, "qmap1": book, "absmax1": torch.rand(1)}
        optimizer.state[parameter]["state1"] = (
            torch.randint(0, 256, size, dtype=torch.uint8, generator=draw)
            if kind == "AdamW8bit"
            else torch.randn(size, generator=draw)
        )
    checkpoint.save_optimizer(tmp_path, optimizer, {}, model)
    other = getattr(bnb.optim, kind)(model.parameters(), lr=1e-2)
    checkpoint.load_optimizer(tmp_path, other, model)
    for parameter in model.parameters():
        saved, found = optimizer.state[parameter], other.state[parameter]
        assert saved["step"] == found["step"]
        assert_bitwise(
            {k: v for k, v in found.items() if k != "step"},
            {k: v for k, v in saved.items() if k != "step"},
        )


def test_other_parameters_are_refused(tmp_path):
    model, optimizer, schedule = trained()
    checkpoint.save_optimizer(tmp_path, optimizer, schedule.state_dict(), model)
    wider = Model(width=7)
    with pytest.raises(CheckpointError, match=r"first\.weight: \[6, 5\] there, \[7, 5\] here"):
        checkpoint.load_optimizer(tmp_path, adamw(wider), wider)
    fewer = torch.optim.AdamW(model.first.parameters())
    with pytest.raises(CheckpointError, match=r"second\.bias: \[3\] there, none here"):
        checkpoint.load_optimizer(tmp_path, fewer, model)
    one_group = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match="no group of exactly the 4 parameters"):
        checkpoint.load_optimizer(tmp_path, one_group, model)
    assert not one_group.state


def test_a_full_disk_is_an_os_error(tmp_path):
    model, optimizer, _ = trained()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(OSError, match=r"optimizer\.safetensors"):
            checkpoint.save_optimizer(tmp_path, optimizer, {}, model)
        with pytest.raises(OSError, match=r"rng_state\.safetensors"):
            checkpoint.save_rng_state(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Random numbers


def draws():
    return (
        [random.random() for _ in range(700)],  # past the end of the twister's 624 numbers
        random.gauss(0, 1),
        np.random.standard_normal(701).tolist(),
        np.random.randint(0, 2**31, 700).tolist(),
        torch.rand(700).tolist(),
        torch.randn(3).tolist(),
    )


def test_rng_states_go_on_where_they_were(tmp_path):
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        random.gauss(0, 1)  # each generator keeps the second of two
        np.random.standard_normal(1)
        torch.randn(1)
        checkpoint.save_rng_state(tmp_path)
        wanted = draws()
        assert draws() != wanted
        checkpoint.load_rng_state(tmp_path)
        assert draws() == wanted


def test_no_pickle(tmp_path):
    model, optimizer, schedule = trained()
    checkpoint.save_optimizer(tmp_path, optimizer, schedule.state_dict(), model)
    checkpoint.save_rng_state(tmp_path)
    checkpoint.seal(tmp_path, RUN)
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(paths) == 5
    for path in paths:
        assert path.suffix in (".json", ".safetensors"), path
        content = path.read_bytes()
        assert not content.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"))
        with pytest.raises((ValueError, UnicodeDecodeError, IndexError)):
            list(pickletools.genops(content))
        if path.suffix == ".json":
            json.loads(content)
        else:
            header = int.from_bytes(content[:8], "little")
            json.loads(content[8 : 8 + header])
