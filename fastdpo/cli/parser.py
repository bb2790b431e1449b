"""Parsing for the commands: options, `--config file.yaml`, presets, help, and clean refusals.

Below everything lie the defaults of the dataclasses, then the command's presets, then the YAML
file, then the command line. TrainingArguments costs seconds to import, so it is touched only by
`--help_all` and when a training command is really parsed.
"""

import argparse
import dataclasses
import errno
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from transformers import HfArgumentParser

from fastdpo.cli.yaml_file import load_yaml_config
from fastdpo.options import DPO_OPTION_GROUPS, DataOptions, ModelOptions, TrainerDefaults, presets
from fastdpo.options.removed import suggest_option
from fastdpo.version import __version__

if TYPE_CHECKING:
    from fastdpo.config import DPOConfig

T = TypeVar("T")

EXIT_DIVERGED = 1
EXIT_BAD_OPTION = 2
EXIT_DOES_NOT_FIT = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
_REMEDIES = {
    errno.ENOENT: "check the path",
    errno.ENOSPC: "make room there, or name a folder on another disk",
    errno.EDQUOT: "make room there, or name a folder on another disk",
    errno.EROFS: "name a folder that can be written to",
    errno.EACCES: "name a folder that can be read and written to",
    errno.EISDIR: "name a file",
}
_NOT_GIVEN = object()  # no string: argparse converts string defaults


@dataclass(frozen=True)
class Parsed:
    """What a command was asked to do.

    Attributes:
        groups: one instance for each dataclass that was parsed, DPOConfig included.
        given: names of the options that the user set, on the command line or in the YAML file.
    """

    groups: Mapping[type, Any]
    given: frozenset[str]

    def group(self, kind: type[T]) -> T:
        """The instance of one of the dataclasses that were parsed."""
        return self.groups[kind]

    @property
    def model(self) -> ModelOptions:
        """Which model, and which of its weights move."""
        return self.group(ModelOptions)

    @property
    def data(self) -> DataOptions:
        """Which preference pairs."""
        return self.group(DataOptions)

    @property
    def training(self) -> "DPOConfig":
        """The training arguments; only where `parse` was called with `training=True`."""
        from fastdpo.config import DPOConfig

        return self.group(DPOConfig)


def parse(
    command: str,
    groups: Sequence[type],
    argv: Sequence[str],
    *,
    training: bool,
    description: str = "",
    hidden: Collection[str] = (),
) -> Parsed:
    """Parse the arguments of `python -m fastdpo.<command>`.

    Args:
        command: the command's name, as in `train`.
        groups: the dataclasses that hold the command's own options.
        argv: the arguments after the program's name.
        training: whether the command takes a DPOConfig with the presets below the user's values.
        description: one sentence above the help.
        hidden: options that are left out of the help, since the command refuses them.

    Returns:
        An instance of every group, of DPOConfig if `training`, and the names the user set.

    Raises:
        SystemExit: 0 after `--help`, `--help_all` or `--version`; 2 after one line on stderr
            about an option or value that is wrong.
    """
    if "--version" in argv:
        sys.stdout.write(f"fastdpo {__version__}\n")
        raise SystemExit(0)
    everything = {"--help_all", "--help-all"} & set(argv)
    brief = {"--help", "-h"} & set(argv) and not everything
    try:
        parser = _Parser(command, groups, training, description, inherited=not brief)
        parser.hide(hidden)
        if brief or everything:
            sys.stdout.write(parser.format_help())
            raise SystemExit(0)
        given = parser.read(argv)
        return Parsed(_build(groups, training, given), frozenset(given))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(_format_error(error).split())}\n")
        raise SystemExit(EXIT_BAD_OPTION) from None


def command(main: Callable[[Sequence[str]], None]) -> int:
    """Run a command's main on the process's arguments.

    Returns:
        The exit code: 0, 1 after a loss that is not finite, 2 after one line about bad input, a
        bad option or a disk that does not take what is written, 3 where the memory does not
        suffice, 130 after Ctrl-C, 143 after SIGTERM. With FASTDPO_DEBUG set, the traceback of bad
        input is shown too.
    """
    logger = logging.getLogger("fastdpo")
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # CPU kernels it would rather have
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of one library to another
            main(sys.argv[1:])
    except (ValueError, OSError) as error:
        if os.environ.get("FASTDPO_DEBUG"):
            raise
        sys.stderr.write(f"error: {_format_error(error)}\n")
        return EXIT_BAD_OPTION
    except FloatingPointError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_DIVERGED
    except MemoryError as error:
        sys.stderr.write(f"error: {error or 'out of memory'}\n")
        return EXIT_DOES_NOT_FIT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SystemExit as stop:
        if stop.code != EXIT_TERMINATED:
            raise
        return EXIT_TERMINATED
    finally:
        logger.removeHandler(handler)
    return 0


def _format_error(error: Exception) -> str:
    """What went wrong; of a file which one, and what to do."""
    if not isinstance(error, OSError) or error.strerror is None or error.filename is None:
        return str(error)
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{error.filename}: {error.strerror}" + (f"; {remedy}" if remedy else "")


def _build(groups: Sequence[type], training: bool, given: Mapping[str, Any]) -> dict[type, Any]:
    """An instance of each dataclass from the values that belong to it."""
    built = {kind: kind(**_fields_of(kind, given)) for kind in groups}
    if training:
        from fastdpo.config import DPOConfig

        built[DPOConfig] = DPOConfig(**_fields_of(DPOConfig, {**presets(given), **given}))
    return built


def _fields_of(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {entry.name for entry in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def _inherited_options(groups: Sequence[type]) -> type:
    """A dataclass of the DPOConfig options that the brief help does not show."""
    from fastdpo.config import DPOConfig

    shown = {
        e.name
        for kind in (*groups, *DPO_OPTION_GROUPS, TrainerDefaults)
        for e in dataclasses.fields(kind)
    }
    hints = get_type_hints(DPOConfig)
    rest = [e for e in dataclasses.fields(DPOConfig) if e.init and e.name not in shown]
    return dataclasses.make_dataclass(
        "InheritedOptions",
        [(entry.name, hints[entry.name], copy(entry)) for entry in rest],
        namespace={"_argument_group_name": "Training, inherited from transformers"},
    )


class _Parser(HfArgumentParser):
    """An argument parser that returns only what was given and raises instead of exiting."""

    def __init__(
        self,
        command: str,
        groups: Sequence[type],
        training: bool,
        description: str,
        *,
        inherited: bool,
    ) -> None:
        kinds = list(groups)
        if training:
            kinds += [*DPO_OPTION_GROUPS, TrainerDefaults]
            kinds += [_inherited_options(groups)] if inherited else []
        program = f"python -m fastdpo.{command}"
        super().__init__(
            kinds,
            prog=program,
            usage=f"{program} [--option value ...] [--config file.yaml]",
            description=description,
            formatter_class=_HelpFormatter,
            add_help=False,
            allow_abbrev=False,
        )
        self.hints: dict[str, Any] = {}
        self.aliases: dict[str, str] = {}
        for kind in kinds:
            hints = get_type_hints(kind)
            for entry in dataclasses.fields(kind):
                self.hints[entry.name] = hints[entry.name]
                for alias in entry.metadata.get("aliases", ()):
                    self.aliases[alias.lstrip("-")] = entry.name
        self._adjust_actions()
        general = self.add_argument_group("General")
        general.add_argument(
            "--config", help="YAML file of options; the command line overrides it."
        )
        general.add_argument("--help", "-h", action="store_true", help="Show these options.")
        if training:
            general.add_argument("--help_all", action="store_true", help="Show every option.")
        general.add_argument("--version", action="store_true", help="Show the version.")

    def _adjust_actions(self) -> None:
        for action in self._actions:
            if action.nargs == 0 and action.const is False:  # a --no_x of HfArgumentParser
                action.help = f"Turn --{action.dest} off."
                action.default = argparse.SUPPRESS
            elif action.nargs is None and _accepts(self.hints.get(action.dest), bool):
                action.nargs, action.const = "?", True  # a flag whose default is decided later
            elif action.type in (int, float) and _accepts(self.hints[action.dest], NoneType):
                action.type = _or_none(action.type)

    def hide(self, names: Collection[str]) -> None:
        """Leave options out of the help."""
        for action in self._actions:
            if action.dest in names:
                action.help = argparse.SUPPRESS

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found wrong; `parse` prints it."""
        raise ValueError(message)

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """The values that the command line and its YAML file set, by name."""
        self.set_defaults(**dict.fromkeys(self.hints, _NOT_GIVEN))
        given, rest = self._given(argv)
        if rest:
            raise ValueError(self._explain_rest(rest))
        path = given.pop("config")
        return {**(self._read_file(Path(path)) if path else {}), **given}

    def _given(self, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        namespace, rest = self.parse_known_args(list(argv))
        known = {*self.hints, "config"}
        values = {n: v for n, v in vars(namespace).items() if n in known and v is not _NOT_GIVEN}
        return values, rest

    def _explain_rest(self, rest: Sequence[str]) -> str:
        unknown = next((word for word in rest if word.startswith("--")), None)
        if unknown is None:
            return f"{rest[0]!r} stands alone; name the option it belongs to, as in --model NAME"
        name = unknown.removeprefix("--").split("=")[0].replace("-", "_")
        return f"unknown option --{name}; {suggest_option(name, self._names(), '--')}"

    def _names(self) -> Iterable[str]:
        return [*self.hints, *self.aliases, "config"]

    def _read_file(self, path: Path) -> dict[str, Any]:
        """The options of a YAML file, converted and checked like those of the command line."""
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
        """A YAML value as the option's type; text is read as on the command line (1e-5)."""
        hint = self.hints[name]
        kind = next((k for k in (bool, list, dict, NoneType) if isinstance(value, k)), None)
        if kind is None:
            return self._given([f"--{name}={value}"])[0][name]
        if not _accepts(hint, kind):
            needed = " or ".join(_name(member) for member in _kinds(hint))
            quote = (
                "; YAML reads a bare on, off, yes or no as one: quote it" if kind is bool else ""
            )
            raise ValueError(f"it needs {needed}, not {_name(kind)}{quote}")
        if kind is list and hint in (list[str], list[str] | None):
            return [item if isinstance(item, str) else str(item) for item in value]
        return value


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
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


def _kinds(hint: Any) -> list[type]:
    """The plain classes that a type hint allows: `list[str] | None` gives list and NoneType."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [get_origin(member) or member for member in members]
    return [kind for kind in kinds if inspect.isclass(kind)]


def _name(kind: type) -> str:
    return "nothing" if kind is NoneType else f"a {kind.__name__}"


def _accepts(hint: Any, kind: type) -> bool:
    return kind in _kinds(hint)


def _or_none(number: type[int] | type[float]) -> Any:
    """A converter that also reads `none`, for options whose value may be absent."""

    def convert(text: str) -> int | float | None:
        return None if text.lower() in ("none", "null") else number(text)

    convert.__name__ = number.__name__
    return convert
