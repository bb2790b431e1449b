"""What no fault may do to a run: kills, full and failing disks, damage; it can always be resumed.

One trainer is trained a few updates and then saves again and again, each time with another fault;
the long form resumes really, after every one of them.
"""

import os
import random
import shutil
import signal
import time
from contextlib import suppress
from functools import partial

import pytest
from safetensors import safe_open
from transformers import TrainerCallback

from fastdpo.system import files, results
from fastdpo.trainer import checkpoint
from fastdpo.trainer.checkpoint import CheckpointError
from tests.failing_files import FAILING, FULL, Killed, failing
from tests.ref_cache.test_faults import exit_code, in_a_child
from tests.trainer.small_runs import ADAPTER, Fault, adapter_of, build, checkpoint_names, whole  # noqa: F401


@pytest.fixture(scope="module")
def second_save(tmp_path_factory):
    """A run that stands at update 4, checkpoint-2 saved, and its folder as it was then."""
    output_dir = tmp_path_factory.mktemp("run") / "out"
    kept = output_dir.with_name("kept")
    standing = []

    def hold():
        shutil.copytree(output_dir, kept)
        standing.append(True)
        raise Killed

    trainer = build(output_dir, [Fault(4, hold)], save_total_limit=1)
    with pytest.raises(Killed):
        trainer.train()
    assert standing

    def save():
        """Save checkpoint-4 into a folder that holds checkpoint-2 alone."""
        shutil.rmtree(output_dir)
        shutil.copytree(kept, output_dir)
        trainer._saving_into = None
        trainer._write_checkpoint(trainer.model, None)

    return trainer, output_dir, save


def operations_of(save):
    with failing(None) as disk:
        save()
    return disk.log


def test_a_save_is_made_of_operations_that_can_fail(second_save):
    _, output_dir, save = second_save
    log = operations_of(save)
    names = {entry.split()[0] for entry in log}
    assert names == {*files.OPERATIONS, "save_to_json"} - {"append_text", "rmdir"}
    assert len(log) > 30
    manifest = next(i for i, entry in enumerate(log) if entry == "replace " + log[i].split()[1]
                    and "MANIFEST" in entry)  # fmt: skip
    assert manifest > log.index("save_to_json trainer_state.json")
    assert "replace checkpoint-4" in log[manifest:], "the name comes after the manifest"
    deleted = max(i for i, entry in enumerate(log) if "checkpoint-2" in entry)
    assert deleted > log.index("replace checkpoint-4"), "rotated before the new one was whole"
    assert checkpoint_names(output_dir) == ["checkpoint-4"]


@pytest.mark.parametrize("halfway", [False, True])
def test_killed_at_every_operation_of_a_save(second_save, whole, halfway, soak):  # noqa: F811
    _, output_dir, save = second_save
    log, found = operations_of(save), []
    writes = ("_write_bytes", "call_writer", "save_to_json")
    places = [at for at, entry in enumerate(log) if not halfway or entry.startswith(writes)]
    for at in places:
        with failing(at, halfway=halfway), pytest.raises(Killed):
            save()
        newest = checkpoint.newest_verified(output_dir)
        assert newest.name in ("checkpoint-2", "checkpoint-4")
        found.append(newest.name)
        if soak or at % 19 == 0:
            goes_on(output_dir, whole)
    assert found == sorted(found), "a later death leaves an older checkpoint"
    assert halfway or len(set(found)) == 2
    print(
        f"{len(places)} operations, {found.count('checkpoint-2')} deaths fall back to checkpoint-2"
    )


def goes_on(output_dir, whole):  # noqa: F811
    """A new process would resume from what is there, to the bits of the undisturbed run."""
    trainer = build(output_dir)
    trainer.train(resume_from_checkpoint=True)
    assert adapter_of(output_dir / "checkpoint-6") == adapter_of(whole / "checkpoint-6")
    assert not [path for path in output_dir.iterdir() if files.is_temporary(path)], "not swept"


def raises_os_error(call):
    try:
        call()
    except OSError as error:
        return error
    return None


@pytest.mark.parametrize("code", [FULL, FAILING])
def test_every_operation_of_a_save_may_fail(second_save, whole, code, soak):  # noqa: F811
    _, output_dir, save = second_save
    total = len(operations_of(save))
    for at in range(total) if soak else range(code == FULL, total, 2):
        with failing(at, code) as disk:
            raised = raises_os_error(save)
        if raised is None:  # only what cleans up may fail unnoticed: the next run sweeps
            assert disk.log[at].startswith("remove .tmp-"), disk.log[at]
        else:
            assert raised.errno == code
        named = checkpoint.newest_verified(output_dir)
        assert named.name in ("checkpoint-2", "checkpoint-4")
        if soak or at in (20, 41):
            goes_on(output_dir, whole)


def test_training_goes_on_after_a_save_that_failed(tmp_path, whole, caplog):  # noqa: F811
    trainer = build(tmp_path / "out")
    real, failures = trainer._write_checkpoint, []

    def once(model, trial):
        if not failures:
            failures.append(trainer.state.global_step)
            with failing(12, FULL):
                return real(model, trial)
        return real(model, trial)

    trainer._write_checkpoint = once
    trainer.train()
    assert failures == [2]
    assert checkpoint_names(tmp_path / "out") == ["checkpoint-4", "checkpoint-6"]
    assert adapter_of(tmp_path / "out/checkpoint-6") == adapter_of(whole / "checkpoint-6")
    (said,) = [r.getMessage() for r in caplog.records if "could not be written" in r.getMessage()]
    for part in ("update 2", "No space left", "takes about 32 MiB", "free: "):
        assert part in said


def test_the_last_save_must_not_fail(tmp_path):
    trainer = build(tmp_path / "out", save_steps=6)
    real = trainer._write_checkpoint

    def full(model, trial):
        with failing(12, FULL):
            return real(model, trial)

    trainer._write_checkpoint = full
    with pytest.raises(OSError, match="No space left"):
        trainer.train()


def test_the_result_is_replaced_as_a_whole_or_not(tmp_path, second_save, soak):
    """The weights are the old ones or the new; new ones never have an old config beside them."""
    trainer, _, _ = second_save
    folder = tmp_path / "result"
    trainer._saving_into = None
    with failing(None) as disk:
        trainer._save(str(folder))
    for at in range(0, len(disk.log), 1 if soak else 3):
        for old in (True, False):
            shutil.rmtree(folder)
            folder.mkdir()
            if old:
                (folder / ADAPTER).write_bytes(b"the former result")
                (folder / "adapter_config.json").write_bytes(b"the former config")
            with failing(at), suppress(Killed):
                trainer._save(str(folder))
            if not (folder / ADAPTER).exists():
                assert not old
                continue
            is_former = adapter_of(folder) == b"the former result"
            assert is_former or is_whole(folder / ADAPTER)
            config = folder / "adapter_config.json"
            if config.exists():
                assert (config.read_bytes() == b"the former config") == is_former
            results.finish(folder, tmp_path / "locks")
            assert is_former or config.exists()
    assert len(disk.log) > 10


def is_whole(path):
    with safe_open(path, framework="pt") as tensors:
        return len(list(tensors.keys())) == 14


def test_damage_to_any_file_falls_back(whole, tmp_path, caplog, soak):  # noqa: F811
    """Cut at four places and one bit flipped in each KiB: seen, named, passed over."""
    output_dir = tmp_path / "out"
    for step in (4, 5):
        shutil.copytree(whole / f"checkpoint-{step}", output_dir / f"checkpoint-{step}")
    newest = output_dir / "checkpoint-5"
    draw, cases = random.Random(3), 0
    names = sorted(path for path in newest.rglob("*") if path.is_file())
    assert len(names) >= 8
    for path in names:
        content = path.read_bytes()
        damaged = [content[:cut] for cut in {0, 1, len(content) // 2, len(content) - 1}]
        for place in range(0, len(content), 1024 if soak else 16_384):
            flipped = bytearray(content)
            at = min(place + draw.randrange(1024), len(content) - 1)
            flipped[at] ^= 1 << draw.randrange(8)
            damaged.append(bytes(flipped))
        for other in damaged:
            path.write_bytes(other)
            caplog.clear()
            found = checkpoint.newest_verified(output_dir)
            cases += 1
            if path.name == checkpoint.MANIFEST and found == newest:
                continue  # a blank turned into another, or a name nobody compares
            assert found == output_dir / "checkpoint-4", path
            assert path.name in caplog.text
        path.write_bytes(content)
    assert checkpoint.newest_verified(output_dir) == newest
    print(f"{cases} damages of {len(names)} files")


def test_flips_in_a_manifest_never_change_what_is_resumed(whole, tmp_path, soak):  # noqa: F811
    """Every bit: refused, or what it says of the run and the files is as it was."""
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(whole / "checkpoint-5", folder)
    manifest = folder / checkpoint.MANIFEST
    content = manifest.read_bytes()
    sealed = checkpoint.verify(folder)
    for bit in range(0, 8 * len(content), 1 if soak else 41):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(flipped)
        try:
            found = checkpoint.verify(folder)
        except CheckpointError:
            continue
        assert found == sealed, f"bit {bit}"


# Real kills


def test_real_kills_during_training(tmp_path, whole, soak):  # noqa: F811
    """SIGKILL at random moments, a save at every update: what is lost is at most one interval."""
    wanted = int(os.environ.get("FASTDPO_KILLS", "100" if soak else "3"))
    draw, kills, runs, lost = random.Random(5), 0, 0, 0
    while kills < wanted:
        runs += 1
        output_dir = tmp_path / str(runs)
        reached = tmp_path / f"{runs}.log"
        done = False
        while not done:
            resume = bool(checkpoint_names(output_dir))
            begun = checkpoint.newest_verified(output_dir) if resume else None
            before = int(begun.name.split("-")[1]) if begun else 0
            reached.write_text("")
            child = in_a_child(partial(work, output_dir, reached, resume))
            if kills < wanted:
                finishes(child, reached, draw.randrange(4))
                time.sleep(draw.uniform(0.0, 0.3))
                os.kill(child, signal.SIGKILL)
            done = exit_code(child) == 0
            if not done:
                kills += 1
            updates = [before, *map(int, reached.read_text().split())]
            kept = 0
            if checkpoint_names(output_dir):
                kept = int(checkpoint.newest_verified(output_dir).name.split("-")[1])
            assert kept >= before, "a checkpoint that verified is gone"
            assert kept >= updates[-1] - 1, "more than one interval was lost"
            lost += updates[-1] - kept
        assert adapter_of(output_dir / "checkpoint-6") == adapter_of(whole / "checkpoint-6")
    print(f"{kills} kills over {runs} runs, {lost} updates computed again")


def finishes(child, reached, updates):
    """Wait until the child has done so many updates, or is gone."""
    while len(reached.read_text().split()) < updates:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.002)


def work(output_dir, reached, resume):
    """Train in a child, noting each finished update before it is saved."""

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            with reached.open("a") as out:
                out.write(f"{state.global_step}\n")

    trainer = build(output_dir, [Note()], save_steps=1, save_total_limit=2)
    trainer.train(resume_from_checkpoint=resume)
