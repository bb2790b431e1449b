"""Maintenance of stores and of prepared pairs: check them, and remove what no run needs."""

import math
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from stat import S_ISREG

from fastdpo.data import pair_cache
from fastdpo.ref_cache import shards
from fastdpo.ref_cache.run_notes import load_requests
from fastdpo.ref_cache.store import MANIFEST, QUARANTINE_SUFFIX, SHARDS
from fastdpo.system import files

DAY_S = 86_400.0
TEMPORARY_AGE_S = DAY_S
"""A temporary file of this age belongs to no writer that lives: a shard is written in seconds."""


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """One store, as `info` shows it."""

    folder: Path
    models: tuple[str, ...]  # names of the models that runs gave, newest first
    rows: int  # completions, duplicates counted
    shards: int
    damaged: dict[str, str]  # for each damaged shard's name the reason
    bytes: int
    age_s: float  # since the oldest file was written
    unused_s: float  # since a run last used it


@dataclass(frozen=True, slots=True)
class PruneResult:
    """Paths that a prune removed, or would in a dry run, and their size."""

    unused: tuple[Path, ...]  # folders of stores, or files of prepared pairs
    stale_files: tuple[Path, ...]  # damaged shards, and temporary files of killed writers
    bytes: int


def store_folders(root: Path) -> list[Path]:
    """The folders of all stores, sorted."""
    return sorted(path.parent for path in root.glob(f"*/{MANIFEST}") if not _is_temporary(path))


def summarize(folder: Path) -> StoreSummary:
    """Read every shard of a store and check it; nothing is changed."""
    rows, damaged = 0, {}
    paths = sorted(folder.glob(SHARDS))
    for path in paths:
        try:
            rows += len(shards.read(path).keys)
        except shards.ShardError as error:
            damaged[path.name] = str(error)
        except FileNotFoundError:
            continue
    stats = _stats(folder)
    requests = load_requests(folder)
    names = [str(requested.get("model")) for requested in requests if requested.get("model")]
    now = time.time()
    return StoreSummary(
        folder,
        tuple(dict.fromkeys(names)),
        rows,
        len(paths),
        damaged,
        sum(stat.st_size for stat in stats),
        now - min((stat.st_mtime for stat in stats), default=now),
        now - max((stat.st_mtime for stat in stats), default=now),
    )


def prune(root: Path, *, unused_days: float | None = None, dry_run: bool = False) -> PruneResult:
    """Remove what no run needs; safe beside readers and writers.

    Damaged shards that were set aside and temporary files of killed writers go; with
    `unused_days`, so do stores that no run has used for so long. A store goes under another name
    first, so that a reader sees all of it or nothing, and keeps what it has read already; a writer
    makes its folder again.

    Raises:
        ValueError: `unused_days` is negative or not finite, which would take every store or none.
    """
    _check_days(unused_days)
    stores, stale_files, freed, now = [], [], 0, time.time()
    for folder in store_folders(root):
        stats = _stats(folder)
        newest = max((stat.st_mtime for stat in stats), default=now)
        if unused_days is not None and now - newest > unused_days * DAY_S:
            stores.append(folder)
            freed += sum(stat.st_size for stat in stats)
            if not dry_run:
                doomed = files.temporary_name(folder)
                with suppress(FileNotFoundError):  # another prune was first
                    files.replace(folder, doomed)
                    files.remove(doomed)
    for path in [*root.glob("*"), *root.glob("*/*")]:
        if path.parent in stores or not _is_leftover(path, now):
            continue
        stale_files.append(path)
        inside = list(path.rglob("*")) if path.is_dir() else [path]
        freed += sum(each.stat().st_size for each in inside if each.is_file())
        if not dry_run:
            files.remove(path)
    return PruneResult(tuple(stores), tuple(stale_files), freed)


def prune_pairs(
    root: Path, *, unused_days: float | None = None, dry_run: bool = False
) -> PruneResult:
    """Remove from the folder of prepared pairs what `prune` removes from that of the stores.

    A run that has mapped an entry keeps what it has read.

    Raises:
        ValueError: `unused_days` is negative or not finite.
    """
    _check_days(unused_days)
    unused, stale_files, freed, now = [], [], 0, time.time()
    for path in sorted(root.glob("*")):
        with suppress(FileNotFoundError):  # another prune was first
            stat = path.stat()
            is_entry = fnmatch(path.name, pair_cache.ENTRIES)
            if _is_leftover(path, now):
                stale_files.append(path)
            elif is_entry and unused_days is not None and now - stat.st_mtime > unused_days * DAY_S:
                unused.append(path)
            else:
                continue
            freed += stat.st_size
            if not dry_run:
                files.remove(path)
    return PruneResult(tuple(unused), tuple(stale_files), freed)


def _check_days(unused_days: float | None) -> None:
    if unused_days is not None and not 0 <= unused_days < math.inf:
        raise ValueError(f"unused_days is {unused_days!r}; it must be a finite number from 0 on")


def _is_leftover(path: Path, now: float) -> bool:
    if not path.exists():
        return False
    if path.name.endswith(QUARANTINE_SUFFIX):
        return True
    return _is_temporary(path) and now - path.stat().st_mtime > TEMPORARY_AGE_S


def _is_temporary(path: Path) -> bool:
    return any(part.startswith(files.TEMPORARY_MARK) for part in (path.name, path.parent.name))


def _stats(folder: Path) -> list[os.stat_result]:
    """The stats of a store's files; one that a writer renames meanwhile is skipped."""
    stats = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            stat = path.stat()
            stats += [stat] if S_ISREG(stat.st_mode) else []
    return stats
