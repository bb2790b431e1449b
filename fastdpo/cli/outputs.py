"""A command's outputs are checked against its inputs before any work: none is overwritten."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import glob
from itertools import chain, count
from pathlib import Path
from typing import Any

from fastdpo.cli.parser import Parsed
from fastdpo.options import DataOptions, cache_folder, reference_folder
from fastdpo.system import files, ranks, results

DATA_ENDINGS = (
    ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".bz2", ".xz", ".zst",
    ".zip",
)  # fmt: skip
"""Files that would be read as rows the next time, where a data set is a folder."""

LOG_FILE = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Input:
    """A file or folder that a command reads.

    Attributes:
        flag: the option that names it.
        path: where it lies; it exists.
        is_part: tells whether a file of this name, in the folder, would be read as a part of it.
    """

    flag: str
    path: Path
    is_part: Callable[[Path], bool]


def complete_inputs(parsed: Parsed) -> list[Input]:
    """Find the inputs, and complete the save of a model into one of them that was cut short.

    Raises:
        OSError: it cannot be completed.
    """
    inputs = local_inputs(parsed)
    for each in inputs:
        if each.is_part is results.is_model_file:
            results.finish(each.path, cache_folder() / "locks")
    return inputs


def local_inputs(parsed: Parsed) -> list[Input]:
    """The files and folders that the options name; hub ids and what does not exist are left out."""
    found = []
    for flag, value, is_part in _named(parsed):
        path = Path(value).expanduser() if value else None
        if path is None or not path.exists():
            continue
        found.append(Input(flag, path, is_part))
        if is_part is results.is_model_file and (base := _base_of(path)) is not None:
            found.append(Input(f"the adapter of {flag}", base, is_part))
    return found


def new_output_file(parsed: Parsed, given: str | None, folder: str | None, name: str) -> Path:
    """The file that `--output_file` names, or by default one that nothing has yet; all ranks agree.

    Args:
        parsed: the options of the command.
        given: the option's value.
        folder: where the default lies, as `unused_file` takes it.
        name: of the default.

    Raises:
        ValueError, OSError: as `require_new_file`.
    """

    def choose() -> Path:
        output = Path(given) if given else unused_file(folder, name)
        require_new_file(parsed, "--output_file", output)
        return output

    return ranks.first_does(choose)


def require_new_file(parsed: Parsed, flag: str, output: Path) -> None:
    """Refuse a file to write that is an input or a part of one, or that cannot be written.

    Raises:
        ValueError: it is an input; names the option that reads it.
        OSError: it cannot be written, with the path.
    """
    for each in complete_inputs(parsed):
        if each.path.is_dir():
            taken = _lies_in(output, each.path) and each.is_part(output)
        else:
            taken = _same(output, each.path)
        if taken:
            raise ValueError(
                f"{flag} {output} would overwrite or join {each.path}, which {each.flag} reads: "
                "name another file."
            )
    files.probe(output)


def unused_file(folder: str | None, name: str) -> Path:
    """A path of this name that nothing has yet, with a number behind it if need be.

    Args:
        folder: a model's folder or hub id; what is no local folder stands for the present one.
        name: of the file.
    """
    place = Path(folder).expanduser() if folder else Path()
    first = (place if place.is_dir() else Path()) / name
    numbered = (first.with_name(f"{first.stem}-{n}{first.suffix}") for n in count(2))
    return next(path for path in chain([first], numbered) if not path.exists())


def require_new_folder(parsed: Parsed, output: Path) -> None:
    """Refuse an output folder that is an input, or in which the run would overwrite one.

    Raises:
        ValueError: names the option that reads it.
    """
    for each in complete_inputs(parsed):
        is_folder = each.path.is_dir()
        written = results.is_model_file(each.path) or each.path.name == LOG_FILE
        if _same(output, each.path) or (
            not is_folder and written and _same(output, each.path.absolute().parent)
        ):
            raise ValueError(
                f"--output_dir {output} would overwrite or join {each.path}, which {each.flag} "
                "reads: give another folder."
            )
        if is_folder and _rotates(parsed) and _is_checkpoint_in(each.path, output):
            raise ValueError(
                f"{each.flag} {each.path} is a checkpoint in --output_dir {output}, and "
                "--save_total_limit would delete it: give another folder."
            )


def _named(parsed: Parsed) -> Iterator[tuple[str, str | None, Callable[[Path], bool]]]:
    """Each option that names something to read, its value, and what is a part of such a folder."""
    yield "--config", parsed.config_file, _nothing
    for group in parsed.groups.values():
        trains = hasattr(group, "ref_cache")
        for name, flag, is_part in _NAMES:
            value = getattr(group, name, None)
            if not (trains and value in ("adapter", "base")):  # words, not folders
                yield flag, value, is_part
        if isinstance(group, DataOptions) and group.mixture is not None:
            for entry in group.mixture.datasets:
                for file in (entry.path, *_paths(entry.data_files)):
                    yield "--datasets", file, _is_data
        if trains:
            store = reference_folder(group.ref_cache)
            yield "--ref_cache", str(store) if store else None, _nothing


def _base_of(adapter: Path) -> Path | None:
    """The folder of the model that an adapter was trained on, if it is one."""
    try:
        config = json.loads((adapter / results.CONFIGS[0]).read_bytes())
        base = Path(config["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return base if base.is_dir() else None


def _paths(data_files: Any) -> Iterator[str]:
    """The file names in what `datasets` takes as data_files: one, a list, or such by split."""
    if isinstance(data_files, str):
        yield from glob(data_files)
    elif isinstance(data_files, dict):
        for each in data_files.values():
            yield from _paths(each)
    elif isinstance(data_files, list | tuple):
        for each in data_files:
            yield from _paths(each)


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in DATA_ENDINGS


def _nothing(_path: Path) -> bool:
    return False


_NAMES = (
    ("model_name_or_path", "--model", results.is_model_file),
    ("adapter", "--adapter", results.is_model_file),
    ("reference", "--reference", results.is_model_file),
    ("dataset_name", "--dataset", _is_data),
    ("eval_dataset", "--eval_dataset", _is_data),
)
"""The options that name one thing to read, whichever group they are in."""


def _rotates(parsed: Parsed) -> bool:
    limit = parsed.training.save_total_limit
    return limit is not None and limit > 0


def _is_checkpoint_in(path: Path, output: Path) -> bool:
    return path.name.startswith("checkpoint-") and _same(path.absolute().parent, output)


def _same(one: Path, other: Path) -> bool:
    """Tell whether both are one file or folder, links followed."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def _lies_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
