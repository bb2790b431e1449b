"""One store as a single file, to carry between machines: a tar of its manifest, notes and shards.

The member `contents.json` lists the others with sizes and sha256. An imported file is trusted no
more than a store: kinds, names and sizes of all members are checked before one is unpacked, then
their hashes, then every shard as any reader would.
"""

import errno
import io
import json
import os
import re
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastdpo.ref_cache import shards
from fastdpo.ref_cache.run_notes import MAX_NOTE_BYTES
from fastdpo.ref_cache.store import MANIFEST, store_key
from fastdpo.system import files

CONTENTS = "contents.json"
ARCHIVE_FORMAT = 1
MEMBERS = (
    (re.compile(r"contents\.json"), 2**26),  # 400,000 shards
    (re.compile(r"manifest\.json"), 2**24),
    (re.compile(r"asked-[0-9a-f]{1,64}\.json"), MAX_NOTE_BYTES),
    (re.compile(r"shard-[0-9a-zA-Z]{1,64}\.safetensors"), shards.MAX_SHARD_BYTES),
)
"""The names that an archive may hold, each with the most bytes of such a file."""

_SAFE: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


class ArchiveError(ValueError):
    """A file that is no archive of a store, or a damaged one."""


def export_store(folder: Path, archive: Path) -> int:
    """Write the store in `folder` to one file, atomically; damaged shards are left out.

    Returns:
        The number of shards in it.

    Raises:
        ValueError: there is no store.
        OSError: the disk is full or failing; no archive is there then.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} holds no reference store: it has no {MANIFEST}.")
    named = [path for path in sorted(folder.iterdir()) if _limit(path.name)]
    paths = [path for path in named if path.name != CONTENTS and _is_whole(path)]
    listed = {
        path.name: {"bytes": path.stat().st_size, "sha256": files.sha256_of(path)} for path in paths
    }
    contents = {"format": ARCHIVE_FORMAT, "store": folder.name, "files": listed}
    text = json.dumps(contents).encode()

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT, dereference=True) as tar:
            first = tarfile.TarInfo(CONTENTS)
            first.size = len(text)
            tar.addfile(first, io.BytesIO(text))
            for path in paths:
                tar.add(path, path.name, filter=_anonymous)

    files.write_atomically(archive, lambda temporary: files.call_writer(temporary, write))
    return sum(path.suffix == ".safetensors" for path in paths)


def import_store(archive: Path, root: Path) -> tuple[Path, int]:
    """Add an exported store to the folder of all stores; files that are there already stay.

    Everything is checked before anything gets its name.

    Returns:
        The store's folder, and how many shards are new in it.

    Raises:
        ArchiveError: the file is damaged, or no archive of a store.
        OSError: it cannot be read, or the disk is full or failing.
    """
    with _unpacking_folder(root) as unpacked:
        try:
            with tarfile.open(archive, "r:") as tar:
                members = _checked_members(tar)
                _check_room(sum(member.size for member in members), unpacked)
                files.call_writer(unpacked, lambda path: tar.extractall(path, members, **_SAFE))
            key = _verify(unpacked)
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            raise ArchiveError(
                f"{archive} is no archive of a store, or a damaged one ({error}): pass a file that "
                "`python -m fastdpo.reference export` has written."
            ) from error
        folder, new = root / key, 0
        for path in sorted(unpacked.iterdir()):
            target = folder / path.name
            if path.name != CONTENTS and not target.exists():
                files.write_atomically(target, partial(files.replace, path))
                new += path.suffix == ".safetensors"
    return folder, new


def _checked_members(tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """The members of an archive, once each is an ordinary file of a known name and size."""
    members = tar.getmembers()
    seen: set[str] = set()
    for member in members:
        limit = _limit(member.name)
        if limit is None or member.name in seen or not member.isreg() or member.issparse():
            raise ValueError(f"it holds {member.name!r}, which belongs into none")
        if member.size > limit:
            raise ValueError(f"{member.name} has {member.size} bytes, more than {limit}")
        seen.add(member.name)
        member.mtime, member.mode = time.time(), 0o644
        member.uid, member.gid, member.uname, member.gname = 0, 0, "", ""
    return members


def _check_room(size: int, folder: Path) -> None:
    """Refuse to unpack what the disk has no room for.

    Raises:
        OSError: with the folder.
    """
    if size > (free := files.free_bytes(folder)):
        reason = f"{size:,} bytes are needed and {free:,} are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({reason})", str(folder.parent))


def _verify(unpacked: Path) -> str:
    """The key of an unpacked store, once its files are those of its list.

    Raises:
        ValueError: the list or a file is missing, or damaged.
    """
    contents = _read_object(unpacked / CONTENTS)
    listed = contents.get("files")
    if contents.get("format") != ARCHIVE_FORMAT or not isinstance(listed, dict):
        raise ValueError(f"its list is not that of a store in format {ARCHIVE_FORMAT}")
    paths = [path for path in unpacked.iterdir() if path.name != CONTENTS]
    if {path.name for path in paths} != set(listed):
        raise ValueError("its list is not that of its files")
    for path in paths:
        entry = {"bytes": path.stat().st_size, "sha256": files.sha256_of(path)}
        if listed[path.name] != entry or not _is_whole(path):
            raise ValueError(f"{path.name} is not as its list says, or no shard")
    key = store_key(_read_object(unpacked / MANIFEST))
    if contents.get("store") != key:
        raise ValueError(f"its list is of store {contents.get('store')!r}, its manifest of {key}")
    return key


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file is missing, or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is a {type(content).__name__} in place of an object")
    return content


def _limit(name: str) -> int | None:
    """The most bytes that a member of this name may have; None if there is no such member."""
    return next((limit for pattern, limit in MEMBERS if pattern.fullmatch(name)), None)


def _is_whole(path: Path) -> bool:
    """Return False for a damaged shard, True for a whole one and for any other file."""
    if path.suffix != ".safetensors":
        return True
    try:
        shards.read(path)
    except (shards.ShardError, FileNotFoundError):
        return False
    return True


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """A member without owner and times: equal stores give equal archives."""
    plain = tarfile.TarInfo(member.name)
    plain.size = member.size
    return plain


@contextmanager
def _unpacking_folder(root: Path) -> Iterator[Path]:
    """A new folder beside the stores, removed afterwards."""
    folder = files.temporary_name(root / "import")
    files.mkdir(folder)
    try:
        yield folder
    finally:
        files.remove_if_possible(folder)
