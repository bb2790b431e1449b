"""Reference log-probs on disk: append-only checksummed shards, looked up by content.

A store is a folder per identity: `manifest.json` describes the identity, every shard is complete
in itself. Several processes may fill one store at once: shard names are unique, a shard gets its
name only when it is whole, and readers take the union.
"""

import contextlib
import hashlib
import json
import logging
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fastdpo import files
from fastdpo.batching import Group

logger = logging.getLogger(__name__)

FORMAT = 1
KEY_BYTES = 32
QUARANTINE_SUFFIX = ".bad"


def row_key(prompt_ids: np.ndarray, completion_ids: np.ndarray) -> bytes:
    """sha256 of a completion in its context: the token ids, and where the scored span begins."""
    digest = hashlib.sha256(struct.pack("<qq", FORMAT, len(prompt_ids)))
    digest.update(np.ascontiguousarray(prompt_ids, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(completion_ids, dtype="<i4").tobytes())
    return digest.digest()


def group_keys(group: Group) -> list[bytes]:
    """The row keys of a group's completions."""
    return [row_key(group.prompt_ids, completion) for completion in group.completions]


@dataclass(frozen=True, slots=True, eq=False)
class ScoredCompletion:
    """What the store keeps of one completion."""

    key: bytes
    logps: float  # nats, summed over the completion
    token_logps: np.ndarray  # (C,) float32, nats


class ReferenceStore:
    """The log-probs of one reference.

    Args:
        root: folder of all stores; this one's lies inside under a hash of the identity.
        identity: as `reference_identity` describes it.

    Raises:
        OSError: the folder cannot be made or read.
    """

    def __init__(self, root: Path, identity: dict[str, Any]) -> None:
        described = {"format": FORMAT, "identity": identity}
        text = json.dumps(described, sort_keys=True, allow_nan=False)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:32]
        self.identity = identity
        self._shards: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._index: tuple[np.ndarray, np.ndarray] | None = None
        manifest = self.folder / "manifest.json"
        if not manifest.exists():
            files.write_json(manifest, described)

    def lookup(self, keys: Sequence[bytes]) -> np.ndarray:
        """(n,) float64 log-probs of the keys, NaN where the store has none."""
        known_keys, known_logps = self._union()
        wanted = np.array(keys, dtype=f"S{KEY_BYTES}")
        found = np.full(len(wanted), np.nan)
        if len(known_keys) and len(wanted):
            at = np.searchsorted(known_keys, wanted).clip(max=len(known_keys) - 1)
            hit = known_keys[at] == wanted
            found[hit] = known_logps[at[hit]]
        return found

    def append(self, rows: Sequence[ScoredCompletion]) -> None:
        """Write one shard; it is on the disk, whole and checksummed, when this returns.

        Raises:
            ValueError: a log-prob is not finite, or a row is not as `ScoredCompletion` says.
            OSError: the disk is full or failing; the store is then as it was before.
        """
        if not rows:
            return
        tensors = {
            "keys": np.frombuffer(b"".join(row.key for row in rows), dtype=np.uint8),
            "logps": np.array([row.logps for row in rows], dtype=np.float64),
            "tokens": np.array([len(row.token_logps) for row in rows], dtype=np.int64),
            "token_logps": np.concatenate([row.token_logps for row in rows]).astype(np.float32),
        }
        for name in ("logps", "token_logps"):
            bad = tensors[name][~np.isfinite(tensors[name])]
            if len(bad):
                raise ValueError(
                    f"a reference log-prob is {bad[0]}: the model overflows on this input. Load it "
                    "in bfloat16 or float32."
                )
        if fault := _fault(tensors):
            raise ValueError(f"not a shard of scored completions: {fault}.")
        metadata = {"format": str(FORMAT), "sha256": _checksum(tensors)}
        path = self.folder / f"shard-{uuid.uuid4().hex}.safetensors"
        files.write_bytes(path, save(tensors, metadata))

    def _union(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) sorted distinct keys and their log-probs; equal keys: the lowest shard name's."""
        names = sorted(path.name for path in self.folder.glob("shard-*.safetensors"))
        fresh = [name for name in names if name not in self._shards]
        if fresh or self._index is None:
            for name in fresh:
                shard = self._read(self.folder / name)
                if shard is not None:
                    self._shards[name] = shard
            order = sorted(self._shards)
            empty = (np.empty(0, dtype=f"S{KEY_BYTES}"), np.empty(0))
            shards = [self._shards[name] for name in order] or [empty]
            keys, first = np.unique(np.concatenate([s[0] for s in shards]), return_index=True)
            self._index = keys, np.concatenate([s[1] for s in shards])[first]
        return self._index

    def _read(self, path: Path) -> tuple[np.ndarray, np.ndarray] | None:
        """Keys and log-probs of one shard; a bad one is set aside with a warning, not believed."""
        try:
            with safe_open(path, framework="numpy") as shard:
                metadata = shard.metadata() or {}
                tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
            if metadata != {"format": str(FORMAT), "sha256": _checksum(tensors)}:
                raise ValueError("its format or checksum is wrong")
            if fault := _fault(tensors):
                raise ValueError(fault)
            return tensors["keys"].view(f"S{KEY_BYTES}"), tensors["logps"]
        except FileNotFoundError:
            return None  # another process has set it aside since the folder was listed
        except (SafetensorError, ValueError, TypeError, AttributeError) as error:
            aside = path.with_name(path.name + QUARANTINE_SUFFIX)
            with contextlib.suppress(FileNotFoundError):
                path.rename(aside)
            logger.warning(
                "%s is damaged (%s): set aside as %s; its rows are computed again.",
                path,
                error,
                aside.name,
            )
            return None


SHARD_TENSORS = {"keys": "uint8", "logps": "float64", "tokens": "int64", "token_logps": "float32"}
"""All of them vectors; keys and token_logps lie end to end."""


def _fault(tensors: dict[str, np.ndarray]) -> str | None:
    """What about a shard's tensors cannot be, or None."""
    kinds = {name: (tensor.dtype.name, tensor.ndim) for name, tensor in tensors.items()}
    if kinds != {name: (dtype, 1) for name, dtype in SHARD_TENSORS.items()}:
        return f"it holds {kinds}"
    rows, token_counts = len(tensors["logps"]), tensors["tokens"]
    if len(tensors["keys"]) != rows * KEY_BYTES or len(token_counts) != rows:
        return (
            f"{len(tensors['keys'])} bytes of keys and {len(token_counts)} token counts for {rows} "
            "log-probs"
        )
    # Each count is checked before they are summed, where int64 could wrap around.
    scored = len(tensors["token_logps"])
    if (token_counts < 1).any() or (token_counts > scored).any() or token_counts.sum() != scored:
        return f"its token counts do not add up to its {scored} token log-probs"
    if not (np.isfinite(tensors["logps"]).all() and np.isfinite(tensors["token_logps"]).all()):
        return "a log-prob is not finite"
    return None


def _checksum(tensors: dict[str, np.ndarray]) -> str:
    """sha256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()
