"""Bounds on what a fast tokenizer does to a text: it may not blow it up, and its patterns must end.

A normalizer is a list of replacements that comes with the tokenizer. Forty that each double a text
make a terabyte of a letter, inside a library that then ends the process; so they are read first.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastdpo.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_GROWTH = 1000.0
"""How many times longer a tokenizer's replacements may make a text; usual ones, three times."""


def check_growth(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a fast tokenizer whose replacements could make a text more than `MOST_GROWTH` longer.

    Raises:
        DataError: names the part of tokenizer.json.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for part in ("normalizer", "decoder"):
        stage = getattr(backend, part, None)
        try:
            declared = json.loads(stage.__getstate__()) if stage is not None else None
        except (AttributeError, TypeError, ValueError):  # a stage written in Python
            continue
        if (growth := _growth(declared)) > MOST_GROWTH:
            raise DataError(
                f"the {part} of the tokenizer (tokenizer.json) can make a text {growth:.3g} times "
                f"longer, more than {MOST_GROWTH:g} times: use the tokenizer of the model's "
                "original repository"
            )


def _growth(stage: Any) -> float:
    """The most that a stage and those inside it multiply a text's length by."""
    if isinstance(stage, list):
        product = 1.0
        for each in stage:
            product *= _growth(each)
        return product
    if not isinstance(stage, dict):
        return 1.0
    inner = [value for value in stage.values() if isinstance(value, list | dict)]
    product = _growth(inner)
    if stage.get("type") == "Replace":
        pattern, content = stage.get("pattern"), str(stage.get("content", ""))
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        # A regular expression may match nothing, between any two letters.
        product *= max(1.0, len(content) / len(literal) if literal else 1.0 + len(content))
    return product


@contextmanager
def explaining_panics() -> Iterator[None]:
    """Turn the panic of a tokenizer's pattern, which is no `Exception`, into a DataError.

    Raises:
        DataError: a pattern of the tokenizer gave up, as after too many steps on one word.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"the tokenizer's own code gives up on a text of the data ({error}): use the tokenizer "
            "of the model's original repository, or remove the row"
        ) from error
