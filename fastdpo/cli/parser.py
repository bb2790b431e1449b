"""Parsing for the commands: options, `--config file.yaml`, presets, help, and clean refusals.

Below everything lie the defaults of the dataclasses, then the command's presets, then the YAML
file, then the command line. TrainingArguments costs seconds to import, so it is touched only by
`--help_all` and when a training command is really parsed.
"""

import dataclasses
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from transformers.utils import logging as transformers_logging

from fastdpo.cli.arguments import HelpFormatter, TrlParser
from fastdpo.cli.exit_codes import (
    EXIT_BAD_OPTION,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    format_error,
    outcome_of,
)
from fastdpo.options import (
    COMMAND_DEFAULTS,
    DPO_OPTION_GROUPS,
    DataOptions,
    ModelOptions,
    TrainerDefaults,
    presets,
)
from fastdpo.system import ranks
from fastdpo.system.console import LineHandler, print_error
from fastdpo.system.start_up import start_up
from fastdpo.version import __version__

if TYPE_CHECKING:
    from fastdpo.config import DPOConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Parsed:
    """The options of a command, as the user and the defaults set them.

    Attributes:
        groups: one instance for each dataclass that was parsed, DPOConfig included.
        explicit: names of the options that the user set, on the command line or in the YAML file.
        config_file: the YAML file, if there is one.
    """

    groups: Mapping[type, Any]
    explicit: frozenset[str]
    config_file: str | None = None

    def group(self, kind: type[T]) -> T:
        """The instance of one of the dataclasses that were parsed."""
        return self.groups[kind]

    @property
    def model(self) -> ModelOptions:
        """The options that say which model is trained, and which of its weights."""
        return self.group(ModelOptions)

    @property
    def data(self) -> DataOptions:
        """The options that say which preference pairs are read."""
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
    refused: Collection[str] = (),
    shared: bool = False,
) -> Parsed:
    """Parse the arguments of `python -m fastdpo.<command>`, and join the ranks that share it.

    Args:
        command: the command's name, as in `train`.
        groups: the dataclasses that hold the command's own options.
        argv: the arguments after the program's name.
        training: whether the command takes a DPOConfig with the presets below the user's values.
        description: one sentence above the help.
        refused: options of the groups that change nothing here: left out of the help, and an error.
        shared: whether several processes can share the work, as they can wherever `training` is.

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
        parser = _make_parser(command, groups, training, description, inherited=not brief)
        parser.hide(refused)
        if brief or everything:
            sys.stdout.write(parser.format_help())
            raise SystemExit(0)
        values = parser.read(argv)
        if useless := sorted(values.keys() & set(refused)):
            raise ValueError(
                f"--{useless[0]} changes nothing here: leave it out. The adapter's folder says how "
                "it was made; --qlora loads the base in 4 bits as in training."
            )
        if ranks.launched() > 1 and not (training or shared):
            raise ValueError(
                f"fastdpo.{command} is the work of one process, and a launcher has started "
                f"{ranks.launched()}: start it with python."
            )
        built = _build(groups, training, values)
        ranks.join()
        if not ranks.is_first():
            _silence_transformers()
        return Parsed(built, frozenset(values), parser.config_file)
    except (ValueError, OSError) as error:
        if ranks.is_first():
            print_error(f"error: {' '.join(format_error(error).split())}")
        raise SystemExit(EXIT_BAD_OPTION) from None


def command(main: Callable[[Sequence[str]], None]) -> int:
    """Run a command's main on the process's arguments.

    Returns:
        The exit code: 0; 1 where the loss, a gradient or a weight is not finite; 2 after one line
        about bad input, a bad option, a missing package or a disk that does not take what is
        written; 3 where the memory does not suffice; 70 after a traceback, where the fault is
        ours; 4 where another process of the run was lost; 130 after Ctrl-C; 143 after SIGTERM.
        Of several processes the one that has the first error tells it. With FASTDPO_DEBUG set,
        every error shows its traceback.
    """
    start_up.command_began()
    logger = logging.getLogger("fastdpo")
    handler = LineHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if ranks.is_first() else logging.CRITICAL)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # CPU kernels it would rather have
    if not sys.stderr.isatty():
        _hide_bars()
    try:
        with warnings.catch_warnings():
            # What one library tells another; and the first rank's are enough.
            warnings.simplefilter("ignore", FutureWarning if ranks.is_first() else Warning)
            main(sys.argv[1:])
            ranks.leave()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SystemExit as stop:
        if stop.code != EXIT_TERMINATED:
            raise
        return EXIT_TERMINATED
    except BaseException as error:  # tokenizers' panics are no Exception
        return _report(error)
    finally:
        logger.removeHandler(handler)
    return 0


def _report(error: BaseException) -> int:
    """Write what an error means to standard error; returns the exit code."""
    outcome, debugs = outcome_of(error), bool(os.environ.get("FASTDPO_DEBUG"))
    is_first = ranks.is_first_error()
    if debugs or (outcome.is_own_fault and is_first):
        print_error("".join(traceback.format_exception(error)).rstrip())
    if debugs or is_first:
        print_error(f"error: {outcome.line}")
    return outcome.code


def _silence_transformers() -> None:
    """Show neither its warnings nor its progress bars: the first rank does."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _hide_bars() -> None:
    """Show no progress bars of libraries: they are redrawn, and a file keeps each drawing."""
    transformers_logging.disable_progress_bar()  # and those of the hub
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # it is not imported yet


def _build(groups: Sequence[type], training: bool, given: Mapping[str, Any]) -> dict[type, Any]:
    """Make an instance of each dataclass of the values that belong to it."""
    given = {**COMMAND_DEFAULTS, **given}
    built = {kind: kind(**_fields_of(kind, given)) for kind in groups}
    if training:
        from fastdpo.config import DPOConfig

        built[DPOConfig] = DPOConfig(**_fields_of(DPOConfig, {**presets(given), **given}))
    return built


def _fields_of(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {entry.name for entry in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def _inherited_options(groups: Sequence[type]) -> type:
    """Make a dataclass of the DPOConfig options that the brief help does not show."""
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


def _make_parser(
    command: str, groups: Sequence[type], training: bool, description: str, *, inherited: bool
) -> TrlParser:
    """Make the parser of one command; `inherited` adds what the brief help leaves out."""
    kinds = list(groups)
    if training:
        kinds += [*DPO_OPTION_GROUPS, TrainerDefaults]
        kinds += [_inherited_options(groups)] if inherited else []
    program = f"python -m fastdpo.{command}"
    parser = TrlParser(
        kinds,
        prog=program,
        usage=f"{program} [--option value ...] [--config file.yaml]",
        description=description,
        formatter_class=HelpFormatter,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.set_defaults(**{k: v for k, v in COMMAND_DEFAULTS.items() if k in parser.hints})
    general = parser.add_argument_group("General")
    general.add_argument("--config", help="YAML file of options; the command line overrides it.")
    general.add_argument("--help", "-h", action="store_true", help="Show these options.")
    if training:
        general.add_argument("--help_all", action="store_true", help="Show every option.")
    general.add_argument("--version", action="store_true", help="Show the version.")
    return parser
