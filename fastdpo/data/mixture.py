"""Several data sets as one: shares, a held-out part, each set read in its own shape."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdpo.data.errors import DataError
from fastdpo.data.normalize import PreferenceRow
from fastdpo.data.reading import Rows, read_rows
from fastdpo.options.data import DatasetConfig, DatasetMixtureConfig, column_roles

if TYPE_CHECKING:
    from datasets import DatasetDict


@dataclass(frozen=True)
class MixedRows(Rows):
    """The rows of several sets, one set after the other; each is read in its own shape.

    Attributes:
        parts: the sets.
    """

    parts: tuple[Rows, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[Rows]) -> "MixedRows":
        """Put sets one behind another."""
        return cls(" + ".join(part.source for part in parts), _Chain(parts), parts=tuple(parts))

    @property
    def is_stream(self) -> bool:
        """True where any of the sets is a stream."""
        return any(part.is_stream for part in self.parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def where(self, i: int) -> str:
        """The place of row `i`, counted over all sets, in the set that it comes from."""
        for part in self.parts[:-1]:
            if part.is_stream or i < len(part):
                return part.where(i)
            i -= len(part)
        return self.parts[-1].where(i)

    def preferences(
        self, descriptions: list[str] | None = None
    ) -> Iterator[tuple[int, list[PreferenceRow]]]:
        """Yield the number (over all sets) and the preferences of each row.

        Args:
            descriptions: gets one sentence on the shape of each set, once its first row is read.
        """
        number = -1
        for part in self.parts:
            description: list[str] = []
            for _, preferences in part.preferences(description):
                number += 1
                if description and descriptions is not None:
                    rows = "a stream" if part.is_stream else f"{len(part):,} rows"
                    descriptions.append(f"{part.source} ({rows}): {description.pop()}")
                yield number, preferences


class _Chain:
    """The raw rows of several sets, which can be iterated again."""

    def __init__(self, parts: Sequence[Rows]):
        self._parts = parts

    def __iter__(self) -> Iterator[Any]:
        for part in self._parts:
            yield from part.rows


def read_mixture(
    mixture: DatasetMixtureConfig, **options: Any
) -> tuple[MixedRows, MixedRows | None]:
    """Read the rows of a mixture, and hold some of them out if it says so.

    Sets may be of different shapes. Streams follow one another, so a run that stops at
    `--max_steps` may never reach the later ones.

    Args:
        mixture: at least one set.
        options: further arguments of `read_rows`, such as `rated_pairs`.

    Returns:
        The rows to train on and, with `test_split_size`, those to evaluate on.

    Raises:
        DataError: a set that cannot be read, or an empty part.
    """
    parts = _shares(mixture, [_read(entry, mixture, options) for entry in mixture.datasets])
    if mixture.test_split_size is None:
        return MixedRows.of(parts), None
    held_out = _held_out(sum(map(len, parts)), mixture)
    train, test, start = [], [], 0
    for part in parts:
        out = held_out[start : start + len(part)]
        start += len(part)
        for side, chosen in ((train, ~out), (test, out)):
            numbers = np.flatnonzero(chosen).tolist()
            side += [part.take(numbers)] if numbers else []
    return MixedRows.of(train), MixedRows.of(test)


def get_dataset(mixture: DatasetMixtureConfig) -> "DatasetDict":
    """Load a mixture as TRL's `get_dataset` does: a DatasetDict of the concatenated columns.

    Args:
        mixture: at least one set; all need the same columns.

    Returns:
        "train", and "test" where `test_split_size` is given.

    Raises:
        DataError: a set that cannot be read, or sets whose columns differ.
    """
    from datasets import Dataset, DatasetDict, concatenate_datasets

    parts = _shares(mixture, [_read(entry, mixture, {}) for entry in mixture.datasets])
    tables = []
    for part in parts:
        table: Any = part.rows
        if not hasattr(table, "column_names"):
            table = Dataset.from_list(table)
        tables.append(table.rename_columns({name: role for role, name in part.columns.items()}))
    try:
        combined = concatenate_datasets(tables)
    except ValueError as error:
        raise DataError(
            f"the data sets of the mixture have different columns ({error}); keep or rename some "
            "with the key columns, or pass the mixture to python -m fastdpo.train, which reads "
            "each set in its own shape"
        ) from error
    if mixture.test_split_size is None:
        return DatasetDict({"train": combined})
    out = _held_out(len(combined), mixture)
    return DatasetDict(
        {
            "train": combined.select(np.flatnonzero(~out)),
            "test": combined.select(np.flatnonzero(out)),
        }
    )


def _read(entry: DatasetConfig, mixture: DatasetMixtureConfig, options: dict[str, Any]) -> Rows:
    keep, roles = _columns(entry.columns)
    rows = read_rows(
        entry.path,
        split=entry.split,
        config_name=entry.name,
        streaming=mixture.streaming,
        data_dir=entry.data_dir,
        data_files=entry.data_files,
        **options,
    )
    if keep is not None:
        rows = replace(rows, rows=_only(rows, keep))
    return replace(rows, columns={**rows.columns, **roles})


def _columns(columns: Any) -> tuple[list[str] | None, dict[str, str]]:
    """Return the columns to keep (TRL's list of names) and the roles of columns (our role=name)."""
    if columns is None:
        return None, {}
    if isinstance(columns, Mapping) or all("=" in str(word) for word in columns):
        return None, column_roles(columns)
    return [str(name) for name in columns], {}


def _only(rows: Rows, names: list[str]) -> Any:
    raw: Any = rows.rows
    known = getattr(raw, "column_names", None) or list(next(iter(raw)))
    if missing := [name for name in names if name not in known]:
        raise DataError(
            f"{rows.source}: the mixture asks for the columns {missing}, and there are "
            f"{', '.join(known)}; correct the names"
        )
    if hasattr(raw, "select_columns"):
        return raw.select_columns(names)
    return [{name: row[name] for name in names if name in row} for row in raw]


def _shares(mixture: DatasetMixtureConfig, parts: list[Rows]) -> list[Rows]:
    """Take the share of each set that its fraction says: the largest mixture without repeats."""
    if not parts:
        raise DataError("the mixture names no data set; list at least one under datasets")
    fractions = [entry.fraction for entry in mixture.datasets]
    given = [fraction for fraction in fractions if fraction is not None]
    if not given:
        return parts
    weights = [fraction / sum(given) for fraction in given]
    total = min(len(part) / w for part, w in zip(parts, weights, strict=True) if w > 0)
    shares = []
    for index, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        count = min(round(weight * total), len(part))
        numbers: Sequence[int] = range(count)
        if mixture.mixture_seed is not None:
            generator = np.random.default_rng([mixture.mixture_seed, index])
            drawn = generator.choice(len(part), count, replace=False)
            numbers = np.sort(drawn).tolist()
        shares += [part.take(numbers)] if count else []
    return shares


def _held_out(rows: int, mixture: DatasetMixtureConfig) -> np.ndarray:
    """Draw the rows that are held out, (rows,) bool over all sets, a function of the seed."""
    size = mixture.test_split_size or 0
    count = math.ceil(size * rows) if size < 1 else int(size)
    if not 0 < count < rows:
        raise DataError(
            f"test_split_size {size} holds {count} of {rows} rows out; some are needed on both "
            "sides: choose another size"
        )
    out = np.zeros(rows, dtype=bool)
    out[np.random.default_rng(mixture.mixture_seed or 0).permutation(rows)[:count]] = True
    return out
