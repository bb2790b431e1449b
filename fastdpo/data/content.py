"""The identity of prepared pairs: rows, tokenizer, template and options, as JSON writes them."""

import hashlib
import json
from dataclasses import fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdpo.data.mixture import MixedRows
from fastdpo.data.reading import Rows
from fastdpo.data.template_date import asks_for_date, today
from fastdpo.options import TokenizationOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
"""The number is raised whenever equal rows and options come to give other pairs or reports."""

VERSIONS = ("tokenizers", "transformers", "jinja2")
NOT_OF_PAIRS = ("dataset_num_proc", "data_cache", "template_date")
"""The options that change no pair, and the date, which counts for templates that write it."""


def preparation_identity(
    rows: Rows,
    tokenizer: "PreTrainedTokenizerBase",
    options: TokenizationOptions,
    vocabulary_size: int | None,
) -> dict[str, Any] | None:
    """Everything that the pairs and their report are a function of.

    Returns:
        None where a part of it cannot be known by its content: rows that come as a stream or out
        of a transform, a tokenizer with Python code of its own.
    """
    content, tokenizer_hash = rows_identity(rows), tokenizer_identity(tokenizer)
    if content is None or tokenizer_hash is None:
        return None
    template = tokenizer.chat_template
    dated = asks_for_date(template if isinstance(template, str) else json.dumps(template))
    return {
        "format": FORMAT,
        "rows": content,
        "tokenizer": tokenizer_hash,
        "chat_template": template,
        "template_date": (options.template_date or today()) if dated else None,
        "options": {
            each.name: getattr(options, each.name)
            for each in fields(TokenizationOptions)
            if each.name not in NOT_OF_PAIRS
        },
        "vocabulary_size": vocabulary_size,
        "versions": {name: version(name) for name in VERSIONS},
    }


def rows_identity(rows: Rows) -> Any:
    """The rows' content, places and reading; None where they cannot be read twice the same."""
    if isinstance(rows, MixedRows):
        parts = [rows_identity(part) for part in rows.parts]
        return None if None in parts else parts
    content = _content_hash(rows.rows)
    if content is None:
        return None
    return {
        "source": rows.source,
        "content": content,
        "lines": _numbers_hash(rows.line_numbers),
        "numbers": _numbers_hash(rows.row_numbers),
        "columns": dict(rows.columns),
        "rated_pairs": rows.rated_pairs,
    }


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """A hash of all that decides ids; None for a tokenizer whose code or content is not known."""
    if not type(tokenizer).__module__.startswith("transformers.") or not tokenizer.is_fast:
        return None
    try:
        text = tokenizer.backend_tokenizer.to_str()
    except Exception:  # a part of it is written in Python
        return None
    # What stands before it, truncation and padding, is set anew by every call.
    content = text[max(0, text.find('"added_tokens"')) :]
    beside = {
        "class": type(tokenizer).__qualname__,
        "special_tokens": tokenizer.special_tokens_map,
        "ids": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", None),
    }
    text = json.dumps(beside, sort_keys=True, default=str)
    return hashlib.sha256(f"{text}\n{content}".encode()).hexdigest()


def _content_hash(rows: Any) -> str | None:
    if hasattr(rows, "content_hash"):
        return rows.content_hash
    if hasattr(rows, "column_names"):
        return _table_hash(rows) if hasattr(rows, "__len__") else None
    if not isinstance(rows, list | tuple):
        return None
    digest = hashlib.sha256()
    for row in rows:
        if isinstance(row, dict) and not all(isinstance(name, str) for name in row):
            return None  # JSON would write another key
        try:
            written = f"{type(row).__name__} {json.dumps(row)}\n"
        except (TypeError, ValueError, RecursionError):  # what JSON does not have
            return None
        digest.update(written.encode())
    return digest.hexdigest()


def _table_hash(table: Any) -> str | None:
    """A hash of a `datasets.Dataset`'s Arrow columns, and of which of their rows it takes."""
    import pyarrow

    class Sink:
        closed = False

        def write(self, piece: Any) -> int:
            digest.update(piece)
            return len(piece)

        def flush(self) -> None: ...

        def close(self) -> None: ...

        def writable(self) -> bool:
            return True

        def seekable(self) -> bool:
            return False

        def readable(self) -> bool:
            return False

    digest = hashlib.sha256()
    parts = [table.data.table]
    if (indices := getattr(table, "_indices", None)) is not None:
        parts.append(indices.table)
    for part in parts:
        plain = part.replace_schema_metadata(None)
        with pyarrow.ipc.new_stream(pyarrow.PythonFile(Sink(), mode="w"), plain.schema) as stream:
            stream.write_table(plain, max_chunksize=65_536)
    return digest.hexdigest()


def _numbers_hash(numbers: Any) -> str | None:
    if numbers is None:
        return None
    return hashlib.sha256(np.asarray(numbers, dtype="<i8").tobytes()).hexdigest()
