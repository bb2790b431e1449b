"""Every change to the disk: temporary name, fsync, checksum, rename. A reader sees all or nothing.

No other room opens a file to write, renames or deletes one, so a test can let the N-th operation
fail.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

OPERATIONS = (
    "append_text",
    "mkdir",
    "_write_bytes",
    "call_writer",
    "fsync",
    "sha256_of",
    "replace",
    "remove",
    "rmdir",
)
"""The functions of this module that change the disk; all others are made of them."""

TEMPORARY_MARK = ".tmp-"
_TEMPORARY = re.compile(re.escape(TEMPORARY_MARK) + r"[0-9a-f]{32}-.+", re.DOTALL)


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
    mkdir(path.parent)
    temporary = temporary_name(path)
    try:
        write(temporary)
        fsync(temporary)
        digest = sha256_of(temporary)
        replace(temporary, path)
        fsync(path.parent)
    except BaseException as error:
        remove_if_possible(temporary)
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


def append_text(path: Path, text: str) -> None:
    """Add to the end of a file in one write; a killed process leaves all of it or its beginning.

    Raises:
        OSError: the disk is full or failing, with the path.
    """
    mkdir(path.parent)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_pieces(path: Path, pieces: Iterable[Any]) -> None:
    """Write bytes and arrays of bytes one after another into a new file, none of them copied."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.writelines(pieces)

    call_writer(path, write)


def call_writer(path: Path, write: Callable[[Path], object]) -> None:
    """Let a library write a file or a folder itself.

    Args:
        path: what it writes.
        write: the library's function, called with `path`.

    Raises:
        OSError: it cannot be written, with the path: safetensors and tokenizers have errors of
            their own for that.
    """
    try:
        write(path)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        if isinstance(error, SafetensorError) or type(error) is Exception:  # tokenizers
            code = re.search(r"os error (\d+)", str(error))
            number = int(code[1]) if code else errno.EIO
            raise OSError(number, f"{os.strerror(number)} ({error})", str(path)) from error
        raise


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process has: `.tmp-<uuid>-<name>`."""
    return path.with_name(f"{TEMPORARY_MARK}{uuid.uuid4().hex}-{path.name}")


def is_temporary(path: Path) -> bool:
    """Tell whether `temporary_name` could have made the name."""
    return _TEMPORARY.fullmatch(path.name) is not None


def mkdir(path: Path) -> list[Path]:
    """Make a folder and those above it, where they are missing.

    Returns:
        The folders that this call made and no other process did, the innermost first.
    """
    made = []
    for each in reversed((path, *path.parents)):
        try:
            each.mkdir()
        except FileExistsError:
            continue
        except OSError:
            if not each.is_dir():  # the root of a read-only disk exists and cannot be made
                raise
            continue
        made.append(each)
    path.mkdir(parents=True, exist_ok=True)
    return made[::-1]


def replace(source: Path, target: Path) -> None:
    """Give `source` the name `target` in one step; a file of that name is gone then."""
    os.replace(source, target)


def touch(path: Path) -> None:
    """Set the times of an existing file to now."""
    os.utime(path)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it; a link goes, its target stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def rmdir(path: Path) -> None:
    """Delete a folder if it is empty; one that is not, or that is gone, stays as it is."""
    with suppress(OSError):
        path.rmdir()


def remove_if_possible(path: Path) -> None:
    """Delete as `remove` does, ignoring errors: for the way out of an error, which stays seen."""
    with suppress(OSError):
        remove(path)


def fsync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power loss."""
    on_windows = os.name == "nt"
    if on_windows and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(folder: Path) -> int:
    """The bytes that an unprivileged process may still write to the disk of an existing folder."""
    return shutil.disk_usage(folder).free


def probe(path: Path) -> None:
    """Find out whether a file can be written under this name, and leave nothing behind.

    Folders above it that are missing are not made: the nearest one that exists is tried.

    Raises:
        OSError: it cannot, with the path.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    folder = next(each for each in path.absolute().parents if os.path.lexists(each))
    trial = temporary_name(folder / path.name)
    try:
        _write_bytes(trial, b"x")
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        remove_if_possible(trial)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder in the system's place for such things, removed at the end with all in it."""
    folder = Path(tempfile.mkdtemp(prefix="fastdpo-"))
    try:
        yield folder
    finally:
        remove_if_possible(folder)


def exclusive_lock(folder: Path, lock_folder: Path) -> AbstractContextManager[bool]:
    """Hold an existing folder against other processes; a killed holder holds it no more.

    Args:
        folder: what is held. On POSIX the folder itself is locked and nothing is written.
        lock_folder: where systems without such locks (Windows) keep a lock file for it.

    Returns:
        A context that yields whether the file system has such locks; without them nobody is kept
        out.

    Raises:
        BlockingIOError: on entering, where another process holds the folder.
    """
    try:
        import fcntl
    except ImportError:
        return _lock_file(folder, lock_folder)
    return _lock_folder(folder, fcntl)


@contextmanager
def _lock_folder(folder: Path, fcntl: Any) -> Iterator[bool]:
    """Lock the folder itself, which leaves nothing behind."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            raise
        except OSError:
            held = False
        if not (folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())):
            raise BlockingIOError(errno.EAGAIN, "its last holder has just removed it", str(folder))
        yield held
    finally:
        os.close(descriptor)


@contextmanager
def _lock_file(folder: Path, lock_folder: Path) -> Iterator[bool]:
    """Lock a file that is named by a hash of the folder's path."""
    import filelock

    is_soft = issubclass(filelock.FileLock, filelock.SoftFileLock)
    if is_soft:  # it would outlive a killed holder
        yield False
        return
    mkdir(lock_folder)
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    lock = filelock.FileLock(lock_folder / f"{name}.lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise BlockingIOError(errno.EAGAIN, "another process holds it", str(folder)) from None
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
