"""Reference log-probs on disk: append-only checksummed shards, looked up by content.

A store is a folder per identity: `manifest.json` describes the identity, every shard is complete
in itself. Several processes may fill one store at once: shard names are unique, a shard gets its
name only when it is whole, and readers take the union.
"""

import contextlib
import hashlib
import json
import logging
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from fastdpo.data.row_keys import KEY_BYTES, row_key
from fastdpo.options import ReferenceOptions
from fastdpo.ref_cache import shards
from fastdpo.ref_cache.shards import (
    FORMAT,
    ScoredCompletion,
    Shard,
    ShardError,
    group_keys,
    keys_of,
)
from fastdpo.system import files
from fastdpo.system.versions import difference

__all__ = [
    "KEY_BYTES",
    "ReferenceStore",
    "ScoredCompletion",
    "StoreOptions",
    "group_keys",
    "keys_of",
    "row_key",
    "quarantine",
    "store_key",
]

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SHARDS = "shard-*.safetensors"
QUARANTINE_SUFFIX = ".bad"


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How a run uses its store.

    Attributes:
        keep_token_logps: write the log-prob of every token, not only their sums.
        strict_versions: rows that other versions computed do not count as known.
        spot_check_pairs: the most known pairs to score again before the store is believed.
    """

    keep_token_logps: bool = True
    strict_versions: bool = False
    spot_check_pairs: int = 0

    @classmethod
    def of_run(cls, options: ReferenceOptions) -> Self:
        """The options of a run, from its command line."""
        return cls(
            keep_token_logps=options.ref_token_logps == "on",
            strict_versions=options.ref_versions == "strict",
            spot_check_pairs=options.ref_spot_check,
        )


def manifest_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `manifest.json` for an identity."""
    return {"format": FORMAT, "identity": dict(identity)}


def store_key(manifest: Mapping[str, Any]) -> str:
    """The name of a store's folder: a hash of its manifest."""
    text = json.dumps(manifest, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def quarantine(shard: Path) -> Path:
    """Give a damaged shard a name that no reader looks for, unless another process was first."""
    aside = shard.with_name(shard.name + QUARANTINE_SUFFIX)
    with contextlib.suppress(FileNotFoundError):
        files.replace(shard, aside)
    return aside


class ReferenceStore:
    """The log-probs of one reference.

    Args:
        root: folder of all stores; this one's lies inside under a hash of the identity.
        identity: the reference, as `reference_identity` describes it.
        versions: the libraries and the device that compute now, recorded in each shard; None
            records and compares nothing.
        options: how the run uses the store.

    Attributes:
        num_corrupt: how many damaged shards this object has set aside.
        skipped_versions: how many completions `strict_versions` has passed over, by what differs.

    Raises:
        OSError: the folder cannot be made or read.
    """

    def __init__(
        self,
        root: Path,
        identity: Mapping[str, Any],
        *,
        versions: Mapping[str, str] | None = None,
        options: StoreOptions = StoreOptions(),
    ) -> None:
        self._manifest = manifest_of(identity)
        self.root, self.folder = root, root / store_key(self._manifest)
        self.identity = identity
        self.versions = versions
        self.options = options
        self.num_corrupt = 0
        self.skipped_versions: Counter[str] = Counter()
        self._names: list[str] = []  # shards in the index, in the order of reading
        self._versions: list[dict[str, str] | None] = []  # what computed each of these shards
        self._passed_over: set[str] = set()  # damaged, or of other versions under strict_versions
        self._keys = np.empty(0, dtype=f"S{KEY_BYTES}")  # (n,) sorted, distinct
        self._logps = np.empty(0)  # (n,) float64, nats
        self._origin = np.empty(0, dtype=np.int32)  # (n,) index into _names
        self._write_manifest()

    def __len__(self) -> int:
        """How many distinct completions have a known log-prob."""
        self._refresh()
        return len(self._keys)

    def lookup(self, keys: Sequence[bytes] | np.ndarray) -> np.ndarray:
        """(n,) float64 log-probs of the keys, NaN where the store has none."""
        self._refresh()
        positions, known = self._find(keys)
        logps = np.full(len(keys), np.nan)
        logps[known] = self._logps[positions[known]]
        return logps

    def token_logps(self, keys: Sequence[bytes] | np.ndarray) -> list[np.ndarray]:
        """The log-probs of every token of each key's completion, (C,) float32 each, nats.

        Raises:
            KeyError: the store does not know one of the keys.
            ValueError: some rows were stored without them.
        """
        stored = self.stored_token_logps(keys)
        absent = sum(each is None for each in stored)
        if absent:
            raise ValueError(
                f"{absent} of {len(keys)} completions are in {self.folder} without the log-probs "
                "of their tokens: a run with --ref_token_logps off computed them. Give another "
                "--ref_cache folder and --ref_token_logps on to compute them with."
            )
        return [each for each in stored if each is not None]

    def stored_token_logps(self, keys: Sequence[bytes] | np.ndarray) -> list[np.ndarray | None]:
        """The log-probs of every token as `token_logps` returns them, None where left out.

        Raises:
            KeyError: the store does not know one of the keys.
            OSError: a shard was damaged since it was first read.
        """
        self._refresh()
        positions, known = self._find(keys)
        if not known.all():
            raise KeyError(f"{int((~known).sum())} of {len(keys)} keys are not in {self.folder}")
        token_logps: list[np.ndarray | None] = [None] * len(keys)
        origins = self._origin[positions]
        for origin in np.unique(origins):
            path = self.folder / self._names[origin]
            shard = self._read(path)
            if shard is None:
                raise OSError(f"{path} was whole a moment ago and is not any more: start again.")
            if shard.token_logps is None:
                continue
            place = {key: i for i, key in enumerate(shard.keys.tolist())}
            ends = np.cumsum(shard.tokens)
            for index in np.flatnonzero(origins == origin):
                i = place[self._keys[positions[index]]]
                token_logps[index] = shard.token_logps[ends[i] - shard.tokens[i] : ends[i]]
        return token_logps

    def other_versions(self, keys: Sequence[bytes] | np.ndarray) -> Counter[str]:
        """How many of the known keys other versions computed, by what differs."""
        self._refresh()
        if self.versions is None:
            return Counter()
        positions, known = self._find(keys)
        origins, counts = np.unique(self._origin[positions[known]], return_counts=True)
        keys_by_difference: Counter[str] = Counter()
        for origin, count in zip(origins, counts, strict=True):
            if differs := difference(self._versions[origin], self.versions):
                keys_by_difference[differs] += int(count)
        return keys_by_difference

    def has_other_versions(self, keys: Sequence[bytes] | np.ndarray) -> np.ndarray:
        """(n,) bool: whether each key is known and was computed by other versions than now's."""
        self._refresh()
        foreign = np.array([self._is_foreign(each) for each in self._versions], dtype=bool)
        positions, known = self._find(keys)
        is_foreign = np.zeros(len(keys), dtype=bool)
        is_foreign[known] = foreign[self._origin[positions[known]]]
        return is_foreign

    def append(self, rows: Sequence[ScoredCompletion]) -> None:
        """Write one shard; it is on the disk, whole and checksummed, when this returns.

        Raises:
            ValueError: a log-prob is not finite, or a row is not as `ScoredCompletion` says.
            OSError: the disk is full or failing; the store is then as it was before.
        """
        if not rows:
            return
        content = shards.encode(rows, self.versions, token_logps=self.options.keep_token_logps)
        self._write_manifest()  # `prune` may have taken the folder away
        files.write_bytes(self.folder / f"shard-{uuid.uuid4().hex}.safetensors", content)

    def touch(self) -> None:
        """Note that a run uses the store now; `prune --unused_days` goes by it."""
        with contextlib.suppress(OSError):  # a read-only store is a store
            files.touch(self.folder / MANIFEST)

    def _write_manifest(self) -> None:
        path = self.folder / MANIFEST
        if not path.exists():
            files.write_json(path, self._manifest)

    def _find(self, keys: Sequence[bytes] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) positions in the index, and (n,) bool whether each key is really there."""
        wanted = np.array(keys, dtype=f"S{KEY_BYTES}")
        if not len(self._keys) or not len(wanted):
            return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
        positions = np.searchsorted(self._keys, wanted).clip(max=len(self._keys) - 1)
        return positions, self._keys[positions] == wanted

    def _refresh(self) -> None:
        """Read the shards that were added since the last time.

        A shard that was listed and is gone when it is opened was merged, pruned or set aside by
        another process: the folder is listed again.
        """
        fresh: dict[str, Shard] = {}
        listed_again = 0
        while True:
            known = {*self._names, *self._passed_over, *fresh}
            names = sorted(path.name for path in self.folder.glob(SHARDS))
            vanished = False
            for name in [name for name in names if name not in known]:
                try:
                    shard = self._read(self.folder / name)
                except FileNotFoundError:
                    vanished = True
                    continue
                if shard is None:
                    self._passed_over.add(name)
                elif self.options.strict_versions and self._is_foreign(shard.versions):
                    self._passed_over.add(name)
                    self.skipped_versions[difference(shard.versions, self.versions or {})] += len(
                        shard.keys
                    )
                else:
                    fresh[name] = shard
            listed_again += 1
            if not vanished or listed_again > 10:
                break
        if fresh:
            self._merge(fresh)

    def _merge(self, fresh: Mapping[str, Shard]) -> None:
        """Add shards to the index.

        Of equal keys the shard with now's versions wins, then the one with the lowest name.
        """
        first = len(self._names)
        self._names += fresh
        self._versions += [shard.versions for shard in fresh.values()]
        order = sorted(
            range(len(self._names)),
            key=lambda i: (self._is_foreign(self._versions[i]), self._names[i]),
        )
        rank = np.empty(len(order), dtype=np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        read = list(fresh.values())
        keys = np.concatenate([self._keys, *(shard.keys for shard in read)])
        logps = np.concatenate([self._logps, *(shard.logps for shard in read)])
        counts = [len(shard.keys) for shard in read]
        numbers = np.arange(first, len(self._names), dtype=np.int32)
        origin = np.concatenate([self._origin, np.repeat(numbers, counts)])
        by_rank = np.argsort(rank[origin], kind="stable")
        self._keys, chosen = np.unique(keys[by_rank], return_index=True)
        self._logps, self._origin = logps[by_rank][chosen], origin[by_rank][chosen]

    def _is_foreign(self, versions: Mapping[str, str] | None) -> bool:
        return self.versions is not None and versions != self.versions

    def _read(self, path: Path) -> Shard | None:
        """Read one shard; a damaged one is set aside with a warning, and None returned."""
        try:
            return shards.read(path)
        except ShardError as error:
            aside = quarantine(path)
            self.num_corrupt += 1
            logger.warning(
                "%s is damaged (%s): set aside as %s; its rows are computed again.",
                path,
                error,
                aside.name,
            )
            return None
