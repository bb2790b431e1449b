"""Tables of columns: CSV with true line numbers, Parquet and Arrow files, saved folders."""

import csv
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from fastdpo.data.compressed import content_ending
from fastdpo.data.errors import DataError, UnknownSplitError
from fastdpo.data.json_lines import read_bytes
from fastdpo.data.sizes import check_ratio, could_be_far_larger, parquet_bytes
from fastdpo.system.limits import available_bytes, more_memory

TEXT_ENDINGS = (".csv", ".tsv")
TABLE_ENDINGS = (".parquet", *TEXT_ENDINGS, ".arrow")
_NO_TEXT = re.compile(r"\b(Image|Audio|Video|Pdf)\(")


def read_csv(path: Path) -> tuple[list[dict[str, str]], list[int]]:
    """Read a file of comma (.tsv: tab) separated values with a header; every value is text.

    Args:
        path: an existing file, UTF-8, quoted as RFC 4180 has it.

    Returns:
        The rows, and for each the line that it ends on, counted from 1.

    Raises:
        DataError: not UTF-8, no unique header, a row with more or fewer fields than the header, or
            a quote that is never closed; the text names file:line.
    """
    content = read_bytes(path)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(10, 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte {error.start + 1} of the file (0x{content[error.start]:02x}) is "
            "not UTF-8; save the file as UTF-8"
        ) from error
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter="\t" if content_ending(path) == ".tsv" else ",",
        strict=True,
    )
    previous = csv.field_size_limit(2**31 - 1)
    rows, numbers = [], []
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}:1: the header names a column twice ({header}); rename one")
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{path}:{reader.line_num}: the row has {len(fields)} fields and the header "
                    f"{len(header)} ({', '.join(header)}); quote fields that hold a comma, a quote "
                    "or a line break"
                )
            rows.append(dict(zip(header, fields, strict=True)))
            numbers.append(reader.line_num)
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: no valid CSV ({error}); quote fields that hold a comma, a "
            "quote or a line break, and double the quotes inside them"
        ) from error
    finally:
        csv.field_size_limit(previous)
    return rows, numbers


def read_table(path: Path) -> Any:
    """Open a Parquet or Arrow file as a `datasets.Dataset`, without a copy in the cache folder.

    Raises:
        DataError: the file is broken, of another kind, or unpacks to more than there is memory.
    """
    import pyarrow
    from datasets import Dataset

    size, available = path.stat().st_size, available_bytes() or sys.maxsize
    try:
        with more_memory(size + available):
            if path.suffix.lower() == ".parquet":
                from pyarrow import parquet

                if could_be_far_larger(path):
                    check_ratio(parquet_bytes(path), size, str(path))
                return Dataset(parquet.read_table(path))
            return Dataset.from_file(str(path))
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(
            f"{path}, a file of {size:,} bytes, unpacks to more than the memory that is available "
            f"({available / 2**20:,.0f} MiB); pass the rows as a .jsonl file, in several parts"
        ) from error
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} can't be read as {path.suffix.lower()}: {error}; write it again, or pass the "
            "rows as a .jsonl file"
        ) from error


def is_saved_folder(path: Path) -> bool:
    """True where `datasets` wrote the folder with save_to_disk."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def read_saved(path: Path, split: str) -> Any:
    """Open one split of a folder that save_to_disk wrote; slices as in `take_split`.

    Raises:
        DataError: the folder is broken, or names files outside itself.
        UnknownSplitError: there is no such split.
    """
    from datasets import DatasetDict, load_from_disk

    try:
        _check_saved_names(path)
        loaded = load_from_disk(str(path))
    except DataError:
        raise
    except Exception as error:  # `datasets` raises what its parsing of the folder happens to meet
        raise DataError(
            f"{path} looks like a folder of save_to_disk and cannot be read "
            f"({type(error).__name__}: {error}); save or copy it again"
        ) from error
    parts: dict[str, Any] = {"train": loaded}
    if isinstance(loaded, DatasetDict):
        parts = {str(name): part for name, part in loaded.items()}
    name = re.split(r"[\[+]", split)[0]
    if name not in parts:
        raise UnknownSplitError(
            f"split {split!r} was asked of {path}, which has {list(parts)}; pass one of those"
        )
    return parts[name].select(take_split(split, name, len(parts[name]), str(path)))


def _check_saved_names(path: Path) -> None:
    """Refuse a saved folder whose lists name files or splits outside it."""
    names: list[Any] = []
    for split in (path / "dataset_dict.json",):
        if split.is_file():
            names += json.loads(split.read_text(encoding="utf-8"))["splits"]
    for state in [path / "state.json", *path.glob("*/state.json")]:
        if state.is_file():
            files = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
            names += [file["filename"] for file in files]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise DataError(
                f"{path} names {name!r}, which is no file of its own; save or copy it again"
            )


def take_split(split: str, name: str, rows: int, source: str) -> range | list[int]:
    """Return the rows that a split such as "train[:90%]" or "train[:10]+train[-10:]" takes.

    Args:
        split: as `datasets` reads it.
        name: of the only split that there is.
        rows: in it.
        source: for messages.

    Returns:
        The row numbers.

    Raises:
        UnknownSplitError: another split is requested.
    """
    if split == name:
        return range(rows)
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: rows})
    except (ValueError, AssertionError) as error:
        raise UnknownSplitError(
            f"split {split!r} was asked of {source}, which is one file and so has one split, "
            f"{name!r} ({error}); pass {name!r} or a slice of it such as {name}[:90%], or the "
            "path of the file that holds the other rows"
        ) from error
    return [row for part in parts for row in range(part.from_, part.to)]


class TransformedRows(Sequence[Any]):
    """The rows of a `datasets.Dataset` as the transform that it has been given makes them."""

    def __init__(self, table: Any):
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._table[number] for number in range(*index.indices(len(self)))]
        return self._table[index]


def read_frame(frame: Any, source: str) -> Any:
    """Make a `datasets.Dataset` of a pandas frame.

    Raises:
        DataError: it holds what Arrow can't.
    """
    import pyarrow
    from datasets import Dataset

    try:
        return Dataset.from_pandas(frame, preserve_index=False)
    except (pyarrow.ArrowException, UnicodeError) as error:
        raise DataError(
            f"{source} is a frame that Arrow can't hold ({error}); correct the column, or pass its "
            'rows: frame.to_dict("records")'
        ) from error


def check_only_text(table: Any, source: str) -> None:
    """Refuse a table with columns of images, audio or video before any is decoded."""
    for name, feature in (getattr(table, "features", None) or {}).items():
        if match := _NO_TEXT.search(repr(feature)):
            raise DataError(
                f"{source}: column {name!r} is of type {match.group(1)}, and only text can be "
                "trained on; remove the column if the text stands alone"
            )
