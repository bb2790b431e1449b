"""Checkpoints that are whole or do not exist: no pickle inside, a manifest with checksums last.

A checkpoint folder is filled under a temporary name, sealed with `MANIFEST.json` (size and sha256
of every file) and renamed. Resuming takes the newest folder that verifies.
"""

import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdpo import files

logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
FORMAT = 1
OPTIMIZER_TENSORS, OPTIMIZER_REST = "optimizer.safetensors", "optimizer.json"
RNG_TENSORS, RNG_REST = "rng_state.safetensors", "rng_state.json"
SEPARATOR = "::"
"""Between a parameter's name and the name of one of its moments, and where moments are nested."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or belongs to another run."""


def seal(folder: Path, run: dict[str, Any]) -> None:
    """Make every file of a finished checkpoint durable and write its manifest, last of all.

    Args:
        folder: a checkpoint under its temporary name.
        run: what a resumed run must share with this one (pairs per update, seed, data ...).
    """
    contents = {}
    for path in sorted(folder.rglob("*")):
        if path == folder / MANIFEST:
            continue
        files.sync(path)
        if path.is_file():
            contents[path.relative_to(folder).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": files.sha256_of(path),
            }
    files.write_json(folder / MANIFEST, {"format": FORMAT, "run": run, "files": contents})


def verify(folder: Path) -> dict[str, Any]:
    """The `run` part of the manifest of a checkpoint whose files are all as they were written.

    Raises:
        CheckpointError: names the first file that is missing or differs.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        written_in = manifest["format"]
        run = dict(manifest["run"])
        contents = [(name, r["bytes"], r["sha256"]) for name, r in manifest["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} has no readable {MANIFEST} ({type(error).__name__}: {error})"
        ) from error
    if written_in != FORMAT:
        raise CheckpointError(
            f"{folder / MANIFEST} has format {written_in!r}, and this fastdpo reads {FORMAT}: "
            "resume with the fastdpo that wrote it"
        )
    for name, size, sha256 in contents:
        path = folder / name
        try:
            if not path.is_file() or path.stat().st_size != size:
                raise CheckpointError(f"{path} is missing or not {size} bytes long")
            if files.sha256_of(path) != sha256:
                raise CheckpointError(f"{path} is damaged: its sha256 is not the manifest's")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error})") from error
    return run


def newest_verified(output_dir: Path) -> Path:
    """The checkpoint of the highest step that verifies; what is skipped is said, with the reason.

    Raises:
        CheckpointError: there is none.
    """
    skipped = []
    for folder in sorted(_checkpoints(output_dir), key=_step_of, reverse=True):
        try:
            verify(folder)
        except CheckpointError as error:
            skipped.append(str(error))
            logger.warning("Skipping a checkpoint: %s", error)
            continue
        return folder
    reasons = "; ".join(skipped) or "there is no checkpoint-* folder"
    raise CheckpointError(
        f"nothing to resume from in {output_dir}: {reasons}. Start without resume_from_checkpoint."
    )


def require_same_run(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to resume a run under settings that would make it another one.

    Raises:
        CheckpointError: lists every setting that differs, with both values.
    """
    differing = [
        f"{name}: the checkpoint has {saved.get(name)!r}, this run {current.get(name)!r}"
        for name in saved | current
        if saved.get(name) != current.get(name)
    ]
    if differing:
        raise CheckpointError(
            "the checkpoint belongs to another run; " + "; ".join(differing) + ". Resume with the "
            "same settings, or start anew in another output_dir."
        )


def rotate(output_dir: Path, keep: int | None, protected: Path | None) -> None:
    """Delete the oldest checkpoints beyond `keep`, by step; never the newest or `protected`.

    Links are not ours: they are neither counted nor deleted.
    """
    if keep is None or keep <= 0:
        return
    own = [folder for folder in _checkpoints(output_dir) if not folder.is_symlink()]
    folders = sorted(own, key=_step_of)
    for folder in folders[: max(0, len(folders) - keep)]:
        if protected is None or folder.resolve() != protected.resolve():
            shutil.rmtree(folder)


def commit(temporary: Path, final: Path) -> None:
    """Give a sealed checkpoint its name; what had that name before is deleted only then.

    Raises:
        OSError: it cannot be renamed; the older folder then has its name back.
    """
    aside = None
    if os.path.lexists(final):
        aside = files.temporary_name(final)
        os.replace(final, aside)
    try:
        os.replace(temporary, final)
    except OSError:
        if aside is not None:
            os.replace(aside, final)
        raise
    files.sync(final.parent)
    if aside is not None and aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside)
    elif aside is not None:
        aside.unlink()


def save_optimizer(
    folder: Path, optimizer: Optimizer, scheduler_state: dict[str, Any], model: nn.Module
) -> None:
    """Write moments by parameter name as safetensors, everything else as JSON.

    Raises:
        OSError: the disk is full or failing.
    """
    names = _names_by_index(optimizer, model)
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, moments in state["state"].items():
        for label, value in _flat(moments, names[index]):
            if isinstance(value, Tensor):
                # A copy: parameters may share a tensor (bitsandbytes' code books).
                tensors[label] = value.detach().to("cpu", copy=True).contiguous()
            else:
                numbers[label] = value
    groups = [
        {**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]
    ]
    _save_tensors(tensors, folder / OPTIMIZER_TENSORS)
    rest = {
        "shapes": _shapes(optimizer, model),
        "state": numbers,
        "param_groups": groups,
        "scheduler": scheduler_state,
    }
    files.write_json(folder / OPTIMIZER_REST, rest)


def load_optimizer(folder: Path, optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Put the moments back by parameter name; returns the scheduler's state.

    Raises:
        CheckpointError: the checkpoint's parameters, their shapes or their grouping are not the
            optimizer's.
    """
    names = _names_by_index(optimizer, model)
    rest = json.loads((folder / OPTIMIZER_REST).read_text())
    saved, current = rest["shapes"], _shapes(optimizer, model)
    if saved != current:
        strange = [
            f"{name}: {saved.get(name, 'none')} there, {current.get(name, 'none')} here"
            for name in sorted(saved | current)
            if saved.get(name) != current.get(name)
        ]
        raise CheckpointError(
            f"the optimizer state in {folder} is of other parameters; {'; '.join(strange[:3])} "
            f"({len(strange)} in all). Resume with the same adapter settings."
        )
    indices = {name: index for index, name in names.items()}
    state: dict[int, dict[str, Any]] = {}
    with safe_open(folder / OPTIMIZER_TENSORS, framework="pt") as tensors:
        moments = {label: tensors.get_tensor(label) for label in tensors.keys()}  # noqa: SIM118
    for label, value in (moments | rest["state"]).items():
        name, *outer, key = label.split(SEPARATOR)
        place = state.setdefault(indices[name], {})
        for part in outer:
            place = place.setdefault(part, {})
        place[key] = value
    groups = _in_the_order_of(optimizer, names, rest["param_groups"])
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return rest["scheduler"]


def save_rng_state(folder: Path) -> None:
    """Write the state of Python's, numpy's and torch's generators.

    Raises:
        OSError: the disk is full or failing.
    """
    version, numbers, gauss = random.getstate()
    kind, key, position, has_gauss, cached = np.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.array(key, np.int64))}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    _save_tensors(tensors, folder / RNG_TENSORS)
    rest = {"python": [version, list(numbers), gauss], "numpy": [kind, position, has_gauss, cached]}
    files.write_json(folder / RNG_REST, rest)


def load_rng_state(folder: Path) -> None:
    """Put every generator back where it was."""
    rest = json.loads((folder / RNG_REST).read_text())
    version, numbers, gauss = rest["python"]
    random.setstate((version, tuple(numbers), gauss))
    with safe_open(folder / RNG_TENSORS, framework="pt") as tensors:
        kind, position, has_gauss, cached = rest["numpy"]
        key = tensors.get_tensor("numpy").numpy().astype(np.uint32)
        np.random.set_state((kind, key, position, has_gauss, cached))
        torch.set_rng_state(tensors.get_tensor("torch"))
        if torch.cuda.is_available() and "cuda" in tensors.keys():  # noqa: SIM118
            torch.cuda.set_rng_state(tensors.get_tensor("cuda"))


def _checkpoints(output_dir: Path) -> list[Path]:
    if not output_dir.is_dir():
        return []
    return [path for path in output_dir.iterdir() if _step_of(path) >= 0 and path.is_dir()]


def _step_of(folder: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def _names_by_index(optimizer: Optimizer, model: nn.Module) -> dict[int, str]:
    """Parameter names in the order in which state_dict() counts the parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {index: names[id(parameter)] for index, parameter in enumerate(parameters)}


def _shapes(optimizer: Optimizer, model: nn.Module) -> dict[str, list[int]]:
    parameters = dict(model.named_parameters())
    return {n: list(parameters[n].shape) for n in _names_by_index(optimizer, model).values()}


def _flat(moments: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Labels and values; bitsandbytes' optimizers put their moments into a dict of their own."""
    for key, value in moments.items():
        label = f"{prefix}{SEPARATOR}{key}"
        if isinstance(value, dict):
            yield from _flat(value, label)
        else:
            yield label, value


def _in_the_order_of(
    optimizer: Optimizer, names: dict[int, str], saved: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The saved groups, each with its parameters, as the optimizer has them: torch goes by place.

    Raises:
        CheckpointError: a group of the optimizer is none of the saved ones.
    """
    by_members = {frozenset(group["params"]): group for group in saved}
    groups = []
    for group in optimizer.state_dict()["param_groups"]:
        members = [names[index] for index in group["params"]]
        if frozenset(members) not in by_members:
            raise CheckpointError(
                f"the checkpoint's optimizer has no group of exactly the {len(members)} parameters "
                f"{members[:2]} ...: resume with the same optimizer settings."
            )
        groups.append({**by_members[frozenset(members)], "params": group["params"]})
    return groups


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """`save_file`, whose failure to write is an OSError as everyone else's is."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
