"""Sets that are stored column by column are read as their rows."""

import json

import pytest

from fastdpo.data import DataError, read_rows, rows_from
from fastdpo.data.column_wise import rows_of_columns

ROWS = [{"prompt": f"p{n}", "chosen": f" good {n}", "rejected": f" bad {n}"} for n in range(3)]
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
PANDAS = {name: {str(n): value for n, value in enumerate(c)} for name, c in COLUMNS.items()}
SPLIT = {"columns": [*COLUMNS], "index": [0, 1, 2], "data": [[*row.values()] for row in ROWS]}
Q, A, B = ({"role": role, "content": text} for role, text in
           (("user", "q"), ("assistant", "a"), ("assistant", "b")))  # fmt: skip
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("document", [COLUMNS, PANDAS, SPLIT, {"data": ROWS}, ROWS])
def test_a_json_file_of_columns(tmp_path, document, indent):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(document, indent=indent))
    assert list(read_rows(str(path)).rows) == ROWS


def test_a_dict_of_lists_a_frame_and_an_arrow_table():
    import numpy as np
    import pandas as pd
    import pyarrow as pa

    arrays = {name: np.array(column, dtype=object) for name, column in COLUMNS.items()}
    frame = pd.DataFrame(ROWS)
    for given in (COLUMNS, arrays, frame, dict(frame), pa.table(COLUMNS), SPLIT):
        rows = rows_from(given, "mine")
        found = [(p.prompt, p.chosen, p.rejected) for _, (p,) in rows.preferences()]
        assert found == [tuple(row.values()) for row in ROWS]


@pytest.mark.parametrize(
    "columns",
    [
        {"conversations": [[HUMAN]], "chosen": [GPT], "rejected": [GPT]},
        {"prompt": ["q"], "chosen": [A], "rejected": [B]},
        {"question": ["q"], "completions": [["a", "b"]], "ratings": [[1, 2]]},
        {"prompt": [[Q]], "chosen": [[A]], "rejected": [[B]]},
        {"prompt": ["q"], "chosen": [[Q, A]], "rejected": [[Q, B]], "score": [1.0]},
    ],
)
def test_columns_are_told_from_a_row(columns):
    assert rows_of_columns(columns, "mine") == [{name: c[0] for name, c in columns.items()}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
        {"chosen": [Q, A], "rejected": [Q, B]},
        {"prompt": [Q], "chosen": [A], "rejected": [B], "tools": ["{}"]},
        {"prompt": [Q, A], "completions": ["a", "b"], "ratings": [1, 2]},
        {"prompt": "q", "completions": ["a", "b"], "ratings": [1, 2]},
        {"train": ROWS, "test": ROWS},
        {"train": [("q", "a", "b")], "test": [("q", "a", "b")]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {},
    ],
)
def test_a_row_and_splits_are_no_columns(row):
    assert rows_of_columns(row, "mine") is None


def test_columns_of_other_lengths_and_splits_are_explained(tmp_path):
    with pytest.raises(DataError, match=r"mine: its columns are of different lengths \({'prompt'"):
        rows_from(COLUMNS | {"chosen": ["x"]}, "mine")
    with pytest.raises(DataError, match=r"with the parts \['train', 'test'\]; pass one of them"):
        rows_from({"train": ROWS, "test": ROWS}, "mine")
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(COLUMNS | {"chosen": ["x"]}))
    with pytest.raises(DataError, match=r"pairs\.json: its columns are of different lengths"):
        read_rows(str(path))


def test_a_frame_that_arrow_cannot_hold_is_explained():
    import pandas as pd

    for bad in (["a", {"role": 1}], ["a", "\ud83d"]):
        frame = pd.DataFrame({"chosen": ["b", "c"], "rejected": ["d", "e"]})
        frame["prompt"] = pd.Series(bad, dtype=object)
        with pytest.raises(DataError, match="mine is a frame that Arrow can't hold"):
            rows_from(frame, "mine")
