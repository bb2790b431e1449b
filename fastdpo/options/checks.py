"""How an option is declared, with its bounds, and the one loop that checks them all.

Every message names the flag, the value that arrived, what is needed and what to do.
"""

import json
import math
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, field, fields
from functools import partial
from types import MappingProxyType, NoneType
from typing import Any, ClassVar, get_args

Check = Callable[[str, Any], None]
"""Takes the name and the value of an option, and raises ValueError where the value is wrong."""


def option(default: Any, help: str, *, check: Check | None = None, **metadata: Any) -> Any:
    """Declare a field of a dataclass that inherits `Options`.

    Args:
        default: its value if nothing is given; a list is copied for every instance.
        help: what the option is, in which unit, and why the default is what it is.
        check: bounds of the value, as `whole` and `number` make them.
        metadata: `choices`, which are checked too, and `aliases` for the command line.

    Returns:
        The dataclass field.
    """
    if "choices" in metadata:
        check = partial(check_choice, choices=metadata["choices"])
    metadata = {"help": help, "check": check, **metadata}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Options:
    """Base of the dataclasses of options: their values are checked as their fields declare it.

    A `__post_init__` of a dataclass normalizes its values, calls `super().__post_init__()`, which
    checks each value by itself, and then checks how values go together. None passes where the
    type of the field allows it.

    Attributes:
        checks: by name, the check of every option that has one and if None passes it; those of
            base classes are included.
    """

    checks: ClassVar[dict[str, tuple[Check, bool]]] = {}

    def __init_subclass__(cls) -> None:
        """Collect the checks, and leave in each field's metadata what argparse understands."""
        cls.checks = dict(ChainMap(*(vars(base).get("checks", {}) for base in cls.__mro__)))
        for name, entry in vars(cls).items():
            if not isinstance(entry, Field):
                continue
            metadata = dict(entry.metadata)
            if check := metadata.pop("check", None):
                cls.checks[name] = check, NoneType in get_args(cls.__annotations__[name])
            entry.metadata = MappingProxyType(metadata)

    def __post_init__(self) -> None:
        for name, (check, may_be_none) in self.checks.items():
            value = getattr(self, name)
            if not (value is None and may_be_none):
                check(name, value)
        for entry in fields(self):  # pyrefly: ignore[bad-argument-type]
            check_finite(entry.name, getattr(self, entry.name))


def whole(at_least: int, remedy: str, *, or_zero: bool = False) -> Check:
    """A check for whole numbers of at least `at_least`, and for 0 where that has a meaning."""

    def check(name: str, value: Any) -> None:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if is_whole and (value >= at_least or (or_zero and value == 0)):
            return
        raise ValueError(
            f"--{name} is {value!r}; it must be a whole number, {at_least} or more: {remedy}."
        )

    return check


def number(
    remedy: str,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> Check:
    """A check for finite numbers within the bounds (`above` and `below` are excluded)."""
    bounds = (("above", above), ("of at least", at_least), ("below", below), ("at most", at_most))
    needed = " and ".join(f"{words} {bound}" for words, bound in bounds if math.isfinite(bound))

    def check(name: str, value: Any) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # Infinite bounds bound nothing, since the value is finite.
        within = is_number and above < value < below and at_least <= value <= at_most
        if within and math.isfinite(value):
            return
        raise ValueError(
            f"--{name} is {value!r}; it must be {f'a finite number {needed}'.strip()}. {remedy}"
        )

    return check


def check_finite(name: str, value: Any) -> None:
    """Refuse infinity and NaN, inside lists and dicts too: no option has a meaning for them."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"--{name} is {value!r}; it must be a finite number: give one, or leave it out."
        )
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        for item in value:
            check_finite(name, item)


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"--{name} is {value!r}; it must be one of {', '.join(choices)}.")


def check_printable(name: str, value: Any) -> None:
    """Refuse a file name with a newline, a NUL or another character that cannot be printed."""
    if any(not character.isprintable() for character in str(value)):
        raise ValueError(
            f"--{name} is {str(value)!r}, which has a character that cannot be printed; give a "
            "plain name."
        )


def as_dict(name: str, value: Any) -> dict[str, Any] | None:
    """Read a dict that is given as one or as JSON text; None stays None."""
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
    check_keys(name, value or {})
    return value


def check_keys(name: str, value: Mapping[Any, Any]) -> None:
    """Refuse a mapping of arguments whose keys are no text, as bare 1, yes and on are in YAML."""
    for key in value:
        if not isinstance(key, str):
            raise ValueError(
                f"--{name} has the key {key!r}, which is no text; its keys are names of "
                "arguments: quote it, or correct it."
            )


def as_names(value: str | list[str] | None) -> list[str] | None:
    """Split names that are given with commas between them; None stays None."""
    if value is None:
        return None
    words = [value] if isinstance(value, str) else value
    return [name.strip() for word in words for name in str(word).split(",") if name.strip()]
