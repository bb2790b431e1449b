"""Checks before hours of work: whether the output folder can take the checkpoints."""

import uuid
from pathlib import Path

from fastdpo.system import files
from fastdpo.trainer.checkpoint.errors import CheckpointError
from fastdpo.trainer.checkpoint.folders import checkpoints_in

PROBE_BYTES = 2**20


def require_writable(output_dir: Path) -> None:
    """Make the folder, and write and delete a file in it.

    Raises:
        CheckpointError: that fails; says what to do.
    """
    probe = output_dir / f"probe-{uuid.uuid4().hex}"
    try:
        files.write_bytes(probe, bytes(PROBE_BYTES))
        files.remove(probe)
    except OSError as error:
        raise CheckpointError(
            f"--output_dir {output_dir} cannot be written to ({error}): nothing that is trained "
            "could be kept. Give another folder, or make room and set its permissions."
        ) from error


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
