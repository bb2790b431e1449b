"""One shard of a reference store: a checksummed safetensors file of scored completions."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fastdpo.batching import PairGroups, PromptGroup
from fastdpo.data.row_keys import KEY_BYTES, completion_key, prompt_digest

FORMAT = 1
MAX_HEADER_BYTES = 2**20  # ours have about 500
MAX_SHARD_BYTES = 2**32  # ours have 2 MiB at 100 tokens a completion
TENSORS = {"keys": "uint8", "logps": "float64", "tokens": "int64"}
"""Names and dtypes of the vectors in every shard; keys lie end to end."""

RAGGED = {"token_logps": "float32"}
"""The vector that `--ref_token_logps off` leaves out."""

SUM_TOLERANCE = 1e-6
"""Share of a sum by which the sum of its tokens' rounded log-probs may differ."""


class ShardError(ValueError):
    """A file that is no shard, or that was damaged since it was written."""


@dataclass(frozen=True, slots=True, eq=False)
class ScoredCompletion:
    """The row key and the log-probs of one completion, as a store keeps them."""

    key: bytes
    logps: float  # nats, summed over the completion
    token_logps: np.ndarray  # (C,) float32, nats


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """The content of one file, once everything about it was checked."""

    keys: np.ndarray  # (n,) S32
    logps: np.ndarray  # (n,) float64, nats
    tokens: np.ndarray  # (n,) int64
    token_logps: np.ndarray | None  # (sum of tokens,) float32, nats
    versions: dict[str, str] | None  # what computed them; None: not recorded


def group_keys(group: PromptGroup) -> list[bytes]:
    """The row keys of a group's completions."""
    prompt = prompt_digest(group.prompt_ids)
    return [
        completion_key(prompt.copy(), completion, mask)
        for completion, mask in zip(group.completions, group.masks, strict=True)
    ]


def keys_of(groups: Sequence[PromptGroup]) -> np.ndarray:
    """(n, k) S32: the row keys of n groups of k completions each."""
    if isinstance(groups, PairGroups):
        return groups.row_keys
    keys = np.array([group_keys(group) for group in groups], dtype=f"S{KEY_BYTES}")
    return keys if len(keys) else keys.reshape(0, 0)


def encode(
    rows: Sequence[ScoredCompletion], versions: Mapping[str, str] | None, *, token_logps: bool
) -> bytes:
    """The bytes of a shard that holds these completions.

    Raises:
        ValueError: a log-prob is not finite, or a row is not as `ScoredCompletion` says.
    """
    ragged = np.concatenate([row.token_logps for row in rows]).astype(np.float32)
    tensors = {
        "keys": np.frombuffer(b"".join(row.key for row in rows), dtype=np.uint8),
        "logps": np.array([row.logps for row in rows], dtype=np.float64),
        "tokens": np.array([len(row.token_logps) for row in rows], dtype=np.int64),
        "token_logps": ragged,
    }
    for name in ("logps", "token_logps"):
        bad = tensors[name][~np.isfinite(tensors[name])]
        if len(bad):
            raise ValueError(
                f"a reference log-prob is {bad[0]}: the model overflows on this input. Load it in "
                "bfloat16 or float32."
            )
    if fault := validate(tensors):
        raise ValueError(f"not a shard of scored completions: {fault}.")
    if not token_logps:
        del tensors["token_logps"]
    metadata = {"format": str(FORMAT)}
    if versions is not None:
        metadata["versions"] = json.dumps(dict(versions), sort_keys=True)
    metadata["sha256"] = checksum(tensors, metadata.get("versions"))
    return save(tensors, metadata)


def read(path: Path) -> Shard:
    """Read a shard and check everything about it; no size is allocated because a file claims it.

    Raises:
        ShardError: it is damaged or no shard, with the reason.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        size = file.seek(0, 2)
    if header_bytes > min(MAX_HEADER_BYTES, size) or size > MAX_SHARD_BYTES:
        raise ShardError(f"a header of {header_bytes} bytes in a file of {size}")
    try:
        with safe_open(path, framework="numpy") as shard:
            metadata = shard.metadata() or {}
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise ShardError(str(error)) from error
    versions = metadata.get("versions")
    wanted = {"format": str(FORMAT), "sha256": checksum(tensors, versions)}
    if metadata.get("format") != wanted["format"]:
        raise ShardError(
            f"it has format {metadata.get('format')!r}, and this fastdpo reads {FORMAT}"
        )
    if metadata != wanted | ({} if versions is None else {"versions": versions}):
        raise ShardError("its checksum is wrong")
    if fault := validate(tensors):
        raise ShardError(fault)
    return Shard(
        tensors["keys"].view(f"S{KEY_BYTES}"),
        tensors["logps"],
        tensors["tokens"],
        tensors.get("token_logps"),
        _versions(versions),
    )


def validate(tensors: Mapping[str, np.ndarray]) -> str | None:
    """The reason why these cannot be a shard's tensors; None if they can."""
    kinds = {name: (tensor.dtype.name, tensor.ndim) for name, tensor in tensors.items()}
    wanted = {name: (dtype, 1) for name, dtype in TENSORS.items()}
    if kinds not in (wanted, wanted | {name: (dtype, 1) for name, dtype in RAGGED.items()}):
        return f"it holds {kinds}"
    rows, token_counts = len(tensors["logps"]), tensors["tokens"]
    if len(tensors["keys"]) != rows * KEY_BYTES or len(token_counts) != rows:
        return (
            f"{len(tensors['keys'])} bytes of keys and {len(token_counts)} token counts for {rows} "
            "log-probs"
        )
    if (token_counts < 1).any():
        return "a token count is below 1"
    for name in ("logps", "token_logps"):
        if fault := _log_prob_fault(tensors.get(name, np.empty(0))):
            return fault
    if "token_logps" not in tensors:
        return None
    # Each count is checked before they are summed, where int64 could wrap around.
    scored = len(tensors["token_logps"])
    if (token_counts > scored).any() or token_counts.sum() != scored:
        return f"its token counts do not add up to its {scored} token log-probs"
    return _sum_fault(tensors)


def _log_prob_fault(logps: np.ndarray) -> str | None:
    """The reason why these cannot be log-probs; None if they can."""
    if not np.isfinite(logps).all():
        return "a log-prob is not finite"
    above = logps[logps > 0]
    return f"a log-prob is {above[0]:g}, above 0" if len(above) else None


def _sum_fault(tensors: Mapping[str, np.ndarray]) -> str | None:
    """The reason why the sums are not those of the tokens' log-probs; None if they are."""
    stored, counts = tensors["logps"], tensors["tokens"]
    if not len(stored):
        return None
    added = np.add.reduceat(tensors["token_logps"].astype(np.float64), np.cumsum(counts) - counts)
    wrong = np.flatnonzero(~np.isclose(stored, added, rtol=SUM_TOLERANCE, atol=1e-30))
    if not len(wrong):
        return None
    return (
        f"a sum is {stored[wrong[0]]:.6f} nats, and the log-probs of its tokens add up to "
        f"{added[wrong[0]]:.6f}"
    )


def checksum(tensors: Mapping[str, np.ndarray], versions: str | None = None) -> str:
    """sha256 over names, dtypes, shapes and bytes, and the text of the versions if there is one."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(tensor.tobytes())
    if versions is not None:
        digest.update(f"versions {versions}\n".encode())
    return digest.hexdigest()


def _versions(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    try:
        read_back = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ShardError(f"its versions are no JSON: {error}") from None
    if not isinstance(read_back, dict):
        raise ShardError(f"its versions are a {type(read_back).__name__}")
    return {str(name): str(value) for name, value in read_back.items()}
