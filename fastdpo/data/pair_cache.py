"""Prepared pairs on disk: what took minutes is read in a moment by the next run that needs it.

An entry is one safetensors file, named by a hash of everything that its pairs depend on: the arrays
of a `PairDataset`, mapped into memory and not read into it, and its report. It is written under
another name and renamed when it is whole, so that any number of runs read and write at once, and
its checksum is compared before anything in it is believed.
"""

import hashlib
import json
import logging
import mmap
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdpo.data.chat_template import ensure_chat_template
from fastdpo.data.content import preparation_identity
from fastdpo.data.pairs import Dropped, PairDataset, PreparationReport, ScoredMasks
from fastdpo.data.reading import Rows
from fastdpo.data.row_keys import KEY_BYTES
from fastdpo.data.tokenize import prepare_pairs
from fastdpo.options import TokenizationOptions, data_folder
from fastdpo.system import files, ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ENTRIES = "pairs-*.safetensors"
BAD_SUFFIX = ".bad"
CACHED_FROM_ROWS = 500
"""Fewer rows are prepared sooner than they are looked up."""
MOST_BYTES = 2**35
"""The most that all entries take; those that were not used for the longest time make room."""
MAX_HEADER_BYTES = 2**28  # a report names the rows that were dropped

_DTYPES = {"I32": "<i4", "I64": "<i8", "BOOL": "|b1", "U8": "|u1"}
_ARRAYS = {
    "tokens": "I32", "offsets": "I64", "rows": "I64", "cut": "BOOL", "keys": "U8",
    "masked": "I64", "mask_sides": "BOOL", "mask_tokens": "BOOL",
}  # fmt: skip


class EntryError(ValueError):
    """A file that is no entry, or that was damaged since it was written."""


def cached_pairs(
    rows: Rows,
    tokenizer: "PreTrainedTokenizerBase",
    options: TokenizationOptions,
    *,
    vocabulary_size: int | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> PairDataset:
    """Return what `prepare_pairs` does, from the folder of prepared pairs where it has them.

    Several ranks that share the folder prepare them once. Streams, small sets and what cannot be
    known by its content are prepared every time.

    Args:
        rows: as for `prepare_pairs`, as are all others.
        tokenizer: gets the plain chat template where `prepare_pairs` would set it.
        options: say where the folder is.
        vocabulary_size: number of embeddings of the model.
        limit: stop reading at this many pairs.
        progress: show a progress bar.

    Raises:
        DataError: as `prepare_pairs`.
    """

    def prepare() -> PairDataset:
        return prepare_pairs(
            rows,
            tokenizer,
            options,
            vocabulary_size=vocabulary_size,
            limit=limit,
            progress=progress,
        )

    folder = data_folder(options.data_cache)
    if folder is None or limit is not None or rows.is_stream or len(rows) < CACHED_FROM_ROWS:
        return prepare()
    identity = preparation_identity(rows, tokenizer, options, vocabulary_size)
    if identity is None:
        return prepare()
    path = folder / entry_name(identity)

    def read_or_prepare() -> PairDataset:
        known = read_if_whole(path)
        if known is None:
            had_template = tokenizer.chat_template is not None
            pairs = prepare()
            gets_template = tokenizer.chat_template is not None and not had_template
            keep(path, pairs, gets_template=gets_template)
            return pairs
        pairs, gets_template = known
        if gets_template:
            ensure_chat_template(tokenizer)
        logger.info("The prepared pairs of %s are those in %s", rows.source, path)
        return pairs

    return ranks.after_first(read_or_prepare)


def entry_name(identity: Mapping[str, Any]) -> str:
    """The name of the file of pairs that depend on this."""
    text = json.dumps(identity, sort_keys=True, default=str)
    return ENTRIES.replace("*", hashlib.sha256(text.encode()).hexdigest()[:32])


def keep(path: Path, pairs: PairDataset, *, gets_template: bool) -> None:
    """Write an entry, and make room for it; a disk that is full or failing costs a warning."""
    try:
        files.write_atomically(
            path,
            lambda temporary: files.write_pieces(temporary, _pieces(pairs, gets_template)),
        )
        _make_room(path.parent)
    except OSError as error:
        logger.warning(
            "The prepared pairs could not be kept in %s (%s); the next run prepares them again. "
            "--data_cache names another folder, or off.",
            path.parent,
            error,
        )


def read_if_whole(path: Path) -> tuple[PairDataset, bool] | None:
    """The pairs of an entry, and whether the tokenizer gets the plain chat template for them.

    A damaged entry is set aside with a warning.

    Returns:
        None where there is no whole entry.
    """
    try:
        known = read(path)
    except FileNotFoundError:
        return None
    except EntryError as error:
        logger.warning(
            "%s is damaged (%s): set aside as %s; its pairs are prepared again.",
            path,
            error,
            set_aside(path).name,
        )
        return None
    except OSError as error:
        logger.warning("%s cannot be read (%s); its pairs are prepared again.", path, error)
        return None
    with suppress(OSError):  # of a read-only folder
        files.touch(path)
    return known


def read(path: Path) -> tuple[PairDataset, bool]:
    """Map an entry into memory, once everything about it was checked.

    Raises:
        EntryError: it is damaged or no entry, with the reason.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise EntryError(f"a file of {size} bytes")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header_bytes = int.from_bytes(mapped[:8], "little")
    if header_bytes > min(size - 8, MAX_HEADER_BYTES):
        raise EntryError(f"a header of {header_bytes} bytes in a file of {size}")
    try:
        header = json.loads(mapped[8 : 8 + header_bytes])
        metadata = header.pop("__metadata__")
        content = memoryview(mapped)[8 + header_bytes :]
        checksum = hashlib.sha256(_checked_text(header, metadata["report"]))
        checksum.update(content)
        if metadata["sha256"] != checksum.hexdigest():
            raise EntryError("its checksum is wrong")
        if set(header) != set(_ARRAYS):
            raise EntryError(f"it holds {sorted(header)}")
        arrays = {name: _array(content, header[name], _ARRAYS[name]) for name in _ARRAYS}
        told = json.loads(metadata["report"])
        return _pairs(arrays, _report(told["report"])), bool(told["gets_template"])
    except EntryError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise EntryError(f"{type(error).__name__}: {error}") from error


def _pieces(pairs: PairDataset, gets_template: bool) -> Iterator[Any]:
    """The bytes of an entry, piece by piece; no array is copied."""
    fields = asdict(pairs.report) | {"reasons": list(pairs.report.reasons.items())}
    report = json.dumps({"report": fields, "gets_template": gets_template})
    arrays = pairs.arrays | _mask_arrays(pairs)
    arrays["keys"] = arrays["keys"].view(np.uint8).ravel()
    header: dict[str, Any] = {}
    start = 0
    for name, kind in _ARRAYS.items():
        array = arrays[name] = np.ascontiguousarray(arrays[name], dtype=_DTYPES[kind])
        end = start + array.nbytes
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [start, end]}
        start = end
    ordered = [arrays[name].data.cast("B") for name in _ARRAYS if arrays[name].size]
    checksum = hashlib.sha256(_checked_text(header, report))
    for array in ordered:
        checksum.update(array)
    metadata = {"report": report, "sha256": checksum.hexdigest()}
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    text += b" " * (-len(text) % 8)  # arrays lie at multiples of 8
    yield len(text).to_bytes(8, "little") + text
    yield from ordered


def _checked_text(header: Mapping[str, Any], report: str) -> bytes:
    return f"{json.dumps(header, sort_keys=True)}\n{report}\n".encode()


def _array(content: memoryview, entry: Mapping[str, Any], kind: str) -> np.ndarray:
    start, end = entry["data_offsets"]
    if entry["dtype"] != kind or not 0 <= start <= end <= len(content):
        raise EntryError(f"an array of {entry['dtype']} at {start} to {end} of {len(content)}")
    return np.frombuffer(content[start:end], dtype=_DTYPES[kind])


def _mask_arrays(pairs: PairDataset) -> dict[str, np.ndarray]:
    """The masks end to end, with the pairs and the sides that have one."""
    masked = sorted(pairs.masks)
    sides = [[mask is not None for mask in pairs.masks[index]] for index in masked]
    tokens = [mask for index in masked for mask in pairs.masks[index] if mask is not None]
    return {
        "masked": np.array(masked, dtype=np.int64),
        "mask_sides": np.array(sides, dtype=np.bool_).ravel(),
        "mask_tokens": np.concatenate([np.empty(0, dtype=np.bool_), *tokens]),
    }


def _pairs(arrays: dict[str, np.ndarray], report: PreparationReport) -> PairDataset:
    lengths = np.diff(arrays["offsets"])
    tokens = len(arrays["tokens"])
    if len(arrays["offsets"]) % 3 != 1 or arrays["offsets"][0] or arrays["offsets"][-1] != tokens:
        raise EntryError("its offsets are not those of its tokens")
    if (lengths < 1).any() or len(arrays["rows"]) != len(lengths) // 3:
        raise EntryError("its parts are not those of its pairs")
    masks: dict[int, ScoredMasks] = {}
    start = 0
    for index, has in zip(
        arrays["masked"].tolist(), arrays["mask_sides"].reshape(-1, 2).tolist(), strict=True
    ):
        sides: list[np.ndarray | None] = [None, None]
        for side in (0, 1):
            if has[side]:
                end = start + int(lengths[3 * index + 1 + side])
                sides[side], start = arrays["mask_tokens"][start:end], end
        masks[index] = (sides[0], sides[1])
    keys = arrays["keys"].view(f"S{KEY_BYTES}").reshape(-1, 2)
    return PairDataset(
        arrays["tokens"], arrays["offsets"], arrays["rows"], arrays["cut"], keys, report, masks
    )


def _report(told: dict[str, Any]) -> PreparationReport:
    dropped = {reason: Dropped(**entry) for reason, entry in told["dropped"].items()}
    reasons = {int(row): str(reason) for row, reason in told["reasons"]}
    fields: dict[str, Any] = told | {"dropped": dropped, "reasons": reasons}
    return PreparationReport(**fields)


def entries(folder: Path) -> list[Path]:
    """The entries of a folder, whole or not, sorted by name."""
    return sorted(folder.glob(ENTRIES))


def _make_room(folder: Path) -> None:
    """Remove the entries that were not used for the longest time, until the rest is in bounds."""
    known = []
    for path in entries(folder):
        with suppress(FileNotFoundError):
            stat = path.stat()
            known.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in known)
    for _, size, path in sorted(known):
        if total <= MOST_BYTES:
            break
        files.remove(path)
        total -= size
        logger.info("Removed the prepared pairs %s to make room", path)


@dataclass(frozen=True, slots=True)
class EntrySummary:
    """One entry, as `python -m fastdpo.reference info` shows it.

    Attributes:
        path: of its file.
        source: the file or data set that its rows are from; "unknown" where it is damaged.
        pairs: their number.
        bytes: size of its file.
        unused_s: seconds since a run last used it.
        fault: the reason why it is damaged, or None.
    """

    path: Path
    source: str
    pairs: int
    bytes: int
    unused_s: float
    fault: str | None


def summarize_entry(path: Path) -> EntrySummary:
    """Read an entry and check it; nothing is changed.

    Raises:
        OSError: it cannot be read.
    """
    stat = path.stat()
    try:
        pairs, fault = read(path)[0], None
        source, count = pairs.report.source, len(pairs)
    except EntryError as error:
        source, count, fault = "unknown", 0, str(error)
    return EntrySummary(path, source, count, stat.st_size, time.time() - stat.st_mtime, fault)


def set_aside(path: Path) -> Path:
    """Give a damaged entry a name that no reader looks for, unless another process was first."""
    aside = path.with_name(path.name + BAD_SUFFIX)
    with suppress(OSError):
        files.replace(path, aside)
    return aside
