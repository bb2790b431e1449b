"""Rows that are stored column by column: a dict of lists, or what pandas writes as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastdpo.data.errors import DataError
from fastdpo.data.values import is_message

_TEXT_COLUMNS = ("prompt", "question", "instruction", "chosen", "rejected")


def rows_of_columns(columns: Any, name: str) -> list[dict[str, Any]] | None:
    """Return the rows of an object of columns, or None where it is none.

    Known are an object of equally long lists, pandas' {"column": {"0": value, ...}}, and its
    "split" form with the keys columns and data. A row whose values are lists of messages is no
    object of columns, and neither are the splits of a data set, each a list of rows.

    Args:
        columns: what may be such an object.
        name: for messages.

    Raises:
        DataError: it is one, and its columns are of different lengths.
    """
    if not isinstance(columns, Mapping) or not columns:
        return None
    if {"columns", "data"} <= columns.keys() <= {"columns", "data", "index"}:
        names = list(columns["columns"])
        return [dict(zip(names, row, strict=True)) for row in columns["data"]]
    lists = {str(key): values for key, value in columns.items() if (values := _listed(value))}
    if len(lists) < len(columns) or not _are_columns(lists):
        return None
    lengths = {key: len(value) for key, value in lists.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            f"{name}: its columns are of different lengths ({lengths}); each needs one value for "
            "every row"
        )
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _listed(value: Any) -> Sequence[Any] | None:
    """Return the values of a column, or None where it is none."""
    if isinstance(value, Mapping) and value and [*value] == [str(n) for n in range(len(value))]:
        return list(value.values())
    if isinstance(value, list | tuple):
        return value
    if not isinstance(value, str | Mapping) and hasattr(value, "tolist"):
        return value.tolist()
    return None


def _are_columns(lists: Mapping[str, Sequence[Any]]) -> bool:
    """True where lists are columns, False where they are messages of one row, or splits of rows."""
    kinds = {name: type(values[0]) for name, values in lists.items()}
    if any(is_message(values[0]) for values in lists.values()):
        return list in kinds.values() or any(kinds.get(name) is str for name in _TEXT_COLUMNS)
    return not all(issubclass(kind, Mapping | tuple) for kind in kinds.values())
