"""Columns that are not read although they could belong to the prompt: an error that names them.

A set whose prompt stands in a column of another name would train answers to nothing, or to the
letters that two answers happen to begin with. So a text that is left unread stops the run where no
prompt was found, and so does a known companion of the prompt (`context` and its like) beside one.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fastdpo.data.errors import DataError
from fastdpo.data.normalize import Messages, PreferenceRow
from fastdpo.data.values import is_message, messages_of

COMPANIONS = ("input", "context", "history", "passage", "document", "background")
"""Columns that go with a prompt; not read beside one they would be lost."""

_NOT_TEXT = re.compile(
    r"(.*[_-])?(id|ids|uid|uuid|hash|index|source|dataset|subset|split|model|models|type|types|"
    r"category|categories|domain|task|language|lang|license|url|link|date|time|timestamp|created|"
    r"author|name|tag|tags|topic|label|labels|status|difficulty|level|version|score|scores|rating|"
    r"ratings|rationale|reason|metadata|meta|info|chosen|rejected|answer|ground_truth|solution)"
    r"([_-].*)?",
    re.IGNORECASE,
)
"""Names of columns that say something about a row and hold no part of its prompt."""


def refuse_unread_prompt(
    row: Mapping[str, Any], read: Iterable[str], preference: PreferenceRow, *, exact: bool
) -> None:
    """Refuse a row in which no prompt was found and a text is left unread.

    Args:
        row: with all its columns.
        read: the columns that were read.
        preference: what was made of them, its prompt being what both sides share.
        exact: the shared part is known to be the prompt (conversations, transcripts); else it is
            what two strings happen to begin with.

    Raises:
        DataError: it names the columns, and what to pass.
    """
    missing = not preference.prompt or (
        isinstance(preference.prompt, list)
        and all(turn["role"] == "system" for turn in preference.prompt)
    )
    if not missing and exact:
        return
    texts = _text_of(preference.prompt) + _text_of(preference.chosen)
    unread = {
        name: value
        for name, value in row.items()
        if name not in read and _is_text(value) and not _is_in(value, texts)
    }
    likely = [name for name in unread if not _NOT_TEXT.fullmatch(str(name))]
    if not (unread if missing else likely):
        return
    name = [*likely, *unread][0]
    role = "conversations" if not isinstance(messages_of(unread[name]), str) else "prompt"
    other = (
        "" if role == "conversations" else f" (ready-made text) or question={name} (a user's turn)"
    )
    raise DataError(
        "there is no column named prompt, and chosen and rejected do not begin alike, so neither "
        f"do they hold it, while {', '.join(map(repr, unread))} would be left unread (the row has "
        f"{', '.join(map(repr, row))}); say which column is the prompt, as in --columns "
        f"{role}={name}{other}, or prompt=none if there is none"
        if missing
        else f"there is no column named prompt, and {', '.join(map(repr, likely))} would be left "
        f"unread, while the prompt would be the letters that both sides begin with "
        f"({preference.prompt!r:.40}); say which column is the prompt, as in --columns "
        f"{role}={name}{other}, or prompt=none if the sides hold it"
    )


def refuse_unread_companions(
    row: Mapping[str, Any], read: Iterable[str], prompt: str | Messages
) -> None:
    """Refuse a row with a column that goes with a prompt and is not read.

    Raises:
        DataError: it names the column, and what to pass.
    """
    for name in COMPANIONS:
        value = row.get(name)
        if name in read or not value or not (_is_text(value) or isinstance(value, list)):
            continue
        if _is_in(value, _text_of(prompt)):
            continue
        role = "history" if name == "history" else "input"
        if isinstance(prompt, str):
            remedy = (
                f"--columns question=NAME {role}={name}, where NAME is the column of the prompt, "
                "makes a user's turn of both"
            )
        else:
            remedy = f"--columns {role}={name} puts it below the question"
        raise DataError(
            f"column {name!r} goes with the prompt and is not read ({value!r:.40}); {remedy}, and "
            f"--columns {role}=none leaves it out"
        )


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    value = messages_of(value)
    return is_message(value) or (isinstance(value, list) and bool(value) and is_message(value[0]))


def _is_in(value: Any, text: str) -> bool:
    """True where the words of a value stand in the text already, as those of a copy do."""
    return _squeezed(_text_of(value)) in _squeezed(text)


def _text_of(value: Any) -> str:
    """Return the text of a string or of messages, one line for each."""
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value):
        return "\n".join(str(turn.get("content") or turn.get("value") or "") for turn in value)
    return str(value)


def _squeezed(text: str) -> str:
    return " ".join(text.split())
