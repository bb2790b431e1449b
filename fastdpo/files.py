"""Every write to disk: temporary name, fsync, checksum, rename. A reader sees all or nothing."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPORARY_MARK = ".tmp-"


def write_atomically(path: Path, write: Callable[[Path], None]) -> str:
    """Let `write` fill a temporary file beside `path`, make it durable, then give it its name.

    Args:
        path: where the finished file lies; its folder is made when missing.
        write: called with the temporary path; whatever it raises passes through and the
            temporary file is removed.

    Returns:
        The sha256 of the bytes, in hex.

    Raises:
        OSError: the disk is full, read-only or failing, with the path; the file of that name is
            then as it was before, or, when only the last sync of the folder failed, new and whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        write(temporary)
        sync(temporary)
        digest = sha256_of(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk names no file
        raise
    return digest


def write_text(path: Path, text: str) -> str:
    """Write `text` as UTF-8, atomically; returns the sha256 in hex."""
    return write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> str:
    """Write `content` atomically; returns the sha256 in hex."""
    return write_atomically(path, lambda temporary: _write_bytes(temporary, content))


def write_json(path: Path, content: Any) -> str:
    """Write `content` as indented JSON, atomically; NaN and infinity are refused."""
    return write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process has: `.tmp-<uuid>-<name>`."""
    return path.with_name(f"{TEMPORARY_MARK}{uuid.uuid4().hex}-{path.name}")


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
