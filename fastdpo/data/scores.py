"""Scores that a set keeps beside its two sides, and whether they agree with which is chosen."""

import re
from collections.abc import Mapping
from typing import Any

from fastdpo.data.errors import DataError
from fastdpo.data.values import number_of

OPPOSED_SHARE = 0.5

_SCORE = re.compile(r"(^|[_-])(score|rating|reward|avg_rating)s?([_-]|$)")


def score_columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the columns of the score of chosen and of rejected, by their names; () without.

    They are called alike but for the side, as `score_chosen` and `score_rejected` are.
    """
    for name in row:
        if not isinstance(name, str) or "chosen" not in name or not _SCORE.search(name.lower()):
            continue
        other = name.replace("chosen", "rejected")
        if other in row:
            return name, other
    return ()


def score_margin(row: Mapping[str, Any], columns: tuple[str, ...]) -> float | None:
    """Return the score of chosen less that of rejected, or None where they are no numbers."""
    if not columns:
        return None
    try:
        chosen, rejected = (number_of(row.get(name), name) for name in columns)
    except DataError:
        return None
    return None if chosen is None or rejected is None else chosen - rejected


def opposed_scores(margins: int, opposed: int) -> list[str]:
    """Return a warning where most rows that score both sides score the rejected one higher.

    Args:
        margins: preferences with a score for both sides.
        opposed: those of them whose rejected side has the higher score.
    """
    if not margins or opposed <= OPPOSED_SHARE * margins:
        return []
    rows = "every row" if opposed == margins else f"{opposed / margins:.0%} of the rows"
    return [
        f"warning: in {rows} that scores both sides ({opposed:,} of {margins:,}) the score of the "
        "rejected one is the higher: the sides may be swapped (--columns chosen=... rejected=... "
        "names them), or the scores are of another kind, such as ranks"
    ]
