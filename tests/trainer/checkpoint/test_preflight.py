"""Before any work: can the output folder take what the run will write, and is it free?"""

import errno
import os
import signal

import pytest

from fastdpo.system import files
from fastdpo.trainer.checkpoint import CheckpointError
from tests.failing_files import FULL, failing
from tests.ref_cache.test_faults import exit_code, in_a_child
from tests.trainer.small_runs import build, whole  # noqa: F401


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    trainer = build(tmp_path / "out")
    trainer.on_before_train = lambda: pytest.fail("work was begun")
    for code in (errno.EACCES, errno.EROFS, errno.EDQUOT, FULL):
        for at in range(6):
            with failing(at, code), pytest.raises(CheckpointError, match="cannot be written to"):
                trainer.train()
    (tmp_path / "file").write_text("x")
    trainer.args.output_dir = str(tmp_path / "file" / "out")
    with pytest.raises(CheckpointError, match=r"--output_dir .*file/out cannot be written to"):
        trainer.train()


def test_too_little_room_is_refused_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda _: 20 * 2**20)
    trainer = build(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"takes about 32 MiB and .* has 20 MiB free"):
        trainer.train()
    build(tmp_path / "none", save_strategy="no", max_steps=1).train()


def test_the_estimate_is_above_what_a_checkpoint_takes(whole):  # noqa: F811
    trainer = build(whole)
    taken = sum(p.stat().st_size for p in (whole / "checkpoint-6").rglob("*"))
    assert taken < trainer._checkpoint_bytes() < taken + 2 * 2**25


def test_a_second_run_into_the_same_folder_is_refused(tmp_path, whole):  # noqa: F811
    trainer = build(tmp_path / "out")
    with (
        files.exclusive_lock(tmp_path / "out", tmp_path / "locks"),
        pytest.raises(CheckpointError, match="another process is training into"),
    ):
        trainer.train()
    with pytest.raises(CheckpointError, match=r"6 checkpoints of an earlier run.*checkpoint-6"):
        build(whole).train()
    killed = in_a_child(lambda: hold_and_die(tmp_path / "out"))
    assert exit_code(killed) == -signal.SIGKILL
    trainer.train()


def hold_and_die(folder):
    with files.exclusive_lock(folder, folder.parent / "locks"):
        os.kill(os.getpid(), signal.SIGKILL)
