"""Opening files of text that may be compressed, as data sets are published: pairs.jsonl.gz."""

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from fastdpo.data.errors import DataError
from fastdpo.data.sizes import check_ratio


def _open_zstd(path: Path) -> Any:
    from pyarrow import CompressedInputStream, OSFile

    return CompressedInputStream(OSFile(str(path)), "zstd")


_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
COMPRESSED_ENDINGS = tuple(_OPENERS)
"""Endings of compressed files; the ending of the content stands in front."""


def content_ending(path: Path) -> str:
    """The ending of a file's content in lower case: .jsonl of pairs.jsonl and of pairs.jsonl.gz."""
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() if ending in _OPENERS else ending


def open_content(path: Path) -> BinaryIO:
    """Open a file to read its bytes, unpacked where its name says that it is compressed.

    Raises:
        DataError: from reading too: the file is damaged, of another kind than its name says, or
            unpacks to far more than a text does.
        OSError: it cannot be opened.
    """
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        return path.open("rb")
    return io.BufferedReader(_Unpacked(path, opener(path)))


class _Unpacked(io.RawIOBase):
    """The bytes that a compressed file unpacks to, counted as they come."""

    def __init__(self, path: Path, stream: Any):
        self._path, self._stream = path, stream
        self._packed_bytes, self._bytes = path.stat().st_size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            piece = self._stream.read(len(buffer))
        except (EOFError, OSError, lzma.LZMAError, zlib.error, ValueError) as error:
            raise DataError(
                f"{self._path} cannot be unpacked as {self._path.suffix.lower()} ({error}); copy "
                "or download it again, or give it the ending that belongs to it"
            ) from error
        self._bytes += len(piece)
        check_ratio(self._bytes, self._packed_bytes, str(self._path))
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self._stream.close()
        super().close()
