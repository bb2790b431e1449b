"""Reading the value of a column in the dress that its file gave it.

A Parquet file or `datasets` fills what an object lacks with nulls, so that all rows have the same
keys, and may store a list of objects as an object of lists; a CSV file holds numbers and messages
as text. What is read here is the same whichever reader a row came through.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from fastdpo.data.errors import DataError

_MESSAGES = re.compile(r"""\[?\s*\{\s*['"](role|from|content|value)['"]\s*:""")

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(
        ("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool"
    ),
}
"""The name of a role in public sets -> its name in chat templates (`developer`: see `arrival`)."""


def kind_of(value: Any) -> str:
    """Say in words what arrived: the type and the beginning of the value."""
    if value is None:
        return "null"
    names = {str: "a string", bool: "a boolean", list: "a list", dict: "an object"}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"a number ({value!r})"
    text = repr(value)
    shown = text if len(text) <= 40 else text[:37] + "..."
    return f"{names.get(type(value), f'of type {type(value).__name__}')} ({shown})"


def plain_value(value: Any) -> Any:
    """Copy nested objects and lists as each reader of a set would give them.

    Keys whose value is null are left out, since a table fills absent ones so (nulls in lists stay),
    and a whole number is an int, since a table makes floats of ints that stand beside null or 0.5.
    """
    if isinstance(value, Mapping):
        items = ((key, plain_value(item)) for key, item in value.items())
        return {key: item for key, item in items if item is not None}
    if not isinstance(value, str) and hasattr(value, "tolist"):  # of numpy, out of a frame
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value


def as_objects(value: Any) -> Any:
    """Turn an object of equally long lists into the list of objects that was stored so."""
    if not isinstance(value, Mapping) or not value:
        return value
    columns = {key: items for key, items in value.items() if items is not None}
    lengths = {len(items) if isinstance(items, list) else -1 for items in columns.values()}
    if len(lengths) != 1 or -1 in lengths:
        return value
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def is_quoted_messages(value: Any) -> bool:
    """True for a text that begins as messages do when they are written as JSON or by Python."""
    return isinstance(value, str) and _MESSAGES.match(value.lstrip()) is not None


def messages_of(value: Any) -> Any:
    """Turn messages that are stored as JSON text, or as an object of lists, into their list.

    Anything else is returned as it is, a text of messages that is no JSON too.
    """
    if is_quoted_messages(value):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    if isinstance(value, Mapping) and isinstance(value.get("role", value.get("from")), list):
        return as_objects(value)
    return value


def refuse_quoted_messages(value: Any, what: str) -> None:
    """Refuse messages that became text which is no JSON: their brackets would be trained.

    Raises:
        DataError: its text begins with `what`, as in "column 'chosen'".
    """
    if is_quoted_messages(value) and isinstance(messages_of(value), str):
        raise DataError(
            f"{what} holds messages that were turned into text ({value[:40]!r}), which is no JSON; "
            "write the set as JSON lines or Parquet, which keep them"
        )


def is_message(value: Any) -> bool:
    """True for an object with a role, or with the speaker and the text of ShareGPT."""
    return isinstance(value, Mapping) and (
        "role" in value or ("from" in value and "value" in value)
    )


def message_role(message: Any) -> str:
    """Return the role of a message by the name that chat templates know, or "" without one."""
    if not isinstance(message, Mapping):
        return ""
    role = message.get("role") or message.get("from")
    return ROLES.get(role.lower(), role) if isinstance(role, str) else ""


def number_of(value: Any, name: str) -> float | None:
    """Return a number, which may be written as text (CSV has nothing else); None for null.

    Raises:
        DataError: it is no number; the text begins with `name`, as in "column 'winner'".
    """
    if value is None or value == "":
        return None
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    if isinstance(number, bool) or not isinstance(number, int | float) or math.isnan(number):
        raise DataError(f"{name} is {value!r:.60}; a number or null is needed")
    return number
