"""One store as a single file, to carry between machines: a tar of its manifest, notes and shards.

The first member lists the others with sizes and sha256. What comes out of a file is believed no
sooner than what lies in a store: names are checked against a pattern, sizes against the list and
hard limits, hashes, then every shard as any reader would; nothing is unpacked by tar itself.
"""

import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fastdpo.ref_cache import shards
from fastdpo.ref_cache.run_notes import MAX_NOTE_BYTES
from fastdpo.ref_cache.store import MANIFEST, store_key
from fastdpo.system import files

CONTENTS = "contents.json"
ARCHIVE_FORMAT = 1
MAX_LIST_BYTES = 2**26  # 400,000 shards
MAX_MANIFEST_BYTES = 2**24
MEMBERS = (
    (re.compile(r"manifest\.json"), MAX_MANIFEST_BYTES),
    (re.compile(r"asked-[0-9a-f]{1,64}\.json"), MAX_NOTE_BYTES),
    (re.compile(r"shard-[0-9a-zA-Z]{1,64}\.safetensors"), shards.MAX_SHARD_BYTES),
)
"""What may lie in an archive, and how large it may be."""


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
    paths = [path for path in sorted(folder.iterdir()) if _limit(path.name) and _is_whole(path)]
    listed = {
        path.name: {"bytes": path.stat().st_size, "sha256": files.sha256_of(path)} for path in paths
    }
    contents = {"format": ARCHIVE_FORMAT, "store": folder.name, "files": listed}
    text = json.dumps(contents).encode()

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            _add(tar, CONTENTS, len(text), io.BytesIO(text))
            for path in paths:
                with path.open("rb") as file:
                    _add(tar, path.name, listed[path.name]["bytes"], file)

    files.write_atomically(archive, lambda temporary: files.call_writer(temporary, write))
    return sum(path.suffix == ".safetensors" for path in paths)


def import_store(archive: Path, root: Path) -> tuple[Path, int]:
    """Bring an exported store into the folder of all stores; what is there already stays.

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
                key = _unpack(tar, unpacked, str(archive))
        except tarfile.TarError as error:
            raise ArchiveError(
                f"{archive} is no archive of a store ({error}): pass a file that `python -m "
                "fastdpo.reference export` has written."
            ) from error
        folder, new = root / key, 0
        for path in sorted(unpacked.iterdir()):
            target = folder / path.name
            if not target.exists():
                files.write_atomically(target, _mover(path))
                new += path.suffix == ".safetensors"
    return folder, new


def _unpack(tar: tarfile.TarFile, into: Path, archive: str) -> str:
    """Copy the members out, each checked; returns the store's key."""
    first = tar.next()
    if first is None or first.name != CONTENTS or not first.isreg() or first.size > MAX_LIST_BYTES:
        raise ArchiveError(f"{archive} does not begin with {CONTENTS}: it is no archive of a store")
    listed = _read_index(_member(tar, first).read(), archive)
    left = dict(listed["files"])
    while (member := tar.next()) is not None:
        wanted = left.pop(member.name, None)
        limit = _limit(member.name)
        if wanted is None or limit is None or not member.isreg():
            raise ArchiveError(f"{archive} holds {member.name!r}, which is not on its list")
        if member.size != wanted["bytes"] or member.size > limit:
            raise ArchiveError(
                f"{archive}: {member.name} has {member.size} bytes, not {wanted['bytes']}"
            )
        path = into / member.name
        files.call_writer(path, _copier(_member(tar, member)))
        if files.sha256_of(path) != wanted["sha256"]:
            raise ArchiveError(f"{archive} is damaged: {member.name} has another sha256")
        if not _is_whole(path):
            raise ArchiveError(f"{archive}: {member.name} is no shard")
    if left:
        raise ArchiveError(f"{archive} is cut off: {len(left)} of its files are missing")
    manifest = _parsed((into / MANIFEST).read_bytes(), archive)
    if store_key(manifest) != listed["store"]:
        raise ArchiveError(f"{archive}: its manifest does not describe store {listed['store']}")
    return listed["store"]


def _read_index(text: bytes, archive: str) -> dict[str, Any]:
    """The list of an archive, its shape checked."""
    contents = _parsed(text, archive)
    entries = contents.get("files")
    right = (
        contents.get("format") == ARCHIVE_FORMAT
        and re.fullmatch(r"[0-9a-f]{32}", str(contents.get("store")))
        and isinstance(entries, dict)
        and MANIFEST in entries
        and all(isinstance(entry, dict) for entry in entries.values())
        and all(set(entry) == {"bytes", "sha256"} for entry in entries.values())
    )
    if not right:
        raise ArchiveError(f"{archive}: its list is not that of a store in format {ARCHIVE_FORMAT}")
    return contents


def _parsed(text: bytes, archive: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            json.dumps(content, allow_nan=False)
            return content
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{archive} is damaged: {error}") from error
    raise ArchiveError(f"{archive} is damaged: a {type(content).__name__} in place of an object")


def _limit(name: str) -> int | None:
    return next((limit for pattern, limit in MEMBERS if pattern.fullmatch(name)), None)


def _is_whole(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return True
    try:
        shards.read(path)
    except (shards.ShardError, FileNotFoundError):
        return False
    return True


def _add(tar: tarfile.TarFile, name: str, size: int, content: BinaryIO) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    tar.addfile(member, content)


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    content = tar.extractfile(member)
    assert content is not None, "a regular file"
    return content


def _copier(content: BinaryIO) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("xb") as out:
            shutil.copyfileobj(content, out)

    return write


def _mover(source: Path) -> Callable[[Path], None]:
    def write(temporary: Path) -> None:
        files.replace(source, temporary)

    return write


@contextmanager
def _unpacking_folder(root: Path) -> Iterator[Path]:
    """A folder of its own beside the stores, gone afterwards."""
    folder = files.temporary_name(root / "import")
    files.mkdir(folder)
    try:
        yield folder
    finally:
        files.remove_if_possible(folder)
