"""The one argument parser: dataclasses and YAML to options, for the commands and for TRL's scripts.

It is transformers' `HfArgumentParser`, which writes an option for every field of a dataclass, with
`--no_x` for every flag, `none` for numbers that may be absent, and advice on unknown names.
"""

import argparse
import inspect
import logging
import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from fastdpo.cli.yaml_file import load_yaml_config
from fastdpo.options.checks import check_keys
from fastdpo.options.removed import RENAMED_VALUES, present_value, suggest_option

logger = logging.getLogger(__name__)

_NOT_GIVEN = object()  # no string: argparse converts string defaults


class TrlParser(HfArgumentParser):
    """A parser of dataclasses that also reads them from `--config file.yaml`; TRL's interface.

    The command line overrides the file, and the file the defaults. A mapping `env:` in the file
    sets environment variables. Unknown names are answered with advice.

    Args:
        dataclass_types: one dataclass or several.
        kwargs: for `argparse.ArgumentParser`.

    Attributes:
        hints: the type of every option, by name.
        aliases: short spelling -> name, without dashes.
        config_file: the YAML file of the last `read`, or None.
    """

    config_file: str | None = None

    def __init__(self, dataclass_types: Any = None, **kwargs: Any) -> None:
        if dataclass_types is None:
            dataclass_types = []
        kinds = [dataclass_types] if isinstance(dataclass_types, type) else list(dataclass_types)
        super().__init__(kinds, **kwargs)
        self.hints: dict[str, Any] = {}
        self.aliases: dict[str, str] = {}
        for kind in kinds:
            hints = get_type_hints(kind)
            for entry in fields(kind):
                if entry.name == "config":
                    raise ValueError(
                        f"{kind.__name__} has a field named config, which is the parser's own: "
                        "rename it."
                    )
                self.hints[entry.name] = hints[entry.name]
                for alias in entry.metadata.get("aliases", ()):
                    self.aliases[alias.lstrip("-")] = entry.name
        self._adjust_actions()
        self._add_missing_negations()

    def _adjust_actions(self) -> None:
        for action in self._actions:
            if action.nargs == 0 and action.const is False:  # a --no_x of HfArgumentParser
                action.help = f"Turn --{action.dest} off."
                action.default = argparse.SUPPRESS
            elif action.nargs is None and _accepts(self.hints.get(action.dest), bool):
                action.nargs, action.const = "?", True  # a flag whose default is decided later
            elif action.dest in RENAMED_VALUES:
                action.type = partial(present_value, action.dest)
            elif action.type in (int, float) and _accepts(self.hints[action.dest], NoneType):
                action.type = _or_none(action.type)

    def _add_missing_negations(self) -> None:
        """Add `--no_x` for every flag: HfArgumentParser has it only where the default is True."""
        for name, hint in self.hints.items():
            if hint in (bool, bool | None) and f"--no_{name}" not in self._option_string_actions:
                self.add_argument(
                    f"--no_{name}",
                    f"--no-{name.replace('_', '-')}",
                    action="store_false",
                    dest=name,
                    default=argparse.SUPPRESS,
                    help=argparse.SUPPRESS,
                )

    # What the commands use

    def hide(self, names: Collection[str]) -> None:
        """Leave options out of the help."""
        for action in self._actions:
            if action.dest in names:
                action.help = argparse.SUPPRESS

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """Return the values that the command line and its YAML file set, by name.

        The parser has an option `--config`. Defaults are not among the values, and `format_help`
        does not show them after this call.

        Raises:
            ValueError: an unknown name, or a wrong value; the text says where.
            OSError: the file cannot be read.
        """
        self.set_defaults(**dict.fromkeys(self.hints, _NOT_GIVEN))
        self._refuse_repeated(argv)
        explicit, rest = self._explicit(argv)
        if rest:
            raise ValueError(self._advice(rest))
        path = self.config_file = explicit.pop("config")
        return {**(self._read_file(Path(path)) if path else {}), **explicit}

    def _refuse_repeated(self, argv: Sequence[str]) -> None:
        """Raise ValueError for an option that is given twice: argparse would drop the first."""
        given: dict[str, str] = {}
        for word in argv:
            spelling = word.split("=")[0]
            action = self._option_string_actions.get(spelling)
            if action is None and spelling != "--config":
                continue
            name = "config" if action is None else action.dest
            if name in given:
                both = spelling if given[name] == spelling else f"{given[name]} and {spelling}"
                several = action is not None and action.nargs == "+"
                remedy = "write all values behind one" if several else "keep one"
                raise ValueError(f"{both}: the same option is given twice; {remedy}.")
            given[name] = spelling

    def _explicit(self, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        try:
            namespace, rest = self.parse_known_args(list(argv))
        except argparse.ArgumentError as error:
            raise ValueError(str(error)) from None
        known = {*self.hints, "config"}
        values = {n: v for n, v in vars(namespace).items() if n in known and v is not _NOT_GIVEN}
        return values, rest

    def _read_file(self, path: Path) -> dict[str, Any]:
        """Return the options of a YAML file, converted and checked like the command line's."""
        values: dict[str, Any] = {}
        for key, value in load_yaml_config(path).items():
            name = str(key).replace("-", "_")
            name = self.aliases.get(name, name)
            if name not in self.hints:
                raise ValueError(
                    f"{path}: unknown key {key}; {suggest_option(name, self._names())}"
                )
            if name in values:
                raise ValueError(f"{path}: {name} is set twice; keep one")
            try:
                values[name] = self._convert(name, value)
            except ValueError as error:
                raise ValueError(f"{path}: {key}: {value!r} is wrong: {error}") from None
        return values

    def _convert(self, name: str, value: Any) -> Any:
        """Return a YAML value as the option's type; text is read as on the command line (1e-5)."""
        hint = self.hints[name]
        kind = next((k for k in (bool, list, dict, NoneType) if isinstance(value, k)), None)
        if kind is None:
            return self._explicit([f"--{name}={value}"])[0][name]
        if not _accepts(hint, kind):
            needed = " or ".join(_type_name(member) for member in _types_of(hint))
            quote = (
                "; YAML reads a bare on, off, yes or no as one: quote it" if kind is bool else ""
            )
            raise ValueError(f"it needs {needed}, not {_type_name(kind)}{quote}")
        if kind is dict:
            check_keys(name, value)
        if kind is list and hint in (list[str], list[str] | None):
            return [item if isinstance(item, str) else str(item) for item in value]
        return value

    # TRL's interface

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """Parse the command line and the file that its `--config` names.

        Args:
            args: the arguments; by default the process's.
            return_remaining_strings: also return what no dataclass knows, the file's first.
            fail_with_unknown_args: refuse unknown keys of the file; else they are logged.
            separate_remaining_strings: return the file's and the command line's apart.

        Returns:
            One instance for each dataclass, then the remaining strings if requested.

        Raises:
            ValueError: an unknown name, or a wrong value.
        """
        words = sys.argv[1:] if args is None else list(args)
        self._refuse_repeated(words)
        path, words = _take_config(words)
        remaining: list[str] = []
        if path is not None:
            values = load_yaml_config(Path(path))
            _set_environment(values.pop("env", None) or {}, path)
            remaining = self.set_defaults_with_config(**{str(key): values[key] for key in values})
            unknown = [self._advice([word]) for word in remaining[::2]]
            if unknown and not return_remaining_strings:
                if fail_with_unknown_args:
                    raise ValueError(f"{path}: {'; '.join(unknown)}")
                logger.warning("%s: not used: %s", path, "; ".join(unknown))
        *parsed, rest = self.parse_args_into_dataclasses(words, return_remaining_strings=True)
        if return_remaining_strings:
            apart = [remaining, rest] if separate_remaining_strings else [remaining + rest]
            return (*parsed, *apart)
        if rest:
            raise ValueError(self._advice(rest))
        return tuple(parsed)

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Make values the defaults of the options of these names, subcommands' included.

        Returns:
            The values that belong to no option, as `--name`, `value`, ...
        """
        used: set[str] = set()
        for parser in self._with_subparsers():
            for action in parser._actions:
                if action.dest in kwargs:
                    action.default, action.required = kwargs[action.dest], False
                    used.add(action.dest)
        return [w for n, v in kwargs.items() if n not in used for w in (f"--{n}", str(v))]

    def _with_subparsers(self) -> Sequence[argparse.ArgumentParser]:
        parsers: list[argparse.ArgumentParser] = [self]
        for parser in parsers:
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    parsers += action.choices.values()
        return parsers

    # Unknown names

    def _names(self) -> Iterable[str]:
        known = {action.dest for parser in self._with_subparsers() for action in parser._actions}
        return [*self.hints, *self.aliases, *sorted(known - {*self.hints}), "config"]

    def _advice(self, rest: Sequence[str]) -> str:
        """Say what to do about words of the command line that nothing takes."""
        unknown = next((word for word in rest if word.startswith("--")), None)
        if unknown is None:
            return f"{rest[0]!r} stands alone; name the option it belongs to, as in --model NAME"
        name = unknown.removeprefix("--").split("=")[0].replace("-", "_")
        return f"unknown option --{name}; {suggest_option(name, self._names(), '--')}"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each option, the kind of its value, and a default only where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if any(action.default is absent for absent in (None, False, argparse.SUPPRESS)):
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if "-" not in name[2:]]
        if action.choices is not None:
            value = " {" + ",".join(map(str, action.choices)) + "}"
        elif action.nargs in (0, "?"):
            value = ""
        else:
            value = " " + getattr(action.type, "__name__", "str").upper().replace("STRING_TO_", "")
        return ", ".join(names) + value + (" ..." if action.nargs == "+" else "")


def _take_config(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the file that `--config` names, and the arguments without the two."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        namespace, rest = parser.parse_known_args(words)
    except argparse.ArgumentError:
        raise ValueError("--config stands alone; name the YAML file after it.") from None
    return namespace.config, rest


def _set_environment(values: Any, path: str) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: env holds {values!r}; write variables as NAME: value below it.")
    os.environ.update({str(name): str(value) for name, value in values.items()})


def _types_of(hint: Any) -> list[type]:
    """The plain classes that a type hint allows: `list[str] | None` gives list and NoneType."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [get_origin(member) or member for member in members]
    return [kind for kind in kinds if inspect.isclass(kind)]


def _type_name(kind: type) -> str:
    return "nothing" if kind is NoneType else f"a {kind.__name__}"


def _accepts(hint: Any, kind: type) -> bool:
    return kind in _types_of(hint)


def _or_none(number: type[int] | type[float]) -> Any:
    """A converter that also reads `none`, for options whose value may be absent."""

    def convert(text: str) -> int | float | None:
        return None if text.lower() in ("none", "null") else number(text)

    convert.__name__ = number.__name__
    return convert
