"""Finding the rows: a local file, a folder, a set on the hub, or an object from Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdpo.data.errors import ROW_SHAPE, DataError, UnknownSplitError
from fastdpo.data.formats import USED_COLUMNS
from fastdpo.data.json_lines import read_json, read_json_lines

FILE_ENDINGS = (".jsonl", ".json", ".parquet", ".csv", ".arrow")
_LOCAL_REMEDY = f"pass the path of a local .jsonl file with a row like {ROW_SHAPE} on each line"


@dataclass(frozen=True)
class Rows:
    """Raw rows and where each of them came from.

    Attributes:
        source: the file or data set, for messages.
        rows: the rows, mappings of column to value.
        line_numbers: for JSON lines the line of each row, counted from 1.
    """

    source: str
    rows: Sequence[Mapping[str, Any]]
    line_numbers: Sequence[int] | None = None

    def where(self, i: int) -> str:
        """The place of row `i` (counted from 0): "file.jsonl:17", else "source row 17"."""
        if self.line_numbers is not None:
            return f"{self.source}:{self.line_numbers[i]}"
        return f"{self.source} row {i}"

    def __len__(self) -> int:
        return len(self.rows)


def read_rows(dataset: str, *, split: str = "train", config_name: str | None = None) -> Rows:
    """Read the rows of a data set.

    Args:
        dataset: path of a .jsonl, .json, .parquet, .csv or .arrow file; or a folder or the name of
            a set on the Hugging Face hub, which `datasets` then loads.
        split: which part; a single file has only "train".
        config_name: the configuration of a hub set that has several.

    Returns:
        At least one row.

    Raises:
        UnknownSplitError: the set has no such split; the text names those it has.
        DataError: nothing there, not reachable, or not readable; the text names file and line
            where there is one.
    """
    path = Path(dataset).expanduser()
    ending = path.suffix.lower()
    if path.is_dir():
        rows = _load_set(str(path), split, config_name)
    elif path.is_file() and ending in FILE_ENDINGS:
        rows = _read_file(path, ending, split)
    elif path.exists():
        raise DataError(
            f"{dataset} is not a file with one of the endings {', '.join(FILE_ENDINGS)}; unpack or "
            f"convert it, or {_LOCAL_REMEDY}"
        )
    elif ending in FILE_ENDINGS or dataset.startswith(("/", ".", "~")):
        raise DataError(f"there is no file {dataset}; check the path, or {_LOCAL_REMEDY}")
    else:
        rows = _load_set(dataset, split, config_name)
    return _not_empty(rows)


def read_held_out(dataset: str, *, split: str = "test", config_name: str | None = None) -> Rows:
    """`read_rows` for evaluation: of a single file every row, of anything else its `split`."""
    return read_rows(
        dataset, split="train" if Path(dataset).is_file() else split, config_name=config_name
    )


def rows_from(dataset: Any, source: str) -> Rows:
    """Take rows that are already in memory.

    Args:
        dataset: a `datasets.Dataset`, a list of dicts, or a pandas frame.
        source: what to call it in messages.

    Returns:
        At least one row.

    Raises:
        DataError: it is something else, or empty.
    """
    if isinstance(dataset, Rows):
        return dataset
    if isinstance(dataset, Mapping):
        raise DataError(
            f"{source} is a {type(dataset).__name__} with the parts {list(dataset)}; pass one of "
            f'them, for example dataset["{next(iter(dataset), "train")}"]'
        )
    if hasattr(dataset, "to_dict") and hasattr(dataset, "columns"):
        from datasets import Dataset

        dataset = Dataset.from_pandas(dataset, preserve_index=False)
    if hasattr(dataset, "column_names") and hasattr(dataset, "with_format"):
        if not hasattr(dataset, "__len__"):
            raise DataError(
                f"{source} is a stream ({type(dataset).__name__}); rows are needed whose number is "
                "known: load the set without streaming=True, or pass a list of dicts"
            )
        return _not_empty(_from_arrow(dataset, source))
    if isinstance(dataset, Sequence) and not isinstance(dataset, str | bytes):
        return _not_empty(Rows(source, dataset))
    raise DataError(
        f"{source} is of type {type(dataset).__name__}; a datasets.Dataset, a list of dicts or a "
        f"pandas frame is needed, with rows like {ROW_SHAPE}"
    )


def _not_empty(rows: Rows) -> Rows:
    if len(rows) == 0:
        raise DataError(f"{rows.source}: there are no rows in it; rows like {ROW_SHAPE} are needed")
    return rows


def _read_file(path: Path, ending: str, split: str) -> Rows:
    if split != "train":
        raise UnknownSplitError(
            f"split {split!r} was asked of {path}, which is one file and so has one split, "
            "'train'; pass split='train', or the path of the file that holds the other rows"
        )
    if ending == ".jsonl":
        return Rows(str(path), *read_json_lines(path))
    if ending == ".json":
        return Rows(str(path), *read_json(path))
    return _read_table(path, ending)


def _read_table(path: Path, ending: str) -> Rows:
    """Parquet, CSV or Arrow, read without a copy in the user's cache folder."""
    import pyarrow
    from datasets import Dataset

    try:
        if ending == ".parquet":
            from pyarrow import parquet

            table = Dataset(parquet.read_table(path))
        elif ending == ".csv":
            from pyarrow import csv

            # Columns of digits are text too where text is wanted.
            types = {name: pyarrow.string() for name in USED_COLUMNS}
            table = Dataset(
                csv.read_csv(
                    path,
                    parse_options=csv.ParseOptions(newlines_in_values=True),
                    convert_options=csv.ConvertOptions(column_types=types),
                )
            )
        else:
            table = Dataset.from_file(str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} can't be read as {ending}: {error}; write it again, or {_LOCAL_REMEDY}"
        ) from error
    return _from_arrow(table, str(path))


def _from_arrow(table: Any, source: str) -> Rows:
    """A datasets.Dataset in plain Python values, without the columns nobody reads."""
    columns = [name for name in USED_COLUMNS if name in table.column_names]
    if columns and len(table):
        table = table.select_columns(columns)
    return Rows(source, table.with_format(None))


def _load_set(name: str, split: str, config_name: str | None) -> Rows:
    """A folder or a hub set through `datasets`."""
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            loaded = load_from_disk(name)
            if isinstance(loaded, DatasetDict):
                if split not in loaded:
                    raise ValueError(f"Unknown split {split!r}. Should be one of {list(loaded)}.")
                loaded = loaded[split]
        else:
            loaded = load_dataset(name, config_name, split=split)
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
        raise DataError(
            f"{name!r} is no local file, and as a set on the Hugging Face hub it could not be "
            f"loaded ({text}); check the name, your connection and HF_HUB_OFFLINE, or "
            f"{_LOCAL_REMEDY}"
        ) from error
    return _from_arrow(loaded, f"{name}[{split}]")
