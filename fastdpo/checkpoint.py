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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from fastdpo import files

logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
OPTIMIZER_TENSORS, OPTIMIZER_REST = "optimizer.safetensors", "optimizer.json"
RNG_TENSORS, RNG_REST = "rng_state.safetensors", "rng_state.json"
SEPARATOR = "::"
"""Between a parameter's name and the name of one of its moments."""


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
        if path.is_file() and path.name != MANIFEST:
            files.sync(path)
            contents[str(path.relative_to(folder))] = {
                "bytes": path.stat().st_size,
                "sha256": files.sha256_of(path),
            }
    files.write_json(folder / MANIFEST, {"format": 1, "run": run, "files": contents})


def verify(folder: Path) -> dict[str, Any]:
    """The `run` part of the manifest of a checkpoint whose files are all as they were written.

    Raises:
        CheckpointError: names the first file that is missing or differs.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        contents, run = manifest["files"], manifest["run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} has no readable {MANIFEST} ({error})") from error
    for name, recorded in contents.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != recorded["bytes"]:
            raise CheckpointError(f"{path} is missing or not {recorded['bytes']} bytes long")
        if files.sha256_of(path) != recorded["sha256"]:
            raise CheckpointError(f"{path} is damaged: its sha256 is not the manifest's")
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
        f"{name}: the checkpoint has {saved.get(name)!r}, this run {value!r}"
        for name, value in current.items()
        if saved.get(name) != value
    ]
    if differing:
        raise CheckpointError(
            "the checkpoint belongs to another run; " + "; ".join(differing) + ". Resume with the "
            "same settings, or start anew in another output_dir."
        )


def rotate(output_dir: Path, keep: int | None, protected: Path | None) -> None:
    """Delete the oldest checkpoints beyond `keep`, by step; never the newest or `protected`."""
    if keep is None or keep <= 0:
        return
    folders = sorted(_checkpoints(output_dir), key=_step_of)
    for folder in folders[: max(0, len(folders) - keep)]:
        if protected is None or folder.resolve() != protected.resolve():
            shutil.rmtree(folder)


def commit(temporary: Path, final: Path) -> None:
    """Give a sealed checkpoint its name; an older folder of that name is replaced."""
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    files.sync(final.parent)


def save_optimizer(
    folder: Path, optimizer: Optimizer, scheduler_state: dict[str, Any], model: nn.Module
) -> None:
    """Write moments by parameter name as safetensors, everything else as JSON."""
    names = _names_by_index(optimizer, model)
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, moments in state["state"].items():
        for key, value in moments.items():
            label = f"{names[index]}{SEPARATOR}{key}"
            if isinstance(value, Tensor):
                tensors[label] = value.detach().cpu().contiguous()
            else:
                numbers[label] = value
    groups = [
        {**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]
    ]
    save_file(tensors, folder / OPTIMIZER_TENSORS)
    rest = {"state": numbers, "param_groups": groups, "scheduler": scheduler_state}
    files.write_json(folder / OPTIMIZER_REST, rest)


def load_optimizer(folder: Path, optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Put the moments back by parameter name; returns the scheduler's state.

    Raises:
        CheckpointError: the checkpoint's parameters are not the optimizer's.
    """
    names = _names_by_index(optimizer, model)
    rest = json.loads((folder / OPTIMIZER_REST).read_text())
    saved = [name for group in rest["param_groups"] for name in group["params"]]
    if sorted(saved) != sorted(names.values()):
        strange = sorted(set(saved) ^ set(names.values()))[:3]
        raise CheckpointError(
            f"the optimizer state in {folder} is of other parameters (for example {strange}): "
            "resume with the same adapter settings."
        )
    indices = {name: index for index, name in names.items()}
    state: dict[int, dict[str, Any]] = {}
    with safe_open(folder / OPTIMIZER_TENSORS, framework="pt") as tensors:
        for label in tensors.keys():  # noqa: SIM118
            name, key = label.rsplit(SEPARATOR, 1)
            state.setdefault(indices[name], {})[key] = tensors.get_tensor(label)
    for label, value in rest["state"].items():
        name, key = label.rsplit(SEPARATOR, 1)
        state.setdefault(indices[name], {})[key] = value
    groups = [
        {**group, "params": [indices[name] for name in group["params"]]}
        for group in rest["param_groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return rest["scheduler"]


def save_rng_state(folder: Path) -> None:
    """Write the state of Python's, numpy's and torch's generators."""
    version, numbers, gauss = random.getstate()
    kind, key, position, has_gauss, cached = np.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.array(key, np.int64))}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, folder / RNG_TENSORS)
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
