"""The merged model's folder: written file by file, complete only when its config.json is there."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from fastdpo.merging.adapter import Adapter
from fastdpo.merging.base import INDEX, Base
from fastdpo.merging.plan import MergePlan
from fastdpo.merging.tensor_files import DTYPES, bytes_of, write_tensors
from fastdpo.system import files
from fastdpo.system.console import progress_bar

MARKER = "merge.json"
MADE_BY = "python -m fastdpo.merge"
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "spiece.model", "sentencepiece*", "chat_template*",
)  # fmt: skip
OTHER_FILES = ("generation_config.json", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class MergedModel:
    """A folder that was written.

    Attributes:
        folder: where it lies.
        bytes: of its tensors.
        account: the content of its merge.json, without the report.
    """

    folder: Path
    bytes: int
    account: dict[str, Any]


def claim_folder(folder: Path, base: Base, adapter: Adapter, *, overwrite: bool) -> None:
    """Make sure that nothing but our own earlier result is lost in `folder`, and remove that.

    Raises:
        ValueError: something else lies there, or an earlier result and `overwrite` is off.
    """
    for other, what in ((base.folder, "the base"), (adapter.folder, "the adapter")):
        if folder.resolve() == other.resolve():
            raise ValueError(f"--output_dir {folder} is the folder of {what}: name a new one.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: name a new folder.")
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
    for name in (*earlier["files"], MARKER):
        files.remove(folder / Path(name).name)
    for path in folder.iterdir():
        if files.is_temporary(path):  # of a merge that was killed
            files.remove(path)


def write_folder(plan: MergePlan, folder: Path) -> MergedModel:
    """Write weights, tokenizer and, last, config.json; each file is whole or not there."""
    sizes = {file: sum(map(bytes_of, tensors.values())) for file, tensors in plan.files.items()}
    files.mkdir(folder)
    if (free := files.free_bytes(folder)) < sum(sizes.values()):
        raise ValueError(
            f"the merged model takes {sum(sizes.values()) / 2**20:,.1f} MiB and {folder} has "
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
        "onto": plan.onto,
        "files": names,
    }
    files.write_json(folder / MARKER, account)
    with progress_bar(len(plan.files), "Merging", "file") as bar:
        for file, tensors in plan.files.items():
            files.write_atomically(folder / file, partial(write_tensors, tensors=tensors.items()))
            bar.update()
    if indexed:
        where = {name: file for file, tensors in plan.files.items() for name in tensors}
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        files.write_json(folder / INDEX, content)
    for name, source in copies.items():
        files.write_atomically(folder / name, partial(shutil.copyfile, source))
    files.write_json(folder / "config.json", _config(plan))
    account["complete"] = True
    files.write_json(folder / MARKER, account)
    return MergedModel(folder, sum(sizes.values()), account)


def finish_folder(merged: MergedModel, report: dict[str, Any]) -> None:
    """Put the report into the folder's merge.json."""
    files.write_json(merged.folder / MARKER, {**merged.account, "report": report})


def _earlier(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return found if found["made_by"] == MADE_BY and found["files"] is not None else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _copies(base: Path, adapter: Path) -> dict[str, Path]:
    """File name -> the file to copy: the base's, and the adapter's tokenizer over them."""
    own = _matching(adapter, TOKENIZER_FILES)
    found = _matching(base, (*OTHER_FILES, *TOKENIZER_FILES))
    if "tokenizer_config.json" in own:  # its chat template is the one in force, or there is none
        found = {name: file for name, file in found.items() if not name.startswith("chat_template")}
    return found | own


def _matching(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns)
    }


def _config(plan: MergePlan) -> dict[str, Any]:
    """The base's config.json with the dtype of the weights as they are written."""
    stored: Counter[str] = Counter()
    for tensors in plan.files.values():
        for tensor in tensors.values():
            stored[tensor.dtype] += bytes_of(tensor)
    config = dict(plan.base.config)
    dtype = str(DTYPES.get(stored.most_common(1)[0][0], "")).removeprefix("torch.")
    if dtype:
        config |= {"dtype": dtype, "torch_dtype": dtype}  # new readers take one, old ones the other
    if plan.unties:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"] = {**config["text_config"], "tie_word_embeddings": False}
    return config
