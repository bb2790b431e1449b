"""Tensors in safetensors files: read one at a time, written one file at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdpo.modeling.finite import named, nonfinite_tensors
from fastdpo.system import files

MERGEABLE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Tensors of any other dtype can't be trained; they are copied byte by byte."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that lies in a safetensors file."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int

    def read(self) -> Tensor:
        """The tensor, mapped from the file: it takes memory where it is used."""
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.name)


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor that is computed when its file is written; `compute` may give a wider dtype."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    compute: Callable[[], Tensor]

    def read(self) -> Tensor:
        """The tensor in its own dtype."""
        tensor = self.compute().to(self.dtype).contiguous()
        assert tuple(tensor.shape) == self.shape, (tensor.shape, self.shape)
        return tensor


def tensors_of(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; none is read yet.

    Raises:
        ValueError: it is no such file, or cut short.
    """
    try:
        with safe_open(path, "pt") as file:
            mapped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): copy or download it again."
        ) from error
    return {
        name: StoredTensor(path, name, tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        for name, tensor in mapped.items()
    }


def check_mergeable(tensor: StoredTensor) -> None:
    """Refuse a tensor to which nothing can be added.

    Raises:
        ValueError: its dtype is no floating point type of at least 16 bits.
    """
    if tensor.dtype not in MERGEABLE_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in MERGEABLE_DTYPES)
        raise ValueError(
            f"{tensor.path}: {tensor.name} is of dtype {str(tensor.dtype).removeprefix('torch.')}; "
            f"{known} can be merged."
        )


def write_tensors(path: Path, tensors: Mapping[str, StoredTensor | NewTensor]) -> None:
    """Write a safetensors file; its new tensors are in memory together, stored ones are mapped.

    Raises:
        ValueError: a new tensor is not finite.
        OSError: the disk is full or failing.
    """
    content = {name: each.read() for name, each in tensors.items()}
    new = {name: content[name] for name, each in tensors.items() if isinstance(each, NewTensor)}
    if wrong := nonfinite_tensors(new):
        dtype = str(content[wrong[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"merged, {named(wrong, len(content))} of {path.name} is not finite in {dtype}: look "
            "at the base's weights, or merge into a base that is stored in bfloat16 or float32."
        )
    files.call_writer(path, lambda path: save_file(content, path, {"format": "pt"}))
