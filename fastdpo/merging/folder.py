"""The merged model's folder: written file by file, complete only once it has a config.json."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from fastdpo.merging.adapter import Adapter
from fastdpo.merging.base import INDEX, Base
from fastdpo.merging.model_files import are_plain_names, model_file
from fastdpo.merging.plan import MergePlan
from fastdpo.merging.tensor_files import MERGEABLE_DTYPES, write_tensors
from fastdpo.options import cache_folder
from fastdpo.system import files
from fastdpo.system.console import progress_bar
from fastdpo.system.results import TOKENIZER_FILES

MARKER = "merge.json"
MADE_BY = "python -m fastdpo.merge"
OTHER_FILES = ("generation_config.json", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")
WRITTEN = (*TOKENIZER_FILES, *OTHER_FILES, "*.safetensors", INDEX, "config.json")
"""Patterns of everything that a merge writes beside its account."""


@dataclass(frozen=True)
class MergedModel:
    """A merged model that was written.

    Attributes:
        folder: the folder that holds it.
        bytes: the size of its tensors.
        account: the content of its merge.json, without the report.
    """

    folder: Path
    bytes: int
    account: dict[str, Any]


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Make the folder and keep other merges out; it is removed if nothing was written into it.

    Raises:
        ValueError: another process is merging into it, or it is a file.
        OSError: it cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: name a new folder.")
    made = files.mkdir(folder)
    with ExitStack() as stack:
        try:
            stack.enter_context(files.exclusive_lock(folder, cache_folder() / "locks"))
        except BlockingIOError:
            raise ValueError(
                f"another process is writing into --output_dir {folder}: wait for it, or name "
                "another folder."
            ) from None
        for each in reversed(made):
            stack.callback(files.rmdir, each)
        yield


def claim_folder(folder: Path, base: Base, adapter: Adapter, *, overwrite: bool) -> None:
    """Make sure that nothing but our own earlier result is lost in `folder`, and remove that.

    Raises:
        ValueError: something else lies there, or an earlier result and `overwrite` is off; or a
            file that would be copied is a link out of its model's folder.
    """
    _copies(base.folder, adapter.folder)  # refused before anything is removed
    for other, what in ((base.folder, "the base"), (adapter.folder, "the adapter")):
        if folder.resolve() == other.resolve():
            raise ValueError(f"--output_dir {folder} is the folder of {what}: name a new one.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    earlier = _earlier(folder)
    if earlier is None:
        raise ValueError(
            f"--output_dir {folder} is not empty, and what lies there is not an earlier merge: "
            "name a new folder."
        )
    if earlier["complete"] and not overwrite:
        raise ValueError(
            f"--output_dir {folder} holds an earlier merge (of {earlier['adapter']}): name another "
            "folder, or replace it with --overwrite."
        )
    paths = [folder / name for name in (*earlier["files"], MARKER)]
    if folders := [path for path in paths if path.is_dir() and not path.is_symlink()]:
        raise ValueError(
            f"--output_dir {folder}: {folders[0].name} is a folder, which no merge makes: move it "
            "away, or name a new folder."
        )
    for path in paths:
        files.remove(path)
    for path in folder.iterdir():
        if files.is_temporary(path):  # of a merge that was killed
            files.remove(path)


def write_folder(plan: MergePlan, folder: Path) -> MergedModel:
    """Write weights, tokenizer and, last, config.json; each file is whole or not there.

    Only one weight file's new tensors are in memory at a time.

    Raises:
        ValueError: the disk has too little room.
        OSError: the disk is full or failing.
    """
    size = sum(each.nbytes for tensors in plan.files.values() for each in tensors.values())
    files.mkdir(folder)
    if (free := files.free_bytes(folder)) < size:
        raise ValueError(
            f"the merged model takes {size / 2**20:,.1f} MiB and {folder} has "
            f"{free / 2**20:,.1f} MiB left: name a folder on another disk."
        )
    copies = _copies(plan.base.folder, plan.adapter.folder)
    indexed = (plan.base.folder / INDEX).is_file()
    names = [*plan.files, *([INDEX] if indexed else []), *copies, "config.json"]
    account = {
        "made_by": MADE_BY,
        "complete": False,
        "base": plan.base.name,
        "adapter": str(plan.adapter.folder),
        "onto": plan.base_precision,
        "rounding": plan.rounding,
        "files": names,
    }
    files.write_json(folder / MARKER, account)
    with progress_bar(len(plan.files), "Merging", "file") as bar:
        for file, tensors in plan.files.items():
            files.write_atomically(folder / file, partial(write_tensors, tensors=tensors))
            bar.update()
    if indexed:
        weight_map = {name: file for file, tensors in plan.files.items() for name in tensors}
        content = {"metadata": {"total_size": size}, "weight_map": weight_map}
        files.write_json(folder / INDEX, content)
    for name, source in copies.items():
        files.write_atomically(folder / name, partial(shutil.copyfile, source))
    files.write_json(folder / "config.json", _config(plan))
    account["complete"] = True
    files.write_json(folder / MARKER, account)
    return MergedModel(folder, size, account)


def finish_folder(merged: MergedModel, report: dict[str, Any]) -> None:
    """Put the report into the folder's merge.json."""
    files.write_json(merged.folder / MARKER, {**merged.account, "report": report})


def _earlier(folder: Path) -> dict[str, Any] | None:
    """The merge.json of an earlier merge into the folder.

    Returns None where there was none, or where it names files that no merge writes: it may be
    another's, and what it names is removed.
    """
    try:
        account = json.loads(model_file(folder, MARKER).read_text(encoding="utf-8"))
        is_ours = account["made_by"] == MADE_BY and isinstance(account["complete"], bool)
        written, _ = account["files"], account["adapter"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not is_ours or not are_plain_names(written):
        return None
    known = all(any(fnmatch(name, pattern) for pattern in WRITTEN) for name in written)
    return account if known else None


def _copies(base: Path, adapter: Path) -> dict[str, Path]:
    """The files to copy by their names: the base's, and the adapter's tokenizer over them."""
    from_adapter = _matching(adapter, TOKENIZER_FILES)
    from_base = _matching(base, (*OTHER_FILES, *TOKENIZER_FILES))
    if "tokenizer_config.json" in from_adapter:  # its chat template is in force, or there is none
        from_base = {n: path for n, path in from_base.items() if not n.startswith("chat_template")}
    return from_base | from_adapter


def _matching(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    """The files of a folder whose names match one of the patterns, by name.

    Raises:
        ValueError: one is a link out of the folder.
    """
    return {
        path.name: model_file(folder, path.name)
        for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns)
    }


def _config(plan: MergePlan) -> dict[str, Any]:
    """The base's config.json with the dtype of the weights as they are written."""
    most = plan.main_dtype
    config = dict(plan.base.config)
    if most in MERGEABLE_DTYPES:
        dtype = str(most).removeprefix("torch.")
        config |= {"dtype": dtype, "torch_dtype": dtype}  # new readers take one, old ones the other
    if plan.unties:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return config
