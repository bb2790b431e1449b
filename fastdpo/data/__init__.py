"""Reading preference data and turning it into token pairs; no model and no torch in here."""

from fastdpo.data.errors import DataError, UnknownSplitError
from fastdpo.data.mixture import MixedRows, get_dataset, read_mixture
from fastdpo.data.normalize import PreferenceRow
from fastdpo.data.pair_cache import cached_pairs
from fastdpo.data.pairs import Pair, PairDataset, PairLengths, PreparationReport
from fastdpo.data.preview import legend, show_pairs
from fastdpo.data.reading import Rows, read_held_out, read_rows, rows_from
from fastdpo.data.tokenize import prepare_pairs

__all__ = [
    "read_rows",
    "read_held_out",
    "rows_from",
    "read_mixture",
    "get_dataset",
    "show_pairs",
    "legend",
    "prepare_pairs",
    "cached_pairs",
    "Pair",
    "PairDataset",
    "PairLengths",
    "PreparationReport",
    "PreferenceRow",
    "Rows",
    "MixedRows",
    "DataError",
    "UnknownSplitError",
]
