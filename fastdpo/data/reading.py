"""Finding the rows in a local file, a folder, a set on the hub, or an object from Python."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from fastdpo.data.column_wise import rows_of_columns
from fastdpo.data.columns import SchemaReader
from fastdpo.data.compressed import COMPRESSED_ENDINGS, content_ending
from fastdpo.data.errors import ROW_SHAPE, DataError, UnknownSplitError
from fastdpo.data.json_lines import MAX_LINE_MIB, read_json, read_json_lines
from fastdpo.data.normalize import PreferenceRow
from fastdpo.data.ranked import (
    RATED_ALONE,
    NoPreference,
    check_rated,
    join_rated,
    prompt_key,
)
from fastdpo.data.sizes import check_files, check_table
from fastdpo.data.tables import (
    TABLE_ENDINGS,
    TEXT_ENDINGS,
    TransformedRows,
    check_only_text,
    is_saved_folder,
    read_csv,
    read_frame,
    read_saved,
    read_table,
    take_split,
)

FILE_ENDINGS = (".jsonl", ".json", *TABLE_ENDINGS)
COMPRESSIBLE = (".jsonl", ".json", *TEXT_ENDINGS)
"""The endings behind which a `COMPRESSED_ENDINGS` may stand."""
_LOCAL_REMEDY = f"pass the path of a local .jsonl file with a row like {ROW_SHAPE} on each line"


@dataclass(frozen=True)
class Rows:
    """Raw rows and where each of them came from.

    Attributes:
        source: the file or data set, for messages.
        rows: the rows, mappings of column to value or tuples (prompt, preferred, dispreferred); a
            sequence, or a stream whose length is not known.
        line_numbers: for JSON lines and CSV the line of each row, counted from 1.
        row_numbers: of each row in its source, where these rows are a part of it.
        columns: role -> column, what the user said about them (`--columns`).
        rated_pairs: how several rated completions to a prompt make pairs (`--rated_pairs`).
    """

    source: str
    rows: Iterable[Any]
    line_numbers: Sequence[int] | None = None
    row_numbers: Sequence[int] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    rated_pairs: str = "best_worst"

    def where(self, i: int) -> str:
        """The place of row `i` (counted from 0): "file.jsonl:17", else "source row 17"."""
        if self.line_numbers is not None:
            return f"{self.source}:{self.line_numbers[i]}"
        return f"{self.source} row {i if self.row_numbers is None else self.row_numbers[i]}"

    @property
    def is_stream(self) -> bool:
        """True where the rows come one by one and their number is not known."""
        return not hasattr(self.rows, "__len__")

    def __len__(self) -> int:
        if self.is_stream:
            raise TypeError(f"{self.source} is a stream: the number of its rows is not known")
        return len(self.rows)  # pyrefly: ignore[bad-argument-type]

    def take(self, numbers: Sequence[int]) -> "Rows":
        """Return some of the rows, in the order of `numbers`; each keeps its place for messages."""
        rows: Any = self.rows
        if hasattr(rows, "select"):
            taken = rows.select(numbers)
        else:
            taken = [rows[number] for number in numbers]
        lines, places = self.line_numbers, self.row_numbers
        return replace(
            self,
            rows=taken,
            line_numbers=None if lines is None else [lines[number] for number in numbers],
            row_numbers=numbers if places is None else [places[number] for number in numbers],
        )

    def preferences(
        self, descriptions: list[str] | None = None
    ) -> Iterator[tuple[int, list[PreferenceRow]]]:
        """Yield the number and the preferences of each row, read in the shape of the first row.

        Args:
            descriptions: gets one sentence on that shape once the first row is read.

        Raises:
            DataError: a row is malformed or of another shape; the text begins with its place and
                ends with how many later rows are malformed too.
        """
        reader: SchemaReader | None = None
        rows: Any = self.rows
        if hasattr(rows, "column_names") and not self.is_stream and len(self):
            reader = self._reader(0, rows[0])
            if reader.wanted is not None:
                rows = rows.select_columns([c for c in rows.column_names if c in reader.wanted])
        iterator: Iterator[tuple[int, Any]] = enumerate(rows)
        if reader is None:
            first = next(iterator, None)
            if first is None:
                return
            reader = self._reader(*first)
            iterator = chain([first], iterator)
        if reader.joins_rows:
            yield from self._joined(reader, iterator, descriptions)
            return
        for number, row in iterator:
            preferences = self._read(reader, number, row, iterator)
            if number == 0 and descriptions is not None:
                descriptions.append(reader.describe())
            yield number, preferences

    def _read(
        self, reader: SchemaReader, number: int, row: Any, later: Iterator[tuple[int, Any]]
    ) -> list[PreferenceRow]:
        """Read a row; the error of a malformed one says how many `later` ones are so too."""
        try:
            return reader.read(row)
        except DataError as error:
            others = 0 if self.is_stream else sum(_fails(reader.read, row) for _, row in later)
            more = f"; {others:,} later rows are malformed too" if others else ""
            raise DataError(f"{self.where(number)}: {error}{more}") from error

    def _joined(
        self,
        reader: SchemaReader,
        rows: Iterator[tuple[int, Any]],
        descriptions: list[str] | None,
    ) -> Iterator[tuple[int, list[PreferenceRow]]]:
        """Read rows of one rated completion each: those that follow each other for one prompt."""
        columns = reader.columns
        for _, group in groupby(rows, key=lambda numbered: prompt_key(numbered[1], columns)):
            together = list(group)
            for number, row in together:
                try:
                    check_rated(row, columns)
                except DataError as error:
                    raise DataError(f"{self.where(number)}: {error}") from error
            first = together[0][0]
            joined = join_rated([row for _, row in together], columns)
            preferences = self._read(reader, first, joined, iter(()))
            if first == 0 and descriptions is not None:
                descriptions.append(reader.describe())
            yield first, preferences if len(together) > 1 else NoPreference(RATED_ALONE)
            for number, _ in together[1:]:
                yield number, NoPreference(None)

    def _reader(self, number: int, first: Any) -> SchemaReader:
        try:
            return SchemaReader(first, self.columns, self.rated_pairs)
        except DataError as error:
            raise DataError(f"{self.where(number)}: {error}") from error


def _fails(read: Callable[[Any], Any], row: Any) -> bool:
    try:
        read(row)
    except DataError:
        return True
    return False


def read_rows(
    dataset: str,
    *,
    split: str = "train",
    config_name: str | None = None,
    columns: Mapping[str, str] | None = None,
    rated_pairs: str = "best_worst",
    streaming: bool = False,
    max_line_mib: int = MAX_LINE_MIB,
    **files: Any,
) -> Rows:
    """Read the rows of a data set.

    Args:
        dataset: path of a .jsonl, .json, .csv, .tsv, .parquet or .arrow file, those of text also
            as .jsonl.gz (.bz2, .xz, .zst), or of a pipe that JSON lines come from; or a folder (of
            files, or one that save_to_disk wrote) or the name of a set on the Hugging Face hub,
            which `datasets` then loads.
        split: which part, a slice such as "train[:90%]" included; a single file has only "train".
        config_name: the configuration of a hub set that has several.
        columns: role -> column, where the names are not recognised (see `fastdpo.data.columns`).
        rated_pairs: "best_worst" or "all", of several rated completions to a prompt.
        streaming: leave a folder's or a hub set's rows where they are until they are read; a
            single file is read as ever.
        max_line_mib: longer lines of JSON lines are an error.
        files: `data_dir` and `data_files` of a folder or hub set, as `datasets` takes them.

    Returns:
        At least one row.

    Raises:
        UnknownSplitError: the set has no such split; the text names those it has.
        DataError: nothing there, not reachable, or not readable; the text names file and line
            where there is one.
    """
    path = Path(dataset).expanduser()
    ending = path.suffix.lower()
    if ending in COMPRESSED_ENDINGS and content_ending(path) in COMPRESSIBLE:
        ending = content_ending(path)
    files = {name: value for name, value in files.items() if value is not None}
    if path.is_dir() and is_saved_folder(path):
        rows = _from_table(read_saved(path, split), f"{path}[{split}]")
    elif path.is_dir():
        rows = _load_set(str(path), split, config_name, streaming, files)
    elif is_pipe(path):
        rows = _read_file(path, ".jsonl", split, max_line_mib)
    elif path.is_file() and ending in FILE_ENDINGS:
        rows = _read_file(path, ending, split, max_line_mib)
    elif path.exists():
        raise DataError(
            f"{dataset} is not a file with one of the endings {', '.join(FILE_ENDINGS)} "
            f"({', '.join(COMPRESSED_ENDINGS)} behind those of text); unpack or convert it, or "
            f"{_LOCAL_REMEDY}"
        )
    elif ending in FILE_ENDINGS or dataset.startswith(("/", ".", "~")):
        raise DataError(f"there is no file {dataset}; check the path, or {_LOCAL_REMEDY}")
    else:
        rows = _load_set(dataset, split, config_name, streaming, files)
    return replace(_not_empty(rows), columns=dict(columns or {}), rated_pairs=rated_pairs)


def read_held_out(dataset: str, *, split: str = "test", **options: Any) -> Rows:
    """Read rows to evaluate on: every row of a single file, the `split` of anything else."""
    path = Path(dataset)
    whole = (path.is_file() or is_pipe(path)) and "[" not in split
    return read_rows(dataset, split="train" if whole else split, **options)


def is_pipe(path: Path) -> bool:
    """True where JSON lines can be read from it only once: a FIFO, or a shell's /dev/..."""
    return path.is_fifo() or path.is_char_device() or path.is_relative_to("/dev")


def rows_from(
    dataset: Any,
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    rated_pairs: str = "best_worst",
) -> Rows:
    """Take rows that are already in memory, or that come one by one.

    Args:
        dataset: a `datasets.Dataset` or `IterableDataset`, a list of dicts or of tuples (prompt,
            preferred, dispreferred), a dict of lists, a pandas frame, or a generator of rows.
        source: what to call it in messages.
        columns: role -> column, where the names are not recognised (see `fastdpo.data.columns`).
        rated_pairs: "best_worst" or "all", of several rated completions to a prompt.

    Returns:
        The rows, at least one where their number is known. Streams keep no text: their pairs are
        tokenised as they come, when `prepare_pairs` asks for them.

    Raises:
        DataError: it is something else, or empty.
    """
    if isinstance(dataset, Rows):
        return dataset
    if (by_columns := rows_of_columns(dataset, source)) is not None:
        dataset = by_columns
    elif hasattr(dataset, "to_pylist") or hasattr(dataset, "to_dicts"):  # pyarrow, polars
        dataset = dataset.to_pylist() if hasattr(dataset, "to_pylist") else dataset.to_dicts()
    if isinstance(dataset, Mapping):
        raise DataError(
            f"{source} is a {type(dataset).__name__} with the parts {list(dataset)}; pass one of "
            f'them, for example dataset["{next(iter(dataset), "train")}"]'
        )
    if hasattr(dataset, "to_dict") and hasattr(dataset, "columns"):
        dataset = read_frame(dataset, source)
    if hasattr(dataset, "column_names") and hasattr(dataset, "with_format"):
        rows = _from_table(dataset, source)
    elif isinstance(dataset, Iterable) and not isinstance(dataset, str | bytes):
        rows = Rows(source, dataset)
    else:
        raise DataError(
            f"{source} is of type {type(dataset).__name__}; a datasets.Dataset, a list of dicts, a "
            f"pandas frame or a generator of rows is needed, with rows like {ROW_SHAPE}"
        )
    return replace(_not_empty(rows), columns=dict(columns or {}), rated_pairs=rated_pairs)


def _not_empty(rows: Rows) -> Rows:
    if not rows.is_stream and len(rows) == 0:
        raise DataError(f"{rows.source}: there are no rows in it; rows like {ROW_SHAPE} are needed")
    return rows


def _read_file(path: Path, ending: str, split: str, max_line_mib: int) -> Rows:
    if not split.startswith("train"):
        take_split(split, "train", 1, str(path))  # refused before the file is read
    if ending == ".jsonl":
        rows = Rows(str(path), *read_json_lines(path, max_line_mib=max_line_mib))
    elif ending == ".json":
        rows = Rows(str(path), *read_json(path, max_line_mib=max_line_mib))
    elif ending in (".csv", ".tsv"):
        rows = Rows(str(path), *read_csv(path))
    else:
        table = read_table(path)
        check_table(table, str(path), path.stat().st_size, max_line_mib)
        rows = _from_table(table, str(path))
    if split == "train":
        return rows
    taken = rows.take(take_split(split, "train", len(rows), str(path)))
    return replace(taken, source=f"{path}[{split}]" if rows.line_numbers is None else str(path))


def _from_table(table: Any, source: str) -> Rows:
    """Take a datasets.Dataset or IterableDataset, to be read as plain Python values.

    A transform of the set is kept: what `dataset[i]` is, is read.
    """
    if (getattr(table, "format", None) or {}).get("type") == "custom":
        return Rows(source, TransformedRows(table))
    check_only_text(table, source)
    return Rows(source, table.with_format(None))


def _load_set(
    name: str, split: str, config_name: str | None, streaming: bool, files: dict[str, Any]
) -> Rows:
    """Load a folder or a hub set through `datasets`."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if Path(name).is_dir():
            _check_folder(name, config_name, files)
        loaded = load_dataset(name, config_name, split=split, streaming=streaming, **files)
    except DataError:
        raise
    except (OSError, ValueError, DatasetsError, HfHubHTTPError) as error:
        text = f"{type(error).__name__}: {error}"
        if "split" in str(error) and isinstance(error, ValueError):
            raise UnknownSplitError(
                f"split {split!r} was asked of {name}: {error}; pass one of the splits there are"
            ) from error
        if "onfig" in str(error) and isinstance(error, ValueError):
            raise DataError(f"{name} has several configurations: {error}; pass one by name") from (
                error
            )
        if Path(name).is_dir():
            raise DataError(
                f"{name} is a folder in which no data can be read ({text}); pass a file in it, or "
                f"{_LOCAL_REMEDY}"
            ) from error
        raise DataError(
            f"{name!r} is no local file, and as a set on the Hugging Face hub it could not be "
            f"loaded ({text}); check the name, your connection and HF_HUB_OFFLINE, or "
            f"{_LOCAL_REMEDY}"
        ) from error
    return _from_table(loaded, f"{name}[{split}]")


def _check_folder(name: str, config_name: str | None, files: dict[str, Any]) -> None:
    """Refuse a folder whose README.md names files outside it, or whose files unpack to too much.

    Raises:
        DataError: names the file.
    """
    from datasets import config, load_dataset_builder

    folder = Path(os.path.abspath(name))
    builder = load_dataset_builder(name, config_name, **files)
    named = [str(file) for part in (builder.config.data_files or {}).values() for file in part]
    for file in named:
        outside = "://" in file or not Path(os.path.abspath(file)).is_relative_to(folder)
        if outside and not files:
            raise DataError(
                f"the README.md of {name} names {file}, which lies outside that folder; correct "
                "it, or pass the file itself"
            )
    local = [Path(file) for file in named if "://" not in file]
    check_files(local, name, Path(config.HF_DATASETS_CACHE))
