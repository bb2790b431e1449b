"""State of a run beside its weights, without pickle: moments by parameter name, generators."""

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastdpo.system import files
from fastdpo.trainer.checkpoint.errors import CheckpointError
from fastdpo.trainer.checkpoint.typed_json import MARK, decode, encode

OPTIMIZER_TENSORS, OPTIMIZER_REST = "optimizer.safetensors", "optimizer.json"
RNG_TENSORS, RNG_REST = "rng_state.safetensors", "rng_state.json"
EXTRA_STATE = "further.safetensors"
SEPARATOR = "::"
"""Between a parameter's name and the name of one of its moments, and where moments are nested."""


def save_optimizer(
    folder: Path, optimizer: Optimizer, scheduler: LRScheduler, model: nn.Module
) -> None:
    """Write moments by parameter name as safetensors, everything else as typed JSON.

    Raises:
        CheckpointError: the state holds something that no checkpoint can keep.
        OSError: the disk is full or failing.
    """
    tensors, rest = _encoded(optimizer, scheduler, model)
    # Copies: parameters may share a tensor (bitsandbytes' code books).
    copies = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
    files.call_writer(folder / OPTIMIZER_TENSORS, lambda path: save_file(copies, path))
    files.write_json(folder / OPTIMIZER_REST, rest)


def require_savable(optimizer: Optimizer, scheduler: LRScheduler, model: nn.Module) -> None:
    """Refuse optimizers and schedulers whose state, as it is now, no checkpoint can keep.

    Raises:
        CheckpointError: says what it is and what to do.
    """
    _encoded(optimizer, scheduler, model)


def _encoded(
    optimizer: Optimizer, scheduler: LRScheduler, model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of both: the tensors by name, and everything else in what JSON keeps."""
    names = _names_by_index(optimizer, model)
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for index, moments in state["state"].items():
        for label, value in _flat(moments, names[index]):
            if type(value) is Tensor:
                tensors[label] = value
            else:
                rest[label] = encode(value, label, tensors)
    groups = [
        {**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]
    ]
    return tensors, {
        "optimizer": _kind(optimizer, "optimizer"),
        "scheduler_kind": _kind(scheduler, "scheduler"),
        "shapes": _shapes(optimizer, model),
        "state": rest,
        "param_groups": encode(groups, "the optimizer's groups", tensors),
        "scheduler": encode(scheduler.state_dict(), "the scheduler", tensors),
    }


def load_optimizer(
    folder: Path, optimizer: Optimizer, scheduler: LRScheduler, model: nn.Module
) -> None:
    """Put the moments back by parameter name, and the scheduler's state.

    Raises:
        CheckpointError: the checkpoint's parameters, their shapes or their grouping are not the
            optimizer's, or it is of another kind of optimizer or scheduler.
    """
    names = _names_by_index(optimizer, model)
    rest = json.loads((folder / OPTIMIZER_REST).read_text())
    _require_same_kind(folder, rest, optimizer, scheduler)
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
    with safe_open(folder / OPTIMIZER_TENSORS, framework="pt") as file:
        tensors = {label: file.get_tensor(label) for label in file.keys()}  # noqa: SIM118
    moments = {n: t for n, t in tensors.items() if f"{SEPARATOR}{MARK}" not in n}
    moments |= {label: decode(value, tensors) for label, value in rest["state"].items()}
    for label, value in moments.items():
        name, *outer, key = label.split(SEPARATOR)
        entry = state.setdefault(indices[name], {})
        for part in outer:
            entry = entry.setdefault(part, {})
        entry[key] = value
    groups = _in_the_order_of(optimizer, names, decode(rest["param_groups"], tensors))
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    _restore_dtypes(optimizer, state)
    state_of_scheduler = decode(rest["scheduler"], tensors)
    if "scheduler_kind" not in rest:  # format 1
        state_of_scheduler = _with_integer_keys(state_of_scheduler, scheduler.state_dict())
    scheduler.load_state_dict(state_of_scheduler)


def _with_integer_keys(saved: Any, current: Any) -> Any:
    """A state from JSON whose keys became text, with integers where the current one has them."""
    if isinstance(saved, dict) and isinstance(current, dict):
        if current and all(isinstance(key, int) for key in current):
            return type(current)({int(key): value for key, value in saved.items()})
        return {key: _with_integer_keys(part, current.get(key)) for key, part in saved.items()}
    if isinstance(saved, list) and isinstance(current, list) and len(saved) == len(current):
        return [_with_integer_keys(*pair) for pair in zip(saved, current, strict=True)]
    return saved


def _kind(wrapped: Any, inside: str) -> str:
    """The class that computes, below accelerate's wrapper: its package and name."""
    kind = type(getattr(wrapped, inside, wrapped))
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def _require_same_kind(
    folder: Path, rest: Mapping[str, Any], optimizer: Optimizer, scheduler: LRScheduler
) -> None:
    """Refuse the state of another kind; checkpoints of format 1 do not say, but groups tell."""
    for option, key, now in (
        ("optim", "optimizer", _kind(optimizer, "optimizer")),
        ("lr_scheduler_type", "scheduler_kind", _kind(scheduler, "scheduler")),
    ):
        if (before := rest.get(key, now)) != now:
            raise CheckpointError(
                f"{folder} holds the state of {before} and this run has {now}: resume with the "
                f"same --{option}, or start anew in another output_dir."
            )
    missing = {
        name
        for ours, saved in zip(optimizer.param_groups, rest["param_groups"], strict=False)
        for name in ours.keys() - saved.keys()
        if name != "initial_lr"  # which a scheduler adds
    }
    if missing and "optimizer" not in rest:
        raise CheckpointError(
            f"{folder} holds the state of another optimizer, without {', '.join(sorted(missing))}: "
            "resume with the same --optim, or start anew in another output_dir."
        )


def _restore_dtypes(optimizer: Optimizer, saved: Mapping[int, Mapping[str, Any]]) -> None:
    """Give each moment its dtype back: torch casts them to that of their parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moments in saved.items():
        state = optimizer.state[parameters[index]]
        for key, value in moments.items():
            loaded = state.get(key)
            if (
                isinstance(value, Tensor)
                and isinstance(loaded, Tensor)
                and value.dtype != loaded.dtype
            ):
                state[key] = value.to(loaded.device)


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
    files.call_writer(folder / RNG_TENSORS, lambda path: save_file(tensors, path))
    rest = {"python": [version, list(numbers), gauss], "numpy": [kind, position, has_gauss, cached]}
    files.write_json(folder / RNG_REST, rest)


def load_rng_state(folder: Path) -> None:
    """Restore the state of every generator."""
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


def save_extra_state(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write other tensors that training changes; without any there is no file.

    Raises:
        OSError: the disk is full or failing.
    """
    if tensors:
        # Copies: tied weights share one tensor, which safetensors refuses.
        copies = {name: each.detach().to("cpu", copy=True) for name, each in tensors.items()}
        files.call_writer(folder / EXTRA_STATE, lambda path: save_file(copies, path))


def load_extra_state(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors that `save_extra_state` wrote into the given ones.

    Raises:
        CheckpointError: the file has other tensors.
    """
    if not tensors:
        return
    with safe_open(folder / EXTRA_STATE, framework="pt") as saved:
        if set(saved.keys()) != set(tensors):
            raise CheckpointError(
                f"{folder / EXTRA_STATE} holds other tensors than this run moves: resume with "
                "the same model and adapter."
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(saved.get_tensor(name))


def _names_by_index(optimizer: Optimizer, model: nn.Module) -> dict[int, str]:
    """Parameter names in the order in which state_dict() counts the parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {index: names[id(parameter)] for index, parameter in enumerate(parameters)}


def _shapes(optimizer: Optimizer, model: nn.Module) -> dict[str, list[int]]:
    parameters = dict(model.named_parameters())
    return {n: list(parameters[n].shape) for n in _names_by_index(optimizer, model).values()}


def _flat(moments: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Labels and values of all moments; bitsandbytes' optimizers nest theirs in another dict."""
    for key, value in moments.items():
        label = f"{prefix}{SEPARATOR}{key}"
        if isinstance(value, dict) and value and all(isinstance(each, str) for each in value):
            yield from _flat(value, label)
        else:
            yield label, value


def _in_the_order_of(
    optimizer: Optimizer, names: dict[int, str], saved: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The saved groups in the optimizer's order, each with its parameters: torch goes by position.

    Raises:
        CheckpointError: a group of the optimizer is not among the saved ones.
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
        found = by_members[frozenset(members)]
        groups.append({**_on_device_of(group, found), "params": group["params"]})
    return groups


def _on_device_of(group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved group, its tensors (a learning rate) where this run's optimizer has them."""
    devices = {name: each.device for name, each in group.items() if isinstance(each, Tensor)}
    return {
        name: each.to(devices[name]) if isinstance(each, Tensor) and name in devices else each
        for name, each in saved.items()
    }
