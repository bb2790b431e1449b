"""Recognizing by its first row what the columns of a set are, and reading every row by that.

A column plays a role; which names are known for a role stands in `COLUMN_NAMES` of
`fastdpo.options.data`, and the user's `columns` come before them. A text column named `prompt` is
ready-made text, as in TRL; a `question`, `instruction` or `input` is a user's turn, so that its row
becomes a conversation for the chat template, and so does a `prompt` beside a `system` column. A row
that does not yet hold two sides is first made into one that does by a form of `fastdpo.data.forms`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fastdpo.data.errors import ROW_SHAPE, DataError
from fastdpo.data.forms import find_form
from fastdpo.data.messages import (
    ASSISTANT,
    history_turns,
    is_answer,
    is_transcript,
    question_of,
    split_transcripts,
    with_answer_start,
    with_system,
)
from fastdpo.data.normalize import PreferenceRow, preference_row
from fastdpo.data.ranked import (
    RATED_ALIKE,
    NoPreference,
    is_rated_row,
    pairs_of_rated,
    rated_columns,
)
from fastdpo.data.scores import score_columns, score_margin
from fastdpo.data.shapes import as_mapping, listed, unknown_shape
from fastdpo.data.unread import COMPANIONS, refuse_unread_companions, refuse_unread_prompt
from fastdpo.data.values import messages_of, refuse_quoted_messages
from fastdpo.options.data import COLUMN_NAMES, NO_COLUMN

_SIDES = ("chosen", "rejected")
MEDIA = ("image", "images", "pixel_values", "video", "videos", "audio", "audios")
_OPTIONAL = ("system", "tools", "chat_template_kwargs", "input", "history", "answer_start")


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
        row = as_mapping(first)
        given = dict(columns or {})
        self._none = {r for r, c in given.items() if c == NO_COLUMN and NO_COLUMN not in row}
        self._given = {role: name for role, name in given.items() if role not in self._none}
        self._mode = rated_pairs
        self._first_keys: Any = None
        self._conversational: bool | None = None
        sides = {"chosen", "rejected", "completions"} & self._given.keys()
        named = all(self._known(side, row) for side in _SIDES)
        self._form = None if sides or named else find_form(row)
        made = self._made(row)[0][0]
        self.columns = self._recognize(made)
        for column in self.columns.values():
            refuse_quoted_messages(made.get(column), f"column {column!r}")
        self._add_prompt = self._prompt_builder(made)
        self.name = (
            self._name(made) if row is first else "tuples of prompt, preferred, dispreferred"
        )
        self._scores = score_columns(row)
        made_of = self._form.columns if self._form else ()
        self.read_columns = (
            *made_of,
            *(name for name in self.columns.values() if name in row and name not in made_of),
        )
        self.ignored = tuple(name for name in row if name not in self.read_columns)

    @property
    def wanted(self) -> list[str] | None:
        """The names of the columns that must be kept for `read`; None where all must be."""
        if not self._has_prompt_column:
            return None  # a column that is left unread may hold the prompt
        return [*dict.fromkeys([*self.read_columns, *self._scores, *MEDIA, *COMPANIONS])]

    @property
    def _has_prompt_column(self) -> bool:
        return not {"prompt", "question", "conversations"}.isdisjoint(self.columns)

    @property
    def joins_rows(self) -> bool:
        """True where each row has one rated completion, and those of a prompt follow each other."""
        return self.name == _RATED_ROWS

    def describe(self) -> str:
        """Say in one sentence which shape was recognized, by which columns; what is not read."""
        made_of = self._form.columns if self._form else ()
        taken = [
            role if role == self.columns[role] else f"{self.columns[role]} as {role}"
            for role in COLUMN_NAMES
            if self.columns.get(role) in self.read_columns and self.columns[role] not in made_of
        ]
        kind = ", rendered by the chat template" if self._conversational else ""
        kind = ", rendered as ready-made text" if self._conversational is False else kind
        aside = f"; not read: {', '.join(map(str, self.ignored))}" if self.ignored else ""
        return f"read as {self.name}{kind}, from the columns {', '.join([*made_of, *taken])}{aside}"

    def read(self, row: Any) -> list[PreferenceRow]:
        """Return the preferences of one row: one, or as many as its rated completions make.

        Returns:
            At least one, or a `NoPreference` with the reason.

        Raises:
            DataError: the row is malformed, or of another shape than the first one.
        """
        row = as_mapping(row)
        if self._first_keys is None or self.joins_rows:
            self._first_keys = row.keys()
        elif row.keys() != self._first_keys:
            self._check_same_shape(row)
        for name in MEDIA:
            if row.get(name) not in (None, [], ""):
                raise DataError(
                    f"column {name!r} holds images, video or audio, and only text can be trained "
                    "on; pass a set without it, or remove the column if the text stands alone"
                )
        rows, reason = self._made(row)
        margin = score_margin(row, self._scores)
        preferences = [
            self._preference(each, chosen, rejected, row, margin)
            for each in rows
            for chosen, rejected in self._completions(each)
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
        if reason is not None or not preferences:
            return NoPreference(reason or RATED_ALIKE)
        return preferences

    def _made(self, row: Mapping[str, Any]) -> tuple[list[Any], str | None]:
        """Return the rows that hold two sides each, by the form if there is one."""
        if self._form is None:
            return [row], None
        absent = [name for name in self._form.columns if name not in row]
        if absent:
            raise DataError(
                f"field {absent[0]!r} is missing (the row has {listed(row)}), and the first row "
                f"was read as {self._form.form.name}; correct the row or remove it"
            )
        return self._form.make(row)

    # Which column is what

    def _recognize(self, row: Mapping[str, Any]) -> dict[str, str]:
        missing = [column for column in self._given.values() if column not in row]
        if missing:
            raise DataError(
                f"--columns names {', '.join(map(repr, missing))}, and the row has "
                f"{listed(row)}; correct the name"
            )
        roles: dict[str, str] = {}

        def find(role: str) -> bool:
            name = self._column(role, row)
            if name is not None:
                roles[role] = name
            return name is not None

        both = (find("chosen"), find("rejected"))
        if not any(both) and not find("completions"):
            if isinstance(row.get("output"), list | tuple):
                roles["completions"] = "output"
            elif rated := rated_columns(row, self._given.get("ratings")):
                roles["completions"], roles["ratings"] = rated
            else:
                raise DataError(unknown_shape(row))
        elif any(both) and not all(both):
            missing = "rejected" if both[0] else "chosen"
            raise DataError(
                f"field {missing!r} is missing (the row has {listed(row)}); a preference row "
                f"looks like {ROW_SHAPE}, with strings or lists of messages; say which column is "
                f"what with --columns {missing}=NAME, or pass a data set of preference pairs"
            )
        if "completions" in roles and "ratings" not in roles:
            find("ratings")
            find("ranks")
            if "ratings" not in roles and isinstance(row[roles["completions"]], str):
                roles |= dict(
                    zip(("completions", "ratings"), rated_columns(row) or (), strict=False)
                )
        if not find("prompt"):
            self._find_turns(row, roles, find)
        for role in ("system", "tools", "chat_template_kwargs", "answer_start"):
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
                f"(the row has {listed(row)}); say which, as in --columns "
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
        known = self._known(role, row)
        if role in known and role in _SIDES:
            return role
        if len(known) > 1:
            raise DataError(
                f"the columns {' and '.join(map(repr, known))} could both be the {role} (the row "
                f"has {listed(row)}); say which, as in --columns {role}={known[0]}"
            )
        return known[0] if known else None

    def _known(self, role: str, row: Mapping[str, Any]) -> list[str]:
        """Return the columns of a row that have a known name of a role and that nobody named."""
        if role in self._none:
            return []
        taken = self._given.values()
        return [
            name
            for name in COLUMN_NAMES[role]
            if name in row
            and name not in taken
            and (name != "context" or not isinstance(messages_of(row[name]), str | None))
        ]

    def _check_same_shape(self, row: Mapping[str, Any]) -> None:
        """Refuse a row whose columns differ from the first row's in more than optional roles."""
        other = self._recognize(self._made(row)[0][0])
        first_required, required = (
            {role: name for role, name in roles.items() if role not in _OPTIONAL}
            for roles in (self.columns, other)
        )
        if required != first_required:
            raise DataError(
                f"the row is of another shape: its columns are {listed(row)}, and the first row's "
                f"were {', '.join(map(repr, self._first_keys))}; put rows of one shape into one "
                "file"
            )
        for role in _OPTIONAL:
            if role in other:
                self.columns.setdefault(role, other[role])
                self.read_columns = (*dict.fromkeys([*self.read_columns, other[role]]),)

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

    def _preference(
        self,
        row: Mapping[str, Any],
        chosen: Any,
        rejected: Any,
        raw: Mapping[str, Any],
        score_margin: float | None,
    ) -> PreferenceRow:
        """Make a preference of a row that holds two sides; `raw` is what the set has for it."""
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
        self._refuse_unread(raw, preference)
        if "answer_start" in self.columns:
            preference = with_answer_start(preference, row.get(self.columns["answer_start"]))
        if "system" in self.columns:
            preference = with_system(preference, row.get(self.columns["system"]))
        return replace(preference, score_margin=score_margin)

    def _refuse_unread(self, row: Mapping[str, Any], preference: PreferenceRow) -> None:
        if self._has_prompt_column:
            if {"input", "history"}.isdisjoint(self._none):
                refuse_unread_companions(row, self.read_columns, preference.prompt)
        elif "prompt" not in self._none:
            exact = preference.is_conversational or self._add_prompt == self._split_transcripts
            refuse_unread_prompt(row, self.read_columns, preference, exact=exact)

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
        return self._leave_out

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

    def _leave_out(self, _: Mapping[str, Any], fields: dict[str, Any]) -> None:
        """Leave the prompt to what both sides share; completions that share none have none."""
        if "completions" in self.columns and isinstance(fields["chosen"], str):
            fields["prompt"] = ""

    def _name(self, row: Mapping[str, Any]) -> str:
        roles = self.columns
        if self._form is not None:
            return self._form.form.name
        if "completions" in roles:
            if is_rated_row(row, roles):
                return _RATED_ROWS
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
_RATED_ROWS = "rated completions, one in each row, a prompt's rows one after another (HelpSteer2)"
