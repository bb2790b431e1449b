r"""A strict reader of JSON and JSON lines: what it can't take at its word is an error with a line.

Lines end at the byte \n and nowhere else (U+2028 inside a string is content). A byte order mark,
\r\n and blank lines are accepted.
"""

import codecs
import json
import re
from pathlib import Path
from typing import Any

from fastdpo.data.errors import ROW_SHAPE, DataError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MAGIC = {b"\x1f\x8b": "gzip", b"PAR1": "Parquet", b"PK\x03\x04": "zip", b"ARROW1": "Arrow"}


class _DuplicateKey(ValueError):
    pass


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Read a file of one JSON object per line.

    Args:
        path: an existing file.

    Returns:
        The objects, and for each its line number, counted from 1 over all lines, blank ones too.

    Raises:
        DataError: a line is not exactly one JSON object in UTF-8; the text names file:line.
    """
    return parse_json_lines(read_bytes(path), str(path))


def parse_json_lines(content: bytes, name: str) -> tuple[list[dict[str, Any]], list[int]]:
    """`read_json_lines` on bytes; `name` stands for the file in messages."""
    lines = content.split(b"\n")
    rows, numbers = [], []
    for number, line in enumerate(lines, start=1):
        line = line.strip(b" \t\r")
        if not line:
            continue
        where = f"{name}:{number}"
        row = _parse(line, where, cut_off=number == len(lines))
        if not isinstance(row, dict):
            raise DataError(
                f"{where}: the line is a JSON {type(row).__name__}, one object per line is needed, "
                f"like {ROW_SHAPE}; if the file is one JSON document, give it the ending .json"
            )
        rows.append(row)
        numbers.append(number)
    return rows, numbers


def read_json(path: Path) -> tuple[list[dict[str, Any]], list[int] | None]:
    """Read a .json file: a list of rows, an object that holds one such list, or JSON lines.

    Args:
        path: an existing file.

    Returns:
        The rows; and their line numbers where the file turned out to be JSON lines, else None.

    Raises:
        DataError: it is none of these; the text names the place.
    """
    content = read_bytes(path)
    first_line = content.strip().split(b"\n", 1)[0].strip()
    if first_line.startswith(b"{") and first_line.endswith(b"}"):
        rows, numbers = parse_json_lines(content, str(path))
        if len(rows) > 1 or {"chosen", "rejected"} <= rows[0].keys():
            return rows, numbers
    document = _parse(content, str(path), whole_file=True)
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
    for place, row in enumerate(document):
        if not isinstance(row, dict):
            raise DataError(
                f"{path} row {place}: it is a JSON {type(row).__name__}, an object like "
                f"{ROW_SHAPE} is needed"
            )
    return document, None


def read_bytes(path: Path) -> bytes:
    """The bytes of a JSON file without a byte order mark; other kinds of file are refused."""
    content = path.read_bytes()
    for magic, kind in _MAGIC.items():
        if content.startswith(magic):
            raise DataError(
                f"{path}: the file is named {path.suffix} but holds {kind} data; unpack it, or "
                "give it the ending that belongs to it"
            )
    return content.removeprefix(codecs.BOM_UTF8)


def _parse(content: bytes, where: str, *, cut_off: bool = False, whole_file: bool = False) -> Any:
    """One JSON value from UTF-8 bytes; `cut_off`: no newline follows, so it may be half a line."""
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
        raise DataError(f"{where}: the JSON is nested too deeply; flatten it") from error
    if _SURROGATE.search(text):
        _check_surrogates(value, where)
    return value


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
    """Half of a surrogate pair is valid JSON but no text: no tokenizer can encode it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise DataError(
            f"{where}: a string holds \\u{code:04x}, half of a surrogate pair, which is no "
            "character; write the character itself, or remove the escape"
        ) from error
