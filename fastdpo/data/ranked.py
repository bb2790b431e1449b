"""Making pairs of several completions to one prompt that are rated or ranked."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastdpo.data.errors import DataError
from fastdpo.data.values import as_objects, number_of

RATED_ALIKE = "no two completions that are rated differently"
RATED_ALONE = "no other rated row of its prompt beside it"

_TEXTS = ("answer", "response", "completion", "text", "output", "generation")
_RATINGS = ("overall_score", "score", "rating", "reward", "helpfulness", "quality")
_RANKS = ("rank", "ranking")


class NoPreference(list[Any]):
    """The preferences of a row that has none.

    Attributes:
        reason: why, for the count; None for a row that was joined to the one before it.
    """

    def __init__(self, reason: str | None):
        super().__init__()
        self.reason = reason


def rated_columns(row: Mapping[str, Any], ratings: str | None = None) -> tuple[str, str] | None:
    """Return the columns of a row's only completion and its rating, or None where it has none."""
    texts = [name for name in _TEXTS if isinstance(row.get(name), str)]
    rated = (
        [ratings]
        if ratings
        else [
            name
            for name in _RATINGS
            if isinstance(row.get(name), int | float) and not isinstance(row.get(name), bool)
        ]
    )
    return (texts[0], rated[0]) if texts and rated else None


def is_rated_row(row: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    """True where a row holds one completion and its rating, so that several rows make a pair."""
    rating = row.get(columns.get("ratings", ""))
    number = isinstance(rating, int | float) and not isinstance(rating, bool)
    return number and isinstance(row.get(columns.get("completions", "")), str)


def join_rated(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the row of several completions that rows with one each make."""
    names = (columns["completions"], columns["ratings"])
    return {**rows[0], **{name: [row[name] for row in rows] for name in names}}


def check_rated(row: Any, columns: Mapping[str, str]) -> None:
    """Refuse a row that `join_rated` can't take.

    Raises:
        DataError: its completion or its rating is missing or of a wrong type.
    """
    for name in (columns["completions"], columns["ratings"]):
        if not isinstance(row, Mapping) or name not in row:
            raise DataError(f"field {name!r} is missing in {row!r:.60}; correct the row")
    number_of(row[columns["ratings"]], f"column {columns['ratings']!r}")
    if not isinstance(text := row[columns["completions"]], str):
        raise DataError(f"column {columns['completions']!r} is {text!r:.40}, a string is needed")


def prompt_key(row: Any, columns: Mapping[str, str]) -> str:
    """Return a text that is equal for rows of one prompt."""
    roles = ("prompt", "question", "conversations", "system", "input", "history")
    known = row if isinstance(row, Mapping) else {}
    return repr([known.get(columns.get(role, "")) for role in roles])


def pairs_of_rated(
    completions: Any, ratings: Any, ranks: Any, *, mode: str, rated_by_place: bool = False
) -> list[tuple[Any, Any]]:
    """Pair up the completions to one prompt: a list of (chosen, rejected).

    Args:
        completions: a list of strings or messages, or of objects that hold a text and a rating.
        ratings: a number for each, the higher the better; None where the objects hold it.
        ranks: likewise, the lower the better.
        mode: "best_worst" pairs the best with the worst, "all" every two that differ in rating.
        rated_by_place: there are two and the first is the better one.

    Returns:
        No pair where all are rated alike. A completion whose rating is null takes no part.

    Raises:
        DataError: no list, no ratings, or ratings that are no numbers or of another count.
    """
    completions = as_objects(completions)
    if not isinstance(completions, Sequence) or isinstance(completions, str):
        raise DataError(f"the completions are {completions!r:.60}, a list of them is needed")
    if rated_by_place:
        if len(completions) != 2:
            raise DataError(
                f"'output' holds {len(completions)} completions without ratings, two are needed, "
                "the better one first; add a column of ratings"
            )
        return [(completions[0], completions[1])]
    scores = _scores(completions, ratings, ranks)
    rated = [
        (score, _content(completion))
        for score, completion in zip(scores, completions, strict=True)
        if score is not None
    ]
    if mode == "all":
        return [(a, b) for high, a in rated for low, b in rated if high > low]
    if not rated:
        return []
    best, worst = max(rated, key=lambda r: r[0]), min(rated, key=lambda r: r[0])
    return [(best[1], worst[1])] if best[0] > worst[0] else []


def _scores(completions: Sequence[Any], ratings: Any, ranks: Any) -> list[float | None]:
    """Return a number for each completion, the higher the better; None for one without rating."""
    sign = 1 if ranks is None else -1
    values = ratings if ranks is None else ranks
    if values is None:
        key, sign = _rating_key(completions)
        values = [completion[key] for completion in completions]
    if (
        not isinstance(values, Sequence)
        or isinstance(values, str)
        or len(values) != len(completions)
    ):
        raise DataError(
            f"the ratings are {values!r:.60}; a list of {len(completions)} numbers is needed, one "
            "for each completion"
        )
    scores: list[float | None] = []
    for index, value in enumerate(values):
        number = number_of(value, f"rating {index}")
        scores.append(None if number is None else sign * number)
    return scores


def _rating_key(completions: Sequence[Any]) -> tuple[str, int]:
    """Return the key under which completions hold their rating, and -1 where it is a rank."""
    if completions and all(isinstance(each, Mapping) for each in completions):
        for key in (*_RATINGS, *_RANKS):
            if all(key in each for each in completions):
                return key, -1 if key in _RANKS else 1
    raise DataError(
        "there are several completions and nothing says which is the better: add a column ratings "
        "(or scores; ranks where 1 is the best), or make each completion an object with a text and "
        f"one of {', '.join((*_RATINGS, *_RANKS))}"
    )


def _content(completion: Any) -> Any:
    """Return the string or messages of a completion."""
    if not isinstance(completion, Mapping) or "content" in completion or "value" in completion:
        return completion
    for key in _TEXTS:
        if key in completion:
            return completion[key]
    raise DataError(
        f"a completion has the keys {', '.join(map(repr, completion))}, and its text is expected "
        f"under one of {', '.join((*_TEXTS, 'content'))}; rename one"
    )
