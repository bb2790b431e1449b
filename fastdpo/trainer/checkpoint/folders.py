"""Checkpoint folders: completed by a manifest, published, verified, found again, and rotated."""

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fastdpo.options import cache_folder
from fastdpo.system import files, results
from fastdpo.trainer.checkpoint.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
FORMAT = 2
"""Raised by a change after which what an earlier fastdpo wrote would be read wrongly. A setting or
a file more is none: who does not know it does not read it."""

READABLE_FORMATS = (1, 2)
"""In format 1 what JSON does not have was lost from the state of optimizers and schedulers."""

CHECKSUM = "sha256"
"""The manifest's key of its own checksum; the first manifests have none."""

MAX_MANIFEST_BYTES = 2**24  # ours have about 3 KiB


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of a whole checkpoint, without its list of files.

    Attributes:
        run: settings that a resumed run must share with the one that was stopped.
        plan: how the stopped run laid out its work; a resumed run follows it.
    """

    run: dict[str, Any]
    plan: dict[str, Any]


def write_manifest(
    folder: Path, run: Mapping[str, Any], plan: Mapping[str, Any] | None = None
) -> None:
    """Make every file of a finished checkpoint durable and write its manifest as the last one.

    Args:
        folder: a checkpoint under its temporary name.
        run: as in `Manifest`.
        plan: as in `Manifest`.

    Raises:
        OSError: the disk is full or failing.
    """
    contents = {}
    for path in sorted(folder.rglob("*")):
        if path == folder / MANIFEST:
            continue
        files.fsync(path)
        if path.is_file():
            contents[path.relative_to(folder).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": files.sha256_of(path),
            }
    manifest = {"format": FORMAT, "run": {**run}, "plan": {**(plan or {})}, "files": contents}
    files.write_json(folder / MANIFEST, {**manifest, CHECKSUM: _checksum(manifest)})


def verify(folder: Path) -> Manifest:
    """The manifest of a checkpoint, once all files have the sizes and sha256 that it lists.

    Raises:
        CheckpointError: names the first file that is missing or differs.
    """
    manifest, contents = _read_manifest(folder)
    for name, (size, sha256) in contents.items():
        path = folder / name
        try:
            if not path.is_file() or path.stat().st_size != size:
                raise CheckpointError(f"{path} is missing or not {size} bytes long")
            if files.sha256_of(path) != sha256:
                raise CheckpointError(f"{path} is damaged: its sha256 is not the manifest's")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error})") from error
    return manifest


def newest_verified(output_dir: Path) -> Path:
    """The checkpoint of the highest step that verifies; others are logged with the reason.

    Raises:
        CheckpointError: there is none.
    """
    skipped = []
    for folder in sorted(checkpoints_in(output_dir), key=_step_of, reverse=True):
        try:
            verify(folder)
        except CheckpointError as error:
            skipped.append(str(error))
            logger.warning("Skipping a checkpoint: %s", error)
            continue
        return folder
    reasons = "; ".join(skipped) or "there is no checkpoint-* folder"
    raise CheckpointError(
        f"nothing to resume from in {output_dir}: {reasons}. Start without resume_from_checkpoint."
    )


def publish(temporary: Path, final: Path) -> None:
    """Give a finished checkpoint its name; an older folder of that name is deleted afterwards.

    Raises:
        OSError: it cannot be renamed; the older folder then has its name back.
    """
    aside = None
    if os.path.lexists(final):
        aside = files.temporary_name(final)
        files.replace(final, aside)
    try:
        files.replace(temporary, final)
    except BaseException:
        if aside is not None:
            files.replace(aside, final)
        raise
    files.fsync(final.parent)
    if aside is not None:
        files.remove(aside)


def rotate(output_dir: Path, keep: int | None, written: Path, protected: Path | None) -> None:
    """Delete the oldest checkpoints beyond `keep`, by step.

    Never deleted are links, `protected`, and `written`, the checkpoint that was finished a moment
    ago. Ones of higher steps count as older: the run resumed behind them, as they were damaged or
    the user passed them over.

    Raises:
        OSError: one cannot be deleted.
    """
    if keep is None or keep <= 0:
        return
    spared = {path.resolve() for path in (written, protected) if path is not None}
    folders = [folder for folder in checkpoints_in(output_dir) if not folder.is_symlink()]
    newest_first = sorted(folders, key=lambda folder: (folder != written, -_step_of(folder)))
    for folder in newest_first[keep:]:
        if folder.resolve() not in spared:
            doomed = files.temporary_name(folder)
            files.replace(folder, doomed)  # half a checkpoint must not keep its name
            files.remove(doomed)


_held: set[tuple[Path, int, int]] = set()
"""The folders that are held here, each with the process and the thread that hold it."""


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Hold an existing folder as the only run that writes into it; again in the same thread, too.

    First the save of a result that was killed is completed and temporary files of killed runs are
    deleted, unless the file system has no locks to tell that those runs are dead.

    Raises:
        CheckpointError: another process holds it.
    """
    key = (output_dir.resolve(), os.getpid(), threading.get_ident())
    if key in _held:
        yield
        return
    with ExitStack() as stack:
        try:
            lock = files.exclusive_lock(output_dir, cache_folder() / "locks")
            alone = stack.enter_context(lock)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another process is training into {output_dir}: wait for it, or give another "
                "--output_dir."
            ) from error
        _held.add(key)
        stack.callback(_held.discard, key)
        if alone:
            results.finish_held(output_dir)
            remove_stale_tmp(output_dir)
        yield


def remove_stale_tmp(output_dir: Path) -> None:
    """Delete temporary files of killed runs; the caller must hold the folder."""
    for path in sorted(output_dir.iterdir()):
        if files.is_temporary(path):
            logger.info("Deleting %s, which an interrupted run has left", path)
            files.remove(path)


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The folders whose names are those of checkpoints, whole or not."""
    if not output_dir.is_dir():
        return []
    return [path for path in output_dir.iterdir() if _step_of(path) >= 0 and path.is_dir()]


def _read_manifest(folder: Path) -> tuple[Manifest, dict[str, tuple[int, str]]]:
    """The manifest, and size and sha256 of each file by name, after checking all their types.

    Raises:
        CheckpointError: it is missing, damaged, of another format, or names a file elsewhere.
    """
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            content = file.read(MAX_MANIFEST_BYTES + 1)
        if len(content) > MAX_MANIFEST_BYTES:
            raise ValueError(f"it has more than {MAX_MANIFEST_BYTES} bytes")
        read = json.loads(content)
        written_in = read["format"]
        if (
            written_in in READABLE_FORMATS
            and CHECKSUM in read
            and read.pop(CHECKSUM) != _checksum(read)
        ):
            raise ValueError("its checksum is wrong")
        manifest = Manifest(dict(read["run"]), dict(read.get("plan", {})))
        contents = {name: (r["bytes"], r["sha256"]) for name, r in read["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} has no readable {MANIFEST} ({type(error).__name__}: {error})"
        ) from error
    if written_in not in READABLE_FORMATS:
        raise CheckpointError(
            f"{path} has format {written_in!r}, and this fastdpo reads up to {FORMAT}: "
            "resume with the fastdpo that wrote it"
        )
    for name in contents:
        if not _stays_inside(name):
            raise CheckpointError(f"{path} names {name!r}, which is no file inside the checkpoint")
    return manifest, contents


def _checksum(manifest: Mapping[str, Any]) -> str:
    """The sha256, in hex, of a manifest without its checksum."""
    as_read = json.loads(json.dumps(manifest))  # keys that are numbers become strings
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _stays_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts and "\0" not in name


def _step_of(folder: Path) -> int:
    match = re.fullmatch(r"checkpoint-([0-9]{1,18})", folder.name)
    return int(match[1]) if match else -1
