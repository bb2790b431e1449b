"""Safetensors files read and written one tensor at a time.

The format is 8 bytes of length, a JSON header of names, dtypes, shapes and byte ranges, then the
bytes of the tensors one after another. Writing through the library needs every tensor of a file in
memory at once; here only the one in hand is.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The dtypes that may be trained; tensors of any other are copied byte by byte."""

_PIECE_BYTES = 2**24
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that lies in a file.

    Attributes:
        path: the safetensors file.
        dtype: as safetensors names it, "BF16" for example.
        shape: its sizes.
        start: where its bytes begin in the file.
        end: where they end.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def read(self) -> Tensor:
        """The tensor, in its own dtype, which must be one of `DTYPES`."""
        if not prod(self.shape):
            return torch.empty(self.shape, dtype=DTYPES[self.dtype])
        with self.path.open("rb") as file:
            file.seek(self.start)
            content = bytearray(self.end - self.start)
            if file.readinto(content) != len(content):
                raise ValueError(f"{self.path} ends too early: copy or download it again.")
        return torch.frombuffer(content, dtype=DTYPES[self.dtype]).reshape(self.shape)

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, a few MiB at a time."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.end - self.start
            while left:
                piece = file.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise ValueError(f"{self.path} ends too early: copy or download it again.")
                left -= len(piece)
                yield piece


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor that is computed when its turn to be written comes."""

    dtype: str
    shape: tuple[int, ...]
    compute: Callable[[], Tensor]

    def pieces(self) -> Iterator[memoryview]:
        """Its bytes, in one piece without a copy."""
        tensor = self.compute().to(DTYPES[self.dtype]).contiguous()
        assert tuple(tensor.shape) == self.shape, (tensor.shape, self.shape)
        yield tensor.reshape(-1).view(torch.uint8).numpy().data  # pyrefly: ignore[invalid-yield]


def tensors_of(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises:
        ValueError: it is no such file, or cut short.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if length > size:
                raise ValueError("its header is cut short")
            header = json.loads(file.read(length))
        found = {
            name: StoredTensor(
                path,
                entry["dtype"],
                tuple(entry["shape"]),
                *(8 + length + offset for offset in entry["data_offsets"]),
            )
            for name, entry in header.items()
            if name != _METADATA
        }
        if max((tensor.end for tensor in found.values()), default=0) > size:
            raise ValueError("it is cut short")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): copy or download it again."
        ) from error
    return dict(sorted(found.items(), key=lambda item: item[1].start))


def write_tensors(path: Path, tensors: Iterable[tuple[str, StoredTensor | NewTensor]]) -> None:
    """Write a safetensors file, holding one tensor in memory at a time."""
    tensors = list(tensors)
    header: dict[str, object] = {_METADATA: {"format": "pt"}}
    offset = 0
    for name, tensor in tensors:
        end = offset + bytes_of(tensor)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            for piece in tensor.pieces():
                file.write(piece)


def bytes_of(tensor: StoredTensor | NewTensor) -> int:
    """Bytes that the tensor takes in a file."""
    if isinstance(tensor, StoredTensor):
        return tensor.end - tensor.start
    return prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
