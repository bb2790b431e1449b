"""How an option is declared, and the checks that name its flag, its value and what to do."""

import json
import math
from collections.abc import Collection
from dataclasses import field
from typing import Any


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its help text, and `choices` or `aliases` for the command line."""
    return field(default=default, metadata={"help": help, **metadata})


def check_printable(name: str, value: Any) -> None:
    """Refuse a file name with a newline, a NUL or the like."""
    if any(not character.isprintable() for character in str(value)):
        raise ValueError(
            f"--{name} is {str(value)!r}, which has a character that cannot be printed; give a "
            "plain name."
        )


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse what is none of the choices."""
    if value not in choices:
        raise ValueError(f"--{name} is {value!r}; it must be one of {', '.join(choices)}.")


def check_whole(name: str, value: Any, least: int, remedy: str) -> None:
    """Refuse what is not a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"--{name} is {value!r}; it must be a whole number, {least} or more: {remedy}."
        )


def check_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
    remedy: str,
) -> None:
    """Refuse what is not a finite number within the bounds (`above` and `below` are excluded)."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    # Infinite bounds bound nothing: value is finite.
    if number and above < value < below and at_least <= value <= at_most:
        return
    bounds = (("above", above), ("of at least", at_least), ("below", below), ("at most", at_most))
    needed = " and ".join(f"{words} {bound}" for words, bound in bounds if math.isfinite(bound))
    raise ValueError(
        f"--{name} is {value!r}; it must be {f'a finite number {needed}'.strip()}. {remedy}"
    )


def as_dict(name: str, value: Any) -> dict[str, Any] | None:
    """A dict given as such or as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--{name} is {value!r}, which is not JSON ({error}); write it as "
                """'{"key": "value"}'."""
            ) from None
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"--{name} is {value!r}; it must be a dict, or JSON text of one.")
    return value
