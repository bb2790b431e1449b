"""The shape of a row in words: which columns it has, and which shapes are recognized."""

from collections.abc import Mapping
from typing import Any

from fastdpo.data.errors import ROW_SHAPE, DataError
from fastdpo.data.forms import FORMS

RECOGNIZED = (
    "prompt, chosen, rejected (text or messages; the prompt may be left out where both begin with "
    "it); question or instruction (+ input, history, system), chosen, rejected; conversations, "
    "chosen, rejected (ShareGPT); other names of the sides, such as chosen_response and "
    "rejected_response, preferred and dispreferred, accepted and rejected; completions with "
    f"ratings or ranks; {'; '.join(form.name for form in FORMS)}"
)


def as_mapping(row: Any) -> Mapping[str, Any]:
    """Return a row as a mapping of column to value; a tuple is (prompt, preferred, dispreferred).

    Raises:
        DataError: it is neither.
    """
    if isinstance(row, Mapping):
        return row
    if isinstance(row, list | tuple) and len(row) == 3:
        return dict(zip(("prompt", "chosen", "rejected"), row, strict=True))
    raise DataError(
        f"the row is a {type(row).__name__} ({row!r:.40}); an object like {ROW_SHAPE} is needed, "
        "or a tuple (prompt, preferred, dispreferred)"
    )


def listed(row: Mapping[str, Any]) -> str:
    """Return the names of a row's columns, for messages."""
    return ", ".join(map(repr, row)) or "no fields"


def unknown_shape(row: Mapping[str, Any]) -> str:
    """Say that a row has no two sides to compare, what it seems to be, and what is recognized."""
    kind = ""
    if "completion" in row and "label" in row:
        kind = "these are single completions with a label (KTO), DPO needs two to compare; "
    elif "messages" in row or "text" in row:
        kind = "these are texts without a worse one beside them (SFT), DPO needs two to compare; "
    return (
        f"field 'chosen' is missing: the row has {listed(row)}; {kind}recognised are: "
        f"{RECOGNIZED}; say which column is what, as in --columns prompt=question chosen=good "
        "rejected=bad"
    )
