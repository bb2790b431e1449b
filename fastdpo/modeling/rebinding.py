"""Code of transformers in which a global name means something else; its modules stay untouched."""

from collections.abc import Mapping
from types import FunctionType
from typing import Any


def with_globals(function: FunctionType, changed: Mapping[str, Any]) -> FunctionType:
    """Copy a function, for whose code some global names mean something else."""
    names = {**function.__globals__, **changed}
    copied = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
