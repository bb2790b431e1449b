"""Recognizing by its first row what the columns of a set are, and reading every row by that.

A column plays a role; which names are known for a role stands in `COLUMN_NAMES` of
`fastdpo.options.data`, and the user's `columns` come before them. A text column named `prompt` is
ready-made text, as in TRL; a `question`, `instruction` or `input` is a user's turn, so that its row
becomes a conversation for the chat template, and so does a `prompt` beside a `system` column.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from fastdpo.data.errors import ROW_SHAPE, DataError
from fastdpo.data.messages import (
    ASSISTANT,
    history_turns,
    is_answer,
    is_transcript,
    question_of,
    split_transcripts,
    with_system,
)
from fastdpo.data.normalize import PreferenceRow, preference_row
from fastdpo.data.ranked import pairs_of_rated
from fastdpo.options.data import COLUMN_NAMES

_SIDES = ("chosen", "rejected")
MEDIA = ("image", "images", "pixel_values", "video", "videos", "audio", "audios")
RECOGNIZED = (
    "prompt, chosen, rejected (text or messages; the prompt may be left out where both begin with "
    "it); question or instruction (+ input, history, system), chosen, rejected; conversations, "
    "chosen, rejected (ShareGPT); chosen_response and rejected_response, or preferred and "
    "dispreferred; completions with ratings or ranks"
)


class SchemaReader:
    """Reads the rows of one set in the shape that its first row shows.

    Args:
        first: the set's first row.
        columns: role -> column, what the user said about them.
        rated_pairs: how several rated completions make pairs, "best_worst" or "all".

    Attributes:
        name: of the shape, in words.
        columns: role -> column, as recognised.
        ignored: the columns that are not read.

    Raises:
        DataError: the shape is unknown or ambiguous, or the row holds images or the like; the
            text lists the columns and what is recognised.
    """

    def __init__(
        self,
        first: Any,
        columns: Mapping[str, str] | None = None,
        rated_pairs: str = "best_worst",
    ):
        self._given = dict(columns or {})
        self._mode = rated_pairs
        self._first_keys: Any = None
        self._conversational: bool | None = None
        row = _as_mapping(first)
        self.columns = self._recognize(row)
        self._refuse_quoted_messages(row)
        self._add_prompt = self._prompt_builder(row)
        self.name = self._name(row) if row is first else "tuples of prompt, preferred, dispreferred"
        self.ignored = tuple(c for c in row if c not in self.columns.values())

    @property
    def wanted(self) -> list[str]:
        """The names of the columns that must be kept for `read`; the others can be left out."""
        return [*dict.fromkeys([*self.columns.values(), *MEDIA])]

    def describe(self) -> str:
        """Say in one sentence which shape was recognized, by which columns; what is not read."""
        taken = ", ".join(
            role if role == self.columns[role] else f"{self.columns[role]} as {role}"
            for role in COLUMN_NAMES
            if role in self.columns
        )
        kind = "by the chat template" if self._conversational else "as ready-made text"
        aside = f"; not read: {', '.join(self.ignored)}" if self.ignored else ""
        return f"read as {self.name}, rendered {kind}, from the columns {taken}{aside}"

    def read(self, row: Any) -> list[PreferenceRow]:
        """Return the preferences of one row: one, or as many as its rated completions make.

        Raises:
            DataError: the row is malformed, or of another shape than the first one.
        """
        row = _as_mapping(row)
        if self._first_keys is None:
            self._first_keys = row.keys()
        elif row.keys() != self._first_keys:
            self._check_same_shape(row)
        for name in MEDIA:
            if row.get(name) not in (None, [], ""):
                raise DataError(
                    f"column {name!r} holds images, video or audio, and only text can be trained "
                    "on; pass a set without it, or remove the column if the text stands alone"
                )
        preferences = [
            self._preference(row, chosen, rejected) for chosen, rejected in self._completions(row)
        ]
        for preference in preferences:
            if self._conversational is None:
                self._conversational = preference.is_conversational
            elif self._conversational != preference.is_conversational:
                kinds = ("ready-made text", "a conversation")
                raise DataError(
                    f"the row is {kinds[preference.is_conversational]}, and the rows before it are "
                    f"{kinds[self._conversational]}; put rows of one kind into one file"
                )
        return preferences

    # Which column is what

    def _recognize(self, row: Mapping[str, Any]) -> dict[str, str]:
        missing = [column for column in self._given.values() if column not in row]
        if missing:
            raise DataError(
                f"--columns names {', '.join(map(repr, missing))}, and the row has "
                f"{_listed(row)}; correct the name"
            )
        roles: dict[str, str] = {}

        def find(role: str) -> bool:
            name = self._column(role, row)
            if name is not None:
                roles[role] = name
            return name is not None

        both = (find("chosen"), find("rejected"))
        if not any(both) and not find("completions"):
            if not isinstance(row.get("output"), list | tuple):
                raise DataError(_unknown(row))
            roles["completions"] = "output"
        elif any(both) and not all(both):
            missing = "rejected" if both[0] else "chosen"
            raise DataError(
                f"field {missing!r} is missing (the row has {_listed(row)}); a preference row "
                f"looks like {ROW_SHAPE}, with strings or lists of messages; say which column is "
                f"what with --columns {missing}=NAME, or pass a data set of preference pairs"
            )
        if "completions" in roles:
            find("ratings")
            find("ranks")
        if not find("prompt"):
            self._find_turns(row, roles, find)
        for role in ("system", "tools", "chat_template_kwargs"):
            find(role)
        return roles

    def _find_turns(
        self, row: Mapping[str, Any], roles: dict[str, str], find: Callable[[str], bool]
    ) -> None:
        """Find the columns that make the prompt where none is called so; there may be none."""
        given = {"question", "conversations"} & self._given.keys()
        alone = is_answer(row.get(roles.get("chosen", "")))
        if given != {"question"} and (alone or given):
            find("conversations")
        if given != {"conversations"}:
            find("question")
        if {"question", "conversations"} <= roles.keys():
            raise DataError(
                f"both {roles['question']!r} and {roles['conversations']!r} could hold the prompt "
                f"(the row has {_listed(row)}); say which, as in --columns "
                f"question={roles['question']}"
            )
        if "question" in roles:
            find("input")
            find("history")
        elif "conversations" not in roles and (column := self._column("input", row)) is not None:
            roles["question"] = column

    def _column(self, role: str, row: Mapping[str, Any]) -> str | None:
        """Return the column that plays a role: the one the user named, or one of a known name."""
        if role in self._given:
            return self._given[role]
        taken = self._given.values()
        known = [name for name in COLUMN_NAMES[role] if name in row and name not in taken]
        if role in known and role in _SIDES:
            return role
        if len(known) > 1:
            raise DataError(
                f"the columns {' and '.join(map(repr, known))} could both be the {role} (the row "
                f"has {_listed(row)}); say which, as in --columns {role}={known[0]}"
            )
        return known[0] if known else None

    def _check_same_shape(self, row: Mapping[str, Any]) -> None:
        """Refuse a row whose columns differ from the first row's in more than optional roles."""
        other = self._recognize(row)
        optional = ("system", "tools", "chat_template_kwargs", "input", "history")
        first_required, required = (
            {role: name for role, name in roles.items() if role not in optional}
            for roles in (self.columns, other)
        )
        if required != first_required:
            raise DataError(
                f"the row is of another shape: its columns are {_listed(row)}, and the first row's "
                f"were {', '.join(map(repr, self._first_keys))}; put rows of one shape into one "
                "file"
            )
        for role in optional:
            if role in other:
                self.columns.setdefault(role, other[role])

    # From a row to preferences

    def _completions(self, row: Mapping[str, Any]) -> list[tuple[Any, Any]]:
        if "completions" not in self.columns:
            return [(_MISSING, _MISSING)]
        values = {
            role: row.get(self.columns.get(role, ""))
            for role in ("completions", "ratings", "ranks")
        }
        return pairs_of_rated(
            values["completions"],
            values["ratings"],
            values["ranks"],
            mode=self._mode,
            rated_by_place=self.columns["completions"] == "output" and values["ratings"] is None,
        )

    def _preference(self, row: Mapping[str, Any], chosen: Any, rejected: Any) -> PreferenceRow:
        fields = {
            role: row[column]
            for role, column in self.columns.items()
            if role in (*_SIDES, "tools", "chat_template_kwargs") and column in row
        }
        if chosen is not _MISSING:
            fields |= {"chosen": chosen, "rejected": rejected}
        self._add_prompt(row, fields)
        try:
            preference = preference_row(fields)
        except DataError as error:
            renamed = [
                f"{c!r} is read as {r!r}"
                for r, c in self.columns.items()
                if r != c and r in str(error)
            ]
            raise DataError("; ".join([str(error), *renamed])) from error
        if "system" in self.columns:
            return with_system(preference, row.get(self.columns["system"]))
        return preference

    def _prompt_builder(
        self, row: Mapping[str, Any]
    ) -> Callable[[Mapping[str, Any], dict[str, Any]], None]:
        """Return the method that puts the prompt of a row into the fields of its preference."""
        roles = self.columns
        if "prompt" in roles or "conversations" in roles:
            return self._copy_prompt
        if "question" in roles:
            return self._add_question
        if "chosen" in roles and all(is_transcript(row.get(roles[r])) for r in _SIDES):
            return self._split_transcripts
        self._check_implicit(row)
        return lambda row, fields: None

    def _copy_prompt(self, row: Mapping[str, Any], fields: dict[str, Any]) -> None:
        column = self.columns.get("prompt", self.columns.get("conversations", ""))
        fields["prompt"] = row[column]

    def _add_question(self, row: Mapping[str, Any], fields: dict[str, Any]) -> None:
        """Put the user's turn after the history; beside full conversations the question alone."""
        question = question_of(row, self.columns["question"], self.columns.get("input"))
        if isinstance(fields.get("chosen"), str | Mapping):
            turns = history_turns(row.get(self.columns.get("history", "")))
            fields["prompt"] = [*turns, {"role": "user", "content": question}]
        else:
            fields["prompt"] = question

    def _split_transcripts(self, _: Mapping[str, Any], fields: dict[str, Any]) -> None:
        parts = split_transcripts(fields.get("chosen"), fields.get("rejected"))
        fields.update(zip(("prompt", *_SIDES), parts, strict=True))

    def _check_implicit(self, row: Mapping[str, Any]) -> None:
        """Refuse an empty implicit prompt beside columns that could be the prompt."""
        chosen, rejected = (row.get(self.columns.get(role, "")) for role in _SIDES)
        if not isinstance(chosen, str) or not isinstance(rejected, str):
            return
        others = [
            name
            for name, value in row.items()
            if name not in self.columns.values() and isinstance(value, str)
        ]
        if others and chosen[:1] != rejected[:1]:
            raise DataError(
                "there is no column named prompt, and chosen and rejected do not begin alike, so "
                f"neither do they hold it (the row has {_listed(row)}); say which column is the "
                f"prompt, as in --columns prompt={others[0]}"
            )

    def _refuse_quoted_messages(self, row: Mapping[str, Any]) -> None:
        """Refuse messages that became text, as in a CSV file: their brackets would be trained."""
        for column in self.columns.values():
            value = row.get(column)
            if isinstance(value, str) and re.match(
                r"""\[\s*\{\s*['"](role|from|content)['"]""", value
            ):
                raise DataError(
                    f"column {column!r} holds messages that were turned into text "
                    f"({value[:40]!r}); write the set as JSON lines or Parquet, which keep them"
                )

    def _name(self, row: Mapping[str, Any]) -> str:
        roles = self.columns
        if "completions" in roles:
            return "rated completions" if roles["completions"] != "output" else "Alpaca ranking"
        if "conversations" in roles:
            return "ShareGPT ranking"
        if "question" in roles:
            alpaca = {"instruction", "chosen"} <= {*roles.values()}
            return "Alpaca ranking" if alpaca else "question and answers"
        messages = not isinstance(row.get(roles["chosen"]), str)
        if "prompt" in roles:
            if messages and isinstance(row[roles["prompt"]], str):
                return "a prompt beside conversations (UltraFeedback)"
            return "conversational" if messages or "system" in roles else "standard"
        if self._add_prompt == self._split_transcripts:
            return f"transcripts, prompt up to the last shared {ASSISTANT.strip()}"
        return f"{'conversational' if messages else 'standard'} with an implicit prompt"


_MISSING: Any = object()


def _as_mapping(row: Any) -> Mapping[str, Any]:
    if isinstance(row, Mapping):
        return row
    if isinstance(row, list | tuple) and len(row) == 3:
        return dict(zip(("prompt", "chosen", "rejected"), row, strict=True))
    raise DataError(
        f"the row is a {type(row).__name__} ({row!r:.40}); an object like {ROW_SHAPE} is needed, "
        "or a tuple (prompt, preferred, dispreferred)"
    )


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "no fields"


def _unknown(row: Mapping[str, Any]) -> str:
    kind = ""
    if "completion" in row and "label" in row:
        kind = "these are single completions with a label (KTO), DPO needs two to compare; "
    elif "messages" in row or "text" in row:
        kind = "these are texts without a worse one beside them (SFT), DPO needs two to compare; "
    return (
        f"field 'chosen' is missing: the row has {_listed(row)}; {kind}recognised are: "
        f"{RECOGNIZED}; say which column is what, as in --columns prompt=question chosen=good "
        "rejected=bad"
    )
