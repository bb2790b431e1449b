"""Values of Python and torch as JSON that comes back as what it was: types, bits and all.

JSON alone makes keys text, tuples lists, and refuses infinity, so a scheduler's or an optimizer's
state would come back as another one. What JSON keeps is written as it is, and so is read in files
from before this encoding. Everything else is an object with one key that begins with "$".
"""

import math
from collections import Counter
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdpo.trainer.checkpoint.errors import CheckpointError

MARK = "$"
"""Begins the key of every object that stands for a value that JSON does not have."""


def encode(value: Any, label: str, tensors: MutableMapping[str, Tensor]) -> Any:
    """The value in what JSON keeps, its tensors apart.

    Args:
        value: None, numbers of Python and numpy, text, tensors, arrays, dtypes, devices, and dicts,
            Counters, lists, tuples and sets of such, to any depth.
        label: names the value in errors, and begins the names of its tensors.
        tensors: the tensors within are added to it, as they are, under names of their own.

    Raises:
        CheckpointError: something in it is of another type; says where and what.
    """

    def inside(parts: Any) -> list[Any]:
        return [encode(part, label, tensors) for part in parts]

    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):  # numpy's float64 is one
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, np.generic):
        return {"$numpy": [value.dtype.str, encode(value.item(), label, tensors)]}
    if isinstance(value, np.ndarray):
        return {"$array": encode(torch.from_numpy(value), label, tensors)}
    if type(value) in (Tensor, nn.Parameter):
        name = f"{label}::{MARK}{len(tensors)}"
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, Counter):
        return {"$counter": [inside(pair) for pair in value.items()]}
    if isinstance(value, Mapping) and not any(isinstance(key, Tensor) for key in value):
        if all(isinstance(key, str) and not key.startswith(MARK) for key in value):
            return {key: encode(part, f"{label}.{key}", tensors) for key, part in value.items()}
        return {"$dict": [inside(pair) for pair in value.items()]}
    if isinstance(value, list):
        return inside(value)
    if isinstance(value, tuple):
        return {"$tuple": inside(value)}
    if isinstance(value, set | frozenset):
        return {"$set": inside(sorted(value, key=repr))}
    if isinstance(value, torch.dtype | torch.device):
        return {f"${type(value).__name__}": str(value).removeprefix("torch.")}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise CheckpointError(
        f"{label} is a {kind}, which no checkpoint can keep: choose another --optim or "
        "--lr_scheduler_type, or pass --save_only_model true (no resuming)."
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `encode` was given, its tensors among those named."""
    if isinstance(value, list):
        return [decode(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    (kind,) = value if len(value) == 1 else (None,)
    if not isinstance(kind, str) or not kind.startswith(MARK):
        return {key: decode(part, tensors) for key, part in value.items()}
    inside = value[kind]
    if kind == "$tensor":
        return tensors[inside]
    if kind == "$dtype":
        return getattr(torch, inside)
    inside = decode(inside, tensors)
    makers: dict[str, Any] = {
        "$float": float,
        "$numpy": lambda pair: np.dtype(pair[0]).type(pair[1]),
        "$array": lambda tensor: tensor.numpy(),
        "$counter": lambda pairs: Counter(dict(pairs)),
        "$dict": dict,
        "$tuple": tuple,
        "$set": set,
        "$device": torch.device,
    }
    return makers[kind](inside)
