r"""A strict reader of JSON and JSON lines: whatever could be misread is an error with its line.

Lines end at the byte \n and nowhere else (U+2028 inside a string is content). A byte order mark,
\r\n and blank lines are accepted. JSON lines are read one by one, from a pipe too: of a large file
no more than its longest line is held.
"""

import codecs
import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, overload

from fastdpo.data.column_wise import rows_of_columns
from fastdpo.data.compressed import content_ending, open_content
from fastdpo.data.errors import ROW_SHAPE, DataError

MAX_LINE_MIB = 16
MAX_DOCUMENT_BYTES = 2**30
HELD_BYTES = 2**26
"""A file of JSON lines of at most this size is held in memory; of a larger one, one line is."""
MAX_NESTING = 64

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MAGIC = {b"\x1f\x8b": "gzip", b"PAR1": "Parquet", b"PK\x03\x04": "zip", b"ARROW1": "Arrow"}


class _DuplicateKey(ValueError):
    pass


class JsonLines(Sequence[dict[str, Any]]):
    """The objects of a file of JSON lines, each read from the file when it is asked for.

    Args:
        path: the file, every line of which has been checked.
        starts: where each object's line begins, in bytes.
        content_hash: of the file's bytes.
        stamp: size and time of the file when it was checked.
    """

    def __init__(
        self, path: Path, starts: Sequence[int], content_hash: str, stamp: tuple[int, int]
    ):
        self._path, self._starts, self._stamp = path, starts, stamp
        self.content_hash = content_hash

    def select(self, numbers: Sequence[int]) -> "JsonLines":
        """Some of the objects, in the order of `numbers`; the hash stays that of the file."""
        starts = array("q", [self._starts[number] for number in numbers])
        return JsonLines(self._path, starts, self.content_hash, self._stamp)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        starts = self._starts[index]
        if isinstance(starts, int):
            return next(self._objects([starts]))
        return list(self._objects(starts))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._objects(self._starts)

    def _objects(self, starts: Iterable[int]) -> Iterator[dict[str, Any]]:
        with self._path.open("rb") as file:
            if stamp_of(file) != self._stamp:
                raise DataError(
                    f"{self._path} was changed while this run used it; write new rows to another "
                    "file, and start again"
                )
            for start in starts:
                file.seek(start)
                yield json.loads(file.readline())


def stamp_of(file: BinaryIO) -> tuple[int, int]:
    """Size and time of an open file, which differ once it was written to."""
    stat = os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns


def read_json_lines(
    path: Path, *, max_line_mib: int = MAX_LINE_MIB
) -> tuple[Sequence[dict[str, Any]], Sequence[int]]:
    """Read a file of one JSON object per line.

    Args:
        path: an existing file, compressed or not, or a pipe.
        max_line_mib: longer lines are an error: such a file is usually of another kind.

    Returns:
        The objects, which stay in a file of more than `HELD_BYTES`; and for each its line number,
        counted from 1 over all lines, blank ones too.

    Raises:
        DataError: a line is not exactly one JSON object in UTF-8; the text names file:line.
        OSError: the file cannot be read.
    """
    with open_content(path) as file:
        is_plain = path.is_file() and content_ending(path) == path.suffix.lower()
        if not is_plain or path.stat().st_size <= HELD_BYTES:
            return parse_json_lines(file, str(path), max_line_mib=max_line_mib)
        stamp, digest = stamp_of(file), hashlib.sha256()
        starts, numbers = array("q"), array("q")
        lines = _checked_lines(file, str(path), max_line_mib=max_line_mib, digest=digest)
        for start, number, _ in lines:
            starts.append(start)
            numbers.append(number)
    return JsonLines(path, starts, digest.hexdigest(), stamp), numbers


def parse_json_lines(
    file: BinaryIO, name: str, *, max_line_mib: int = MAX_LINE_MIB
) -> tuple[list[dict[str, Any]], Sequence[int]]:
    """Read JSON lines from an open file as `read_json_lines` does; messages call it `name`."""
    rows: list[dict[str, Any]] = []
    numbers = array("q")
    for _, number, row in _checked_lines(file, name, max_line_mib=max_line_mib):
        rows.append(row)
        numbers.append(number)
    return rows, numbers


def _checked_lines(
    file: BinaryIO, name: str, *, max_line_mib: int, digest: "hashlib._Hash | None" = None
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield where each object begins, in bytes, its line number and the object itself."""
    limit = max_line_mib * 2**20
    number = end = 0
    while raw := file.readline(limit + 1):
        number += 1
        end += len(raw)
        if digest is not None:
            digest.update(raw)
        where = f"{name}:{number}"
        if number == 1:
            _refuse_other_kinds(raw, name)
            raw = raw.removeprefix(codecs.BOM_UTF8)
        if len(raw) > limit:
            raise DataError(
                f"{where}: the line is longer than {max_line_mib} MiB, which is rarely a "
                "preference pair; put one object on each line, or raise --max_line_mib"
            )
        line = raw.strip(b" \t\r\n")
        if not line:
            continue
        row = _parse(line, where, cut_off=not raw.endswith(b"\n"))
        if not isinstance(row, dict):
            raise DataError(
                f"{where}: the line is a JSON {type(row).__name__}, one object per line is needed, "
                f"like {ROW_SHAPE}; if the file is one JSON document, give it the ending .json"
            )
        yield end - len(raw), number, row


def read_json(
    path: Path, *, max_line_mib: int = MAX_LINE_MIB
) -> tuple[list[dict[str, Any]], Sequence[int] | None]:
    """Read a .json file: a list of rows, an object of one such list or of columns, or JSON lines.

    Args:
        path: an existing file.
        max_line_mib: as in `read_json_lines`, where it turns out to be JSON lines.

    Returns:
        The rows; and their line numbers where the file turned out to be JSON lines, else None.

    Raises:
        DataError: it is none of these; the text names the place.
        OSError: the file cannot be read.
    """
    content = read_bytes(path)
    first_line = content.strip().split(b"\n", 1)[0].strip()
    if first_line.startswith(b"{") and first_line.endswith(b"}"):
        rows, numbers = parse_json_lines(BytesIO(content), str(path), max_line_mib=max_line_mib)
        if len(rows) > 1:
            return rows, numbers
        if {"chosen", "rejected"} <= rows[0].keys() and not rows_of_columns(rows[0], str(path)):
            return rows, numbers
    document = _parse(content, str(path), whole_file=True)
    if (rows := rows_of_columns(document, str(path))) is not None and len(document) > 1:
        return rows, None
    if isinstance(document, dict):
        lists = [key for key, value in document.items() if isinstance(value, list)]
        if len(lists) != 1:
            raise DataError(
                f"{path}: the file is an object with {len(lists)} lists ({lists}), a list of rows "
                f"or an object with exactly one list is needed, each row like {ROW_SHAPE}"
            )
        document = document[lists[0]]
    if not isinstance(document, list):
        raise DataError(
            f"{path}: the file is a JSON {type(document).__name__}, a list of rows is needed, each "
            f"like {ROW_SHAPE}"
        )
    for index, row in enumerate(document):
        if not isinstance(row, dict):
            raise DataError(
                f"{path} row {index}: it is a JSON {type(row).__name__}, an object like "
                f"{ROW_SHAPE} is needed"
            )
    return document, None


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a text file that must be read as a whole, without byte order mark.

    A compressed one is unpacked.

    Raises:
        DataError: it holds another kind of data than its name says, or is too large for that.
        OSError: it cannot be read.
    """
    with open_content(path) as file:
        content = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(content) > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{path}: a {content_ending(path)} file of more than {MAX_DOCUMENT_BYTES / 2**30:.1f} "
            "GiB would have to be held in memory at once; write one JSON object per line into a "
            ".jsonl file, which is read line by line"
        )
    _refuse_other_kinds(content, str(path))
    return content.removeprefix(codecs.BOM_UTF8)


def _refuse_other_kinds(beginning: bytes, name: str) -> None:
    for magic, kind in _MAGIC.items():
        if beginning.startswith(magic):
            named = content_ending(Path(name)) or "as JSON lines"
            raise DataError(
                f"{name}: the file is named {named} but holds "
                f"{kind} data; unpack it, or give it the ending that belongs to it"
            )


def _parse(content: bytes, where: str, *, cut_off: bool = False, whole_file: bool = False) -> Any:
    """Parse one JSON value; `cut_off`: no newline follows, so it may be half a line."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = f":{content.count(10, 0, error.start) + 1}" if whole_file else ""
        raise DataError(
            f"{where}{line}: byte {error.start + 1} of the {'file' if whole_file else 'line'} "
            f"(0x{content[error.start]:02x}) is not UTF-8; save the file as UTF-8"
        ) from error
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise DataError(_broken(error, where, cut_off, whole_file)) from error
    except _DuplicateKey as error:
        raise DataError(
            f"{where}: the key {error} occurs twice in one object, so one value would be lost; "
            "remove one of them"
        ) from error
    except RecursionError as error:
        raise DataError(_too_deep(where)) from error
    except ValueError as error:  # Python's limit on the digits of a whole number
        raise DataError(f"{where}: a number is too long ({error}); write it as a string") from error
    if text.count("[") + text.count("{") > MAX_NESTING:
        _check_nesting(value, where, MAX_NESTING + 2 * whole_file)
    if _SURROGATE.search(text):
        _check_surrogates(value, where)
    return value


def _too_deep(where: str) -> str:
    return f"{where}: the JSON is nested deeper than {MAX_NESTING} levels; flatten it"


def _check_nesting(value: Any, where: str, levels: int) -> None:
    """Refuse deep nesting, without recursion here, since later code walks the value with it."""
    level = [value]
    for _ in range(levels):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if any(isinstance(value, list | dict) for value in level):
        raise DataError(_too_deep(where))


def _broken(error: json.JSONDecodeError, where: str, cut_off: bool, whole_file: bool) -> str:
    if whole_file:
        return (
            f"{where}:{error.lineno}: broken JSON ({error.msg} at column {error.colno}); correct "
            "the file (rows one per line belong in a .jsonl file)"
        )
    if error.msg == "Extra data":
        return (
            f"{where}: a second value begins at column {error.colno}, one object per line is "
            "needed; put each object on a line of its own"
        )
    if error.pos < len(error.doc) and error.doc[error.pos] == "\0":
        return (
            f"{where}: a NUL byte stands at column {error.colno}; the file is damaged or no text: "
            "write it again, or remove the line"
        )
    if cut_off:
        return (
            f"{where}: the file ends in the middle of a record ({error.msg} at column "
            f"{error.colno}); it was cut off: copy or write it again, or remove its last line"
        )
    return (
        f"{where}: broken JSON ({error.msg} at column {error.colno}); one complete object per line "
        "is needed, control characters inside strings written as \\n or \\u0000; correct or remove "
        "the line (a file that is one JSON document needs the ending .json)"
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(repr(key))
            seen.add(key)
    return value


def _check_surrogates(value: Any, where: str) -> None:
    """Refuse half of a surrogate pair: it is valid JSON but no text that could be tokenized."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise DataError(
            f"{where}: a string holds \\u{code:04x}, half of a surrogate pair, which is no "
            "character; write the character itself, or remove the escape"
        ) from error
