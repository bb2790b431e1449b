"""A model's files in a folder that may hold an earlier one: never a mixture that a loader believes.

The files are written into a temporary folder inside, whose list of them comes last and says that
all are there. Then the config that loaders ask for first goes, the other files take their names,
and the new config comes last, in one rename. Whoever is killed in between leaves the list, and
`finish` does the rest.
"""

import errno
import json
import logging
from collections.abc import Callable, Collection
from fnmatch import fnmatch
from pathlib import Path

from fastdpo.system import files

logger = logging.getLogger(__name__)

CONFIGS = ("adapter_config.json", "config.json")
"""PEFT and transformers ask for these first: without one a folder holds nothing."""

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "spiece.model", "sentencepiece*", "chat_template*",
)  # fmt: skip
MODEL_FILES = (
    *CONFIGS, *TOKENIZER_FILES, "generation_config.json", "adapter_model.*", "model.safetensors",
    "model-*-of-*.safetensors", "*.index.json",
)  # fmt: skip
"""Patterns of the files that belong to a model and would be mixed with those of another one."""

_ALSO_READ = (
    "training_args.json", "*.safetensors", "*.bin", "*.py", "*.model", "*_config.json",
    "MANIFEST.json", "trainer_state.json", "optimizer.json", "scaler.json", "README.md",
)  # fmt: skip

MARKER = "training_args.json"
"""Each result has it: the files beside it that belong to a model are an earlier result's."""

LISTING = ".files.json"


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a model into a folder; what an earlier result had and this one has not is removed.

    Args:
        folder: where the files get their names; the caller holds it against other processes.
        write: called with a temporary folder, into which it writes the files.

    Raises:
        FileNotFoundError: the config or the weights were not written, or are gone.
        OSError: the disk is full or failing; the earlier result is then as it was, or all of the
            new one lies ready for `finish`.
    """
    staged = files.temporary_name(folder / "result")
    try:
        files.mkdir(staged)
        write(staged)
        names = _complete(staged)
        files.write_json(staged / LISTING, {"files": names})
        files.fsync(folder)
    except BaseException:
        files.remove_if_possible(staged)
        raise
    _give_names(staged, folder, names)
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                errno.ENOENT, "the file is gone after its save", str(folder / name)
            )


def finish(folder: Path, lock_folder: Path) -> None:
    """Complete a result whose publication was killed, if nobody holds the folder.

    Args:
        folder: any folder, or what does not exist.
        lock_folder: as `files.exclusive_lock` takes it.

    Raises:
        OSError: the files cannot be given their names.
    """
    if not (folder.is_dir() and _ready(folder)):
        return
    try:
        with files.exclusive_lock(folder, lock_folder) as alone:
            if alone:
                finish_held(folder)
    except BlockingIOError:
        return  # its writer is at work


def finish_held(folder: Path) -> None:
    """Do as `finish` does in a folder that the caller holds.

    Raises:
        OSError: the files cannot be given their names.
    """
    for staged, names in _ready(folder):
        logger.info("The save of a result into %s was cut short and is completed now", folder)
        _give_names(staged, folder, names)


def _complete(staged: Path) -> list[str]:
    """Make what was written durable; returns the files' names within the folder."""
    paths = [path for path in sorted(staged.rglob("*")) if not files.is_temporary(path)]
    for path in (*paths, staged):
        files.fsync(path)
    found = [path.relative_to(staged).as_posix() for path in paths if path.is_file()]
    last = {name.rpartition("/")[2] for name in found}
    if not (last & set(CONFIGS) and any(name.endswith(".safetensors") for name in last)):
        raise FileNotFoundError(
            errno.ENOENT, "a result needs a config and weights, and they are not there", str(staged)
        )
    return found


def _ready(folder: Path) -> list[tuple[Path, list[str]]]:
    """The temporary folders in which a whole result lies, the oldest first, with its files."""
    found = []
    for path in folder.iterdir():
        listing = path / LISTING
        if not (files.is_temporary(path) and listing.is_file() and not path.is_symlink()):
            continue
        try:
            names = json.loads(listing.read_bytes())["files"]
            whole = all((path / name).is_file() or (folder / name).is_file() for name in names)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if whole:
            found.append((listing.stat().st_mtime_ns, path, names))
    return [(path, names) for _, path, names in sorted(found)]


def _give_names(staged: Path, folder: Path, names: Collection[str]) -> None:
    """Move the files of a whole result to their places, as often as it takes, configs last."""
    inside = [path for path in sorted(staged.rglob("*")) if path.is_file()]
    moving = [path.relative_to(staged) for path in inside if path.name != LISTING]
    configs = [name for name in moving if name.name in CONFIGS]
    for name in configs:
        files.remove(folder / name)
    if configs and (folder / MARKER).is_file():
        for path in sorted(_parts_of_a_model(folder), key=lambda path: path.name not in CONFIGS):
            if path.name not in names:
                files.remove(path)
    for group in ([name for name in moving if name not in configs], configs):
        for name in group:
            files.mkdir((folder / name).parent)
            files.replace(staged / name, folder / name)
        files.fsync(folder)
    files.remove_if_possible(staged)


def _parts_of_a_model(folder: Path) -> list[Path]:
    """The files of a folder that belong to a model."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in MODEL_FILES)
    ]


def is_model_file(path: Path) -> bool:
    """Tell whether a loader, or a run that goes on, would read a file of this name in a folder."""
    return any(fnmatch(path.name, pattern) for pattern in (*MODEL_FILES, *_ALSO_READ))
