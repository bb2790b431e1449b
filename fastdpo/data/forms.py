"""The forms of public preference sets that are not yet a prompt, a chosen and a rejected side.

A set may hold two answers and a verdict, a conversation and a worse ending, or summaries and the
number of the better one. `FORMS` has one entry for each such form: its name for the log, the
columns that show it, and the function that makes of a row the columns `chosen` and `rejected`
(and a prompt where the form has its own). `fastdpo.data.columns` reads the result by the names in
`COLUMN_NAMES`, which is all that a form needs whose columns are merely called otherwise.

The next form is an entry here, and its row in `tests/data/test_forms.py`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastdpo.data.errors import DataError
from fastdpo.data.values import as_objects, message_role, messages_of, number_of

Columns = Mapping[str, Any]

TIE = "a tie: neither answer is preferred"
NO_VERDICT = "nothing says which answer is preferred"

_TIES = ("tie", "both", "both_bad", "bothbad", "both_good", "tie_bothbad", "neither", "equal")
_ANSWERS = (
    "response", "answer", "completion", "conversation", "output", "generation", "human_ref",
    "candidate", "reply", "summary", "option",
)  # fmt: skip
_SCORES = ("score", "reward", "rating")


class Made(NamedTuple):
    """The rows of known columns that one row of a form becomes.

    Attributes:
        rows: each with `chosen` and `rejected`; beside a reason in the order in which they stood.
        reason: why no side is preferred, or None.
    """

    rows: list[dict[str, Any]]
    reason: str | None = None


class Two(NamedTuple):
    """Stands for two columns of one name that end with 0 and 1, 1 and 2, or a and b."""

    names: tuple[str, ...]


class Form(NamedTuple):
    """One form of preference sets.

    Attributes:
        name: the form in words, after "read as".
        columns: what shows the form: names that a row must have, a tuple of names of which it has
            one, or `Two` columns.
        make: gets the row and the names of those columns, and returns what they are made into.
    """

    name: str
    columns: tuple[str | tuple[str, ...] | Two, ...]
    make: Callable[..., Made]


class FoundForm(NamedTuple):
    """A form, and the columns of a set that play its parts."""

    form: Form
    columns: tuple[str, ...]

    def make(self, row: Columns) -> Made:
        """Return the row with its other columns kept and those of the form made into the sides.

        Raises:
            DataError: the columns hold something that the form has no reading for.
        """
        made = self.form.make(row, *self.columns)
        rest = {name: value for name, value in row.items() if name not in self.columns}
        return Made([{**rest, **sides} for sides in made.rows], made.reason)


def find_form(row: Columns) -> FoundForm | None:
    """Return the first form of `FORMS` whose columns a row has, or None."""
    for form in FORMS:
        names: list[str] = []
        for wanted in form.columns:
            if isinstance(wanted, Two):
                found = _two_columns(row, wanted.names)
            else:
                known = (wanted,) if isinstance(wanted, str) else wanted
                found = tuple(name for name in known if name in row)[:1]
            if not found:
                break
            names += found
        else:
            return FoundForm(form, tuple(names))
    return None


def _two_columns(row: Columns, names: Sequence[str]) -> tuple[str, ...]:
    """Return the two columns of one of the names, in the order of their endings; () without."""
    for name in names:
        ends = {
            match[1].lower(): column
            for column in row
            if isinstance(column, str)
            and (match := re.fullmatch(rf"{name}[_-]?(\d|[a-z])", column, re.IGNORECASE))
        }
        for first, second in (("0", "1"), ("1", "2"), ("a", "b")):
            if ends.keys() == {first, second}:
                return ends[first], ends[second]
    return ()


def _number(row: Columns, column: str) -> float | None:
    return number_of(row[column], f"column {column!r}")


# Two answers and a verdict


def _by_name(row: Columns, first: str, second: str, verdict: str) -> Made:
    """Read a verdict that names the better answer: by its ending, its column, or its model."""
    value = row[verdict]
    if value is None:
        return _ordered(row, first, second, None, NO_VERDICT)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    word = re.sub(r"[\s()_-]+", "_", str(value).strip().lower()).strip("_")
    if word in _TIES:
        return _ordered(row, first, second, None)
    for better, column in enumerate((first, second)):
        end = column[-1].lower()
        if word in (end, column.lower(), f"model_{end}", f"assistant_{end}"):
            return _ordered(row, first, second, better)
    raise DataError(
        f"column {verdict!r} is {value!r:.60}, which names neither {first!r} nor {second!r}; "
        f"it needs their ending ({first[-1]} or {second[-1]}), model_a or model_b, or a tie "
        f"({', '.join(_TIES)})"
    )


def _by_strength(row: Columns, first: str, second: str, verdict: str) -> Made:
    """Read a number that is negative where the first answer is better, and 0 for a tie."""
    strength = _number(row, verdict)
    if not strength:
        return _ordered(row, first, second, None, NO_VERDICT if strength is None else TIE)
    return _ordered(row, first, second, 0 if strength < 0 else 1)


def _by_label(row: Columns, first: str, second: str, verdict: str) -> Made:
    """Read a label that is 1 where the first answer is better and 0 where the second is."""
    label = _number(row, verdict)
    if label not in (0, 1, None):
        raise DataError(f"column {verdict!r} is {row[verdict]!r:.60}; 1, 0 or null is needed")
    reason = NO_VERDICT if label is None else TIE
    return _ordered(row, first, second, None if label is None else 1 - int(label), reason)


def _by_flags(row: Columns, first: str, second: str, one: str, other: str) -> Made:
    """Read two flags, of which that of the better answer is set."""
    flags = [
        int(row[name]) if isinstance(row[name], bool) else _number(row, name)
        for name in (one, other)
    ]
    if None in flags or flags[0] == flags[1]:
        return _ordered(row, first, second, None, NO_VERDICT if None in flags else TIE)
    return _ordered(row, first, second, 0 if flags[0] else 1)


def _by_scores(row: Columns, first: str, second: str, one: str, other: str) -> Made:
    """Read a score for each answer, the higher the better."""
    scores = [_number(row, name) for name in (one, other)]
    if scores[0] is None or scores[1] is None:
        return _ordered(row, first, second, None, NO_VERDICT)
    if scores[0] == scores[1]:
        return _ordered(row, first, second, None)
    return _ordered(row, first, second, 0 if scores[0] > scores[1] else 1)


def _of_a_post(row: Columns, history: str, first: str, second: str, verdict: str) -> Made:
    """Read two replies to a post, which is a user's turn, with a label (SHP)."""
    made = _by_label(row, first, second, verdict)
    return Made([sides | {"question": row[history]} for sides in made.rows], made.reason)


def _ordered(row: Columns, first: str, second: str, better: int | None, reason: str = TIE) -> Made:
    """Make the better of two answers the chosen one; None of them is: the reason says why."""
    sides = [row[column] for column in (first, second)]
    made: dict[str, Any] = {}
    by_turn = [_texts(text) for text in (row.get("prompt"), *sides)]
    if all(by_turn):
        made["prompt"] = [{"role": "user", "content": by_turn[0][0]}]
        sides = [_turns(by_turn[0], answers) for answers in by_turn[1:]]
    question = row.get("question")
    if isinstance(question, Mapping) and "full_text" in question:  # WebGPT
        made["question"] = question["full_text"]
    chosen, rejected = sides[::-1] if better == 1 else sides
    made |= {"chosen": chosen, "rejected": rejected}
    return Made([made], reason if better is None else None)


def _texts(value: Any) -> list[str]:
    """Return the texts of a list, or of its JSON, one for each turn; [] where it is none."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return []
    if not isinstance(value, list) or not all(isinstance(t, str | None) for t in value):
        return []
    return [text or "" for text in value]


def _turns(prompts: Sequence[str], answers: Sequence[str]) -> list[dict[str, Any]]:
    """Make the turns after the first question of questions and answers that take turns."""
    turns: list[dict[str, Any]] = []
    for prompt, answer in zip(prompts, answers, strict=False):
        turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return turns[1:]


# A conversation and another end for it


def _worse_ending(row: Columns, messages: str, worse: str) -> Made:
    """Read messages that end with the better answer, and the worse one or ones (ms-swift)."""
    turns, other = messages_of(row[messages]), messages_of(row[worse])
    if not isinstance(turns, list) or not turns or message_role(turns[-1]) != "assistant":
        raise DataError(
            f"{messages!r} does not end with an assistant's message, which would be the chosen "
            f"answer beside {worse!r}; add it, or name the prompt with --columns "
            f"conversations={messages} and both answers with chosen= and rejected="
        )
    if isinstance(other, list) and other and isinstance(other[0], Mapping):
        if message_role(other[0]) != "assistant":
            return Made([{"chosen": turns, "rejected": other}])
        answers: list[Any] = [other]
    else:
        answers = other if isinstance(other, list) else [other]
    if not answers:
        raise DataError(f"{worse!r} is an empty list, a rejected answer is needed")
    start = len(turns) - 1
    if isinstance(answers[0], list):  # several turns against several
        while start and message_role(turns[start - 1]) != "user":
            start -= 1
    sides = {"prompt": turns[:start], "chosen": turns[start:]}
    return Made(
        [
            sides | {"rejected": [{"role": "assistant", "content": a}] if isinstance(a, str) else a}
            for a in answers
        ]
    )


def _worse_answer(row: Columns, answer: str, worse: str) -> Made:
    """Read an answer beside a rejected one, or several (ms-swift)."""
    others = row[worse] if isinstance(row[worse], list) else [row[worse]]
    return Made([{"chosen": row[answer], "rejected": other} for other in others])


def _outputs(row: Columns, asked: str, preferred: str, other: str) -> Made:
    """Read the input and the two outputs of OpenAI's preference fine-tuning."""
    given = row[asked]
    made: dict[str, Any] = {"chosen": row[preferred], "rejected": row[other]}
    if isinstance(given, Mapping) and "messages" in given:
        made["prompt"] = given["messages"]
        if given.get("tools"):
            made["tools"] = given["tools"]
        return Made([made])
    made["prompt" if isinstance(given, list) else "question"] = given
    return Made([made])


# Summaries


def _summaries(row: Columns, info: str, summaries: str, choice: str) -> Made:
    """Read two summaries of a post or an article and the place of the better one."""
    source, both = row[info], as_objects(row[summaries])
    if not isinstance(source, Mapping) or not isinstance(both, list) or len(both) != 2:
        raise DataError(
            f"{info!r} must be an object and {summaries!r} a list of two summaries beside "
            f"{choice!r}; this row has {source!r:.40} and {both!r:.40}"
        )
    texts = [each.get("text") if isinstance(each, Mapping) else each for each in both]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{summaries!r} holds {both!r:.60}; objects with a text are needed")
    texts = [text if text[:1].isspace() else f" {text}" for text in map(str, texts)]
    post = source.get("post") or source.get("article")
    if not isinstance(post, str):
        raise DataError(f"{info!r} has neither a 'post' nor an 'article' ({source!r:.60})")
    heads = {"subreddit": "SUBREDDIT: r/", "title": "TITLE: "}
    parts = [f"{head}{source[name]}" for name, head in heads.items() if source.get(name)]
    prompt = "\n\n".join([*parts, f"{'POST' if source.get('post') else 'ARTICLE'}: {post}"])
    place = _number(row, choice)
    if place not in (0, 1, None):
        raise DataError(f"column {choice!r} is {row[choice]!r:.60}; 0, 1 or null is needed")
    chosen, rejected = texts[::-1] if place == 1 else texts
    sides = {"prompt": f"{prompt}\n\nTL;DR:", "chosen": chosen, "rejected": rejected}
    return Made([sides], NO_VERDICT if place is None else None)


FORMS = (
    Form(
        "input with a preferred and a non-preferred output (OpenAI)",
        ("input", ("preferred_output",), ("non_preferred_output", "nonpreferred_output")),
        _outputs,
    ),
    Form(
        "messages that end with the chosen answer beside a rejected one (ms-swift)",
        (("messages", "conversations"), ("rejected_messages", "rejected_response")),
        _worse_ending,
    ),
    Form(
        "a response beside a rejected one (ms-swift)",
        ("response", "rejected_response"),
        _worse_answer,
    ),
    Form(
        "two summaries and the place of the better one (summarize from feedback)",
        ("info", "summaries", "choice"),
        _summaries,
    ),
    Form(
        "a post with two replies and a label, 1 where the first is better (SHP)",
        ("history", Two(_ANSWERS), "labels"),
        _of_a_post,
    ),
    Form(
        "two answers and a label, 1 where the first is better",
        (Two(_ANSWERS), "labels"),
        _by_label,
    ),
    Form(
        "two answers and the name of the better one (PKU-SafeRLHF, arena)",
        (Two(_ANSWERS), ("better_response_id", "winner", "better_response", "preferred_response",
                         "better", "preference", "preferred", "choice")),
        _by_name,
    ),
    Form(
        "two answers and a strength of preference, negative where the first is better (HelpSteer)",
        (Two(_ANSWERS), ("overall_preference", "preference_strength")),
        _by_strength,
    ),
    Form(
        "two answers and a flag at the better one (arena)",
        (Two(_ANSWERS), Two(("winner_model", "winner"))),
        _by_flags,
    ),
    Form(
        "two answers with a score each (WebGPT)",
        (Two(_ANSWERS), Two(_SCORES)),
        _by_scores,
    ),
)  # fmt: skip
"""Every form that takes a function, in the order in which they are tried."""
