"""The regular expressions in an adapter's config, tried before PEFT runs them.

Where `target_modules` and its like are one text, it is a pattern that PEFT matches with the name of
every module. A pattern can take longer than anybody waits, and whoever wrote the adapter chose it.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fastdpo.system.limits import TooSlowError, cpu_seconds

MOST_SECONDS = 10.0
"""CPU seconds for the patterns of one adapter; usual ones take milliseconds."""

_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")
_KEYED = ("rank_pattern", "alpha_pattern")


def check_patterns(config: Mapping[str, Any], modules: Collection[str], adapter: str) -> None:
    """Match every pattern of an adapter's config with the names of a model's modules.

    Args:
        config: the content of adapter_config.json, or a PeftConfig's `to_dict()`.
        modules: names of the model's modules.
        adapter: its folder, for messages.

    Raises:
        ValueError: a text is no regular expression, or takes too long.
    """
    try:
        with cpu_seconds(MOST_SECONDS):
            for name, pattern in _patterns(config):
                _match(name, pattern, modules, adapter)
    except TooSlowError as error:
        raise ValueError(
            f"the adapter in {adapter} has patterns in adapter_config.json that cannot be matched "
            f"with {len(modules)} names of modules ({error}): write target_modules as a list of "
            "names."
        ) from error


def _match(name: str, pattern: str, modules: Collection[str], adapter: str) -> None:
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"the adapter in {adapter} has {pattern!r:.60} as {name} in adapter_config.json, which "
            f"is no regular expression ({error}): correct it, or write a list of names."
        ) from error
    for module in modules:
        compiled.fullmatch(module)


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every text of the config that PEFT takes for a pattern, with the name of its field."""
    for name in _PATTERNS:
        if isinstance(value := config.get(name), str):
            yield name, value
    for name in _KEYED:
        if isinstance(value := config.get(name), Mapping):
            for key in value:
                yield name, rf"(.*\.)?({key})"
