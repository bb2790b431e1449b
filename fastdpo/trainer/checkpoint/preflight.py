"""Checks before hours of work: whether the output folder can take the checkpoints."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdpo.system import files
from fastdpo.trainer.checkpoint.errors import CheckpointError
from fastdpo.trainer.checkpoint.folders import checkpoints_in, locked

PROBE_BYTES = 2**20


@contextmanager
def claimed(output_dir: Path) -> Iterator[None]:
    """Make a folder that a run may write into, hold it as `locked` does, and write a file in it.

    Afterwards what was made here is removed again where nothing was written into it.

    Raises:
        CheckpointError: it cannot be written to, or another process holds it; says what to do.
    """
    try:
        made = files.mkdir(output_dir)
    except OSError as error:
        raise _unwritable(output_dir, error) from error
    with locked(output_dir):
        try:
            _write_and_remove(output_dir / f"probe-{uuid.uuid4().hex}")
            yield
        finally:
            for folder in made:
                files.rmdir(folder)


def _write_and_remove(probe: Path) -> None:
    try:
        files.write_bytes(probe, bytes(PROBE_BYTES))
        files.remove(probe)
    except OSError as error:
        files.remove_if_possible(probe)
        raise _unwritable(probe.parent, error) from error


def _unwritable(output_dir: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"--output_dir {output_dir} cannot be written to ({error}): nothing that is trained "
        "could be kept. Give another folder, or make room and set its permissions."
    )


def require_other_folder(output_dir: Path, model: str | None) -> None:
    """Refuse to write a result into the folder of the model that training starts from.

    Args:
        output_dir: a folder, or what does not exist yet.
        model: the folder or hub id that the model was loaded from; None or "" for none.

    Raises:
        CheckpointError: it is that folder.
    """
    start = Path(model or "")
    if not model or not (start / "config.json").is_file() or not output_dir.is_dir():
        return
    if output_dir.samefile(start):
        raise CheckpointError(
            f"--output_dir {output_dir} is the folder of the model that training starts from, "
            "which the result would overwrite: give another one."
        )


def require_room(output_dir: Path, needed_bytes: int) -> None:
    """Refuse a disk that has no room for one more checkpoint.

    Args:
        output_dir: an existing folder.
        needed_bytes: what a checkpoint takes, about.

    Raises:
        CheckpointError: there is less free; says both and what to do.
    """
    free = files.free_bytes(output_dir)
    if free < needed_bytes:
        raise CheckpointError(
            f"a checkpoint takes about {needed_bytes / 2**20:,.0f} MiB and {output_dir} has "
            f"{free / 2**20:,.0f} MiB free: make room, give another --output_dir, or pass "
            "--save_only_model true (no resuming) or --save_strategy no."
        )


def require_unused(output_dir: Path) -> None:
    """Refuse a new run where checkpoints lie: a later resume could take one of the old run.

    Raises:
        CheckpointError: names the newest and what to do.
    """
    oldest_first = sorted(checkpoints_in(output_dir), key=lambda path: path.stat().st_mtime)
    if oldest_first:
        raise CheckpointError(
            f"{output_dir} holds {len(oldest_first)} checkpoints of an earlier run, the last "
            f"written {oldest_first[-1].name}: resume from it with --resume_from_checkpoint true, "
            "give another --output_dir, or delete them."
        )
