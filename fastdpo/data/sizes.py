"""Sizes checked before anything is unpacked: tables, archives and compressed files.

A file of two kilobytes can hold five gigabytes of one letter. What a file unpacks to is counted
where it says so itself, and otherwise read through piece by piece, without keeping any of it.
"""

import lzma
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastdpo.data.errors import DataError
from fastdpo.system.files import free_bytes

MOST_RATIO = 1000
"""How many times larger than its file a data set may be; text compresses to a tenth or so."""
FREE_OF_DOUBT_BYTES = 2**28
"""Up to here any ratio is let be."""

_ENOUGH_OF_A_HEADER = 512
_MAGIC = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4", b"PK\x03\x04": "zip", b"PK\x05\x06": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar",
}  # fmt: skip
_PIECE_BYTES = 2**20


def check_table(table: Any, source: str, file_bytes: int, max_row_mib: int) -> None:
    """Refuse a table with a text that is too long, or far larger than the file that it comes from.

    Args:
        table: a `datasets.Dataset`; its columns may repeat one text by a dictionary.
        source: for messages.
        file_bytes: size of its file.
        max_row_mib: most MiB of a text.

    Raises:
        DataError: names the column.
    """
    total = 8 * table.num_rows
    for name in table.column_names:
        for chunk in table.data.column(name).chunks:
            longest, together = _text_bytes(chunk)
            total += together
            if longest > max_row_mib * 2**20:
                raise DataError(
                    f"{source}: column {name!r} holds a text of {longest / 2**20:,.0f} MiB, longer "
                    f"than {max_row_mib} MiB, which is rarely a part of a preference pair; remove "
                    "the row, or raise --max_line_mib"
                )
    check_ratio(total, file_bytes, source)


def check_files(paths: Iterable[Path], source: str, cache: Path) -> None:
    """Refuse files that unpack to far more than they are, or to more than the disk has room for.

    Args:
        paths: the files of a data set, compressed or not.
        source: for messages.
        cache: folder that `datasets` unpacks and copies them into; it may not exist yet.

    Raises:
        DataError: names the file, its size and what it unpacks to.
    """
    total = 0
    for path in paths:
        size = path.stat().st_size
        unpacked = 0
        for piece in _unpacked(path):
            unpacked += piece
            check_ratio(unpacked, size, str(path))
        total += unpacked
    while not cache.exists():
        cache = cache.parent
    if 2 * total > (free := free_bytes(cache)):
        raise DataError(
            f"{source} unpacks to {total / 2**20:,.0f} MiB, which `datasets` writes twice into "
            f"{cache}, where {free / 2**20:,.0f} MiB are free; make room there, or set HF_HOME to "
            "a folder on another disk"
        )


def check_ratio(unpacked: int, packed: int, source: str) -> None:
    """Refuse what is more than `MOST_RATIO` times as large unpacked as it is packed.

    Raises:
        DataError: names the source and both sizes.
    """
    if unpacked > max(FREE_OF_DOUBT_BYTES, MOST_RATIO * packed):
        raise DataError(
            f"{source}: a file of {packed:,} bytes unpacks to {unpacked / 2**20:,.0f} MiB or more, "
            f"over {MOST_RATIO:,} times its size, which no text does; get it from where it was "
            "made, or pass its rows as a .jsonl file"
        )


def _unpacked(path: Path) -> Iterator[int]:
    """Sizes of the parts that a file unpacks to, compressed by itself or an archive."""
    with path.open("rb") as file:
        header = file.read(_ENOUGH_OF_A_HEADER)
    kind = next((kind for magic, kind in _MAGIC.items() if header.startswith(magic)), "")
    try:
        if kind in ("7z", "rar"):
            raise DataError(f"{path} is a {kind} archive; unpack it, and pass the file in it")
        if header[257:262] == b"ustar":
            with tarfile.open(path, "r:") as tar:
                yield from (member.size for member in tar)
        elif kind == "zip":
            with zipfile.ZipFile(path) as archive:
                yield from (member.file_size for member in archive.infolist())
        elif kind:
            yield from _decompressed(path, kind)
        elif header.startswith(b"PAR1"):
            yield parquet_bytes(path)
        else:
            yield path.stat().st_size
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, EOFError, OSError) as error:
        raise DataError(
            f"{path} is a damaged {kind or 'archive'} ({error}); copy or download it again"
        ) from error


def _decompressed(path: Path, kind: str) -> Iterator[int]:
    """Sizes of the pieces of a compressed file, read through once."""
    if kind == "xz":
        with lzma.open(path) as stream:
            yield from _pieces(stream)
        return
    from pyarrow import CompressedInputStream, OSFile

    codec = {"gzip": "gzip", "bzip2": "bz2", "zstd": "zstd", "lz4": "lz4"}[kind]
    with CompressedInputStream(OSFile(str(path)), codec) as stream:
        yield from _pieces(stream)


def _pieces(stream: Any) -> Iterator[int]:
    while piece := stream.read(_PIECE_BYTES):
        yield len(piece)


def parquet_bytes(path: Path) -> int:
    """Bytes of the rows of a Parquet file; texts that a dictionary repeats stay packed meanwhile.

    Raises:
        DataError: its rows alone are too many for its size.
    """
    from pyarrow import parquet

    metadata = parquet.read_metadata(path)
    check_ratio(8 * metadata.num_rows * metadata.num_columns, path.stat().st_size, str(path))
    columns = [metadata.schema.column(index) for index in range(metadata.num_columns)]
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    return sum(
        _text_bytes(chunk)[1]
        for column in parquet.read_table(path, read_dictionary=texts).columns
        for chunk in column.chunks
    )


def could_be_far_larger(path: Path) -> bool:
    """Return True if a Parquet file repeats texts by a dictionary so often that it is counted."""
    from pyarrow import parquet

    metadata = parquet.read_metadata(path)
    most = 8 * metadata.num_rows * metadata.num_columns
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            repeats = column.num_values if column.has_dictionary_page else 1
            most += repeats * column.total_uncompressed_size
    return most > max(FREE_OF_DOUBT_BYTES, MOST_RATIO * path.stat().st_size)


def _text_bytes(array: Any) -> tuple[int, int]:
    """Bytes of the longest text in an Arrow array of any type, and of all texts together."""
    from pyarrow import types

    kind = array.type
    if types.is_dictionary(kind):
        lengths = _lengths(array.dictionary)
        lengths = None if lengths is None else lengths.take(array.indices)
    elif types.is_struct(kind):
        return _both(array.field(index) for index in range(kind.num_fields))
    elif types.is_map(kind):
        return _both((array.keys, array.items))
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _text_bytes(array.flatten())
    else:
        lengths = _lengths(array)
    if lengths is None or len(lengths) == 0:
        return 0, array.nbytes
    return _computed("max", lengths).as_py() or 0, _computed("sum", lengths).as_py() or 0


def _lengths(array: Any) -> Any:
    """The length of each text in 64 bits; None where the array holds none."""
    import pyarrow
    from pyarrow import types

    texts = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    if not any(is_text(array.type) for is_text in texts):
        return None
    return _computed("binary_length", array).cast(pyarrow.int64())


def _computed(function: str, array: Any) -> Any:
    """The result of one of Arrow's compute functions on an array."""
    from pyarrow import compute

    return compute.call_function(function, [array])


def _both(arrays: Iterable[Any]) -> tuple[int, int]:
    sizes = [_text_bytes(array) for array in arrays]
    return max((longest for longest, _ in sizes), default=0), sum(size for _, size in sizes)
