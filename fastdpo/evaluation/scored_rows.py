"""Writes the rows of a data set with their scores, as JSON lines or Parquet."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain, islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from fastdpo.batching import PairGroups
from fastdpo.data import PairDataset, Rows
from fastdpo.losses.pairs import preference_accuracy
from fastdpo.modeling.finite import nonfinite_tensors
from fastdpo.modeling.scoring import ScoredPairs, score_pairs
from fastdpo.system import files
from fastdpo.system.console import table

ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Score:
    """The columns that a row gains; of a dropped row only `dropped` is not None.

    Attributes:
        chosen_logps, rejected_logps: log-prob of the completion under the policy, nats.
        ref_chosen_logps, ref_rejected_logps: log-prob under the reference, nats.
        chosen_rewards, rejected_rewards: beta x (policy - reference).
        margin: chosen - rejected log-ratio, nats; beta x margin is the difference of the rewards.
        prompt_tokens, chosen_tokens, rejected_tokens: after truncation.
        truncated_prompt, truncated_chosen, truncated_rejected: whether it was cut to fit.
        dropped: the reason for which the row has no scores.
    """

    chosen_logps: float | None = None
    rejected_logps: float | None = None
    ref_chosen_logps: float | None = None
    ref_rejected_logps: float | None = None
    chosen_rewards: float | None = None
    rejected_rewards: float | None = None
    margin: float | None = None
    prompt_tokens: int | None = None
    chosen_tokens: int | None = None
    rejected_tokens: int | None = None
    truncated_prompt: bool | None = None
    truncated_chosen: bool | None = None
    truncated_rejected: bool | None = None
    dropped: str | None = None


COLUMNS = tuple(entry.name for entry in fields(Score))


@dataclass(frozen=True)
class ScoredRows:
    """Every row of a data set, in order, with its score.

    Args:
        rows: all rows of the data set.
        pairs: the pairs that were made of them; their report knows why other rows were dropped.
        policy: log-probs of the pairs under the policy.
        reference: log-probs of the pairs under the reference.
        beta: reward per nat.
    """

    rows: Rows
    pairs: PairDataset
    policy: ScoredPairs
    reference: ScoredPairs
    beta: float

    def scores(self) -> Iterator[Score]:
        """The score of each row, in order."""
        indices = {pair.row: index for index, pair in enumerate(self.pairs)}
        reasons = self.pairs.report.reasons
        for row in range(len(self.rows)):
            index = indices.get(row)
            yield Score(dropped=reasons[row]) if index is None else self._score(index)

    def describe(self) -> str:
        """A table of a few metrics over all pairs."""
        logratios = self.policy.logps - self.reference.logps
        margins = torch.from_numpy(logratios[:, 0] - logratios[:, 1])
        rows = [
            ("rows", f"{len(self.rows):,}"),
            ("pairs with metrics", f"{len(self.pairs):,}"),
            ("preference accuracy", f"{preference_accuracy(margins):.4f}"),
            ("mean margin, nats", f"{float(margins.mean()):.4f}"),
        ]
        return table(("scored", ""), rows)

    def _score(self, index: int) -> Score:
        pair = self.pairs[index]
        logps, ref_logps = self.policy.logps[index], self.reference.logps[index]
        logratios = logps - ref_logps
        return Score(
            *map(float, (*logps, *ref_logps, *(self.beta * logratios))),
            margin=float(logratios[0] - logratios[1]),
            prompt_tokens=len(pair.prompt_ids),
            chosen_tokens=pair.scored_tokens[0],
            rejected_tokens=pair.scored_tokens[1],
            truncated_prompt=pair.cut[0],
            truncated_chosen=pair.cut[1],
            truncated_rejected=pair.cut[2],
            dropped=None,
        )


def score_finite(model: nn.Module, rows: Rows, pairs: PairDataset, side: str) -> ScoredPairs:
    """Score all pairs of a data set, and refuse log-probs that are not finite.

    Args:
        model: a causal LM or a PeftModel on it, with its adapters on or off as they are.
        rows: the rows of the data set.
        pairs: what they became.
        side: policy or reference, for the progress bar and the message.

    Raises:
        ValueError: names the first such row and, if the weights are at fault, a tensor.
    """
    scored = score_pairs(model, PairGroups(pairs), description=f"Scoring with the {side}")
    wrong = np.flatnonzero(~np.isfinite(scored.logps).all(axis=1))
    if not len(wrong):
        return scored
    weights = nonfinite_tensors(model.state_dict())
    cause = f"Its weight {weights[0]} is not: the model diverged in training." if weights else ""
    raise ValueError(
        f"{rows.where(pairs[int(wrong[0])].row)}: the log-probs are "
        f"{[float(each) for each in scored.logps[wrong[0]]]} under the {side}; they must be "
        f"finite. {cause or 'Load the model with --dtype float32.'}"
    )


def check_rows(rows: Rows, pairs: PairDataset, path: Path, *, prefix: str = "") -> None:
    """Refuse before the scoring rows that `write_scores` cannot write.

    Raises:
        ValueError: a row gives several pairs, the rows have a column of a score's name already, or
            they do not fit into one table.
    """
    if len({pair.row for pair in pairs}) < len(pairs):
        raise ValueError(
            f"{rows.source} gives several pairs a row, and a row has room for the metrics of one: "
            "leave --rated_pairs all out, or write the pairs into a file of their own."
        )
    names = [prefix + name for name in COLUMNS]
    for index, row in enumerate(rows.rows):
        if taken := [name for name in names if name in row]:
            raise ValueError(
                f"{rows.where(index)} has the column {taken[0]!r} already: name the new ones "
                "otherwise with --column_prefix, as in --column_prefix second_"
            )
    if path.suffix.lower() == ".parquet":
        _schema(rows.rows, names, path)


def write_scores(scored: ScoredRows, path: Path, *, prefix: str = "") -> None:
    """Write every row with its score, in order; the file is complete or absent.

    Args:
        scored: rows that `check_rows` has passed, and their scores.
        path: ends in .jsonl or .parquet.
        prefix: put before the names of the new columns.

    Raises:
        OSError: the disk is full or failing.
    """
    names = [prefix + name for name in COLUMNS]

    def joined_rows() -> Iterator[dict[str, Any]]:
        for row, score in zip(scored.rows.rows, scored.scores(), strict=True):
            yield dict(row) | dict(zip(names, asdict(score).values(), strict=True))

    if path.suffix.lower() == ".jsonl":
        files.write_atomically(path, lambda temporary: _write_json_lines(temporary, joined_rows()))
        return
    schema = _schema(scored.rows.rows, names, path)
    files.write_atomically(path, lambda temporary: _write_parquet(temporary, joined_rows(), schema))


def _write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, rows: Iterable[Mapping[str, Any]], schema: Any) -> None:
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetWriter(path, schema) as writer:
        for batch in _batches(rows):
            writer.write_table(pyarrow.Table.from_pylist(batch, schema))


def _schema(rows: Iterable[Mapping[str, Any]], names: Sequence[str], path: Path) -> Any:
    """The schema of all rows and scores; a column's type may show in a late row only."""
    import pyarrow

    try:
        row_fields = pyarrow.unify_schemas(
            [_schema_of_batch(batch) for batch in _batches(rows)], promote_options="permissive"
        )
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"the rows do not fit into the one table of {path}: {error}; write a .jsonl file"
        ) from error
    types = {float: pyarrow.float64(), int: pyarrow.int64(), bool: pyarrow.bool_()}
    score_fields = [
        (name, types.get(get_args(entry.type)[0], pyarrow.string()))
        for name, entry in zip(names, fields(Score), strict=True)
    ]
    return pyarrow.schema([*row_fields, *(pyarrow.field(*column) for column in score_fields)])


def _schema_of_batch(batch: list[Mapping[str, Any]]) -> Any:
    import pyarrow

    names = dict.fromkeys(chain.from_iterable(batch))
    arrays = {name: pyarrow.array([row.get(name) for row in batch]) for name in names}
    return pyarrow.table(arrays).schema


def _batches(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, ROWS_AT_ONCE)):
        yield batch
