import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastdpo.data import DataError, UnknownSplitError, read_rows, rows_from

ROW = {"prompt": "a", "chosen": " b", "rejected": " c"}
GOOD = json.dumps(ROW).encode()


def written(folder: Path, content: bytes, name: str = "pairs.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


BAD_LINES = {
    "duplicate key": (b'{"chosen": "a", "prompt": "p", "chosen": "b"}', "'chosen' occurs twice"),
    "invalid utf-8": (b'{"prompt": "\xff"}', "byte 13 of the line (0xff) is not UTF-8"),
    "cut multi-byte": (b'{"prompt": "\xe4\xb8"}', "is not UTF-8"),
    "lone surrogate": (rb'{"prompt": "a\ud800b"}', "\\ud800, half of a surrogate pair"),
    "lone surrogate in a message": (rb'{"p": [{"c": "\uDFFF"}]}', "\\udfff"),
    "lone surrogate in a key": (rb'{"a\ud800": "b"}', "\\ud800"),
    "raw NUL": (b'{"prompt": "a\x00b"}', "a NUL byte stands at column 14"),
    "two objects": (GOOD + b" " + GOOD, "a second value begins at column"),
    "no JSON": (b"prompt,chosen,rejected", "broken JSON"),
    "half a line": (GOOD[:-5], "broken JSON"),
    "a list": (b"[1, 2]", "the line is a JSON list"),
    "a string": (b'"prompt"', "the line is a JSON str"),
    "null": (b"null", "the line is a JSON NoneType"),
    "deep nesting": (
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "nested deeper than 64 levels",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_with_file_line_and_reason(tmp_path, name):
    line, reason = BAD_LINES[name]
    path = written(tmp_path, b"\n".join([GOOD, b"", line, GOOD, b""]))
    with pytest.raises(DataError) as caught:
        read_rows(str(path))
    assert str(caught.value).startswith(f"{path}:3: ")
    assert reason in str(caught.value)


def test_a_truncated_last_line_is_told_from_a_broken_one(tmp_path):
    path = written(tmp_path, GOOD + b"\n" + GOOD[:20])
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: the file ends in the middle of a record"):
        read_rows(str(path))


def test_byte_order_mark_crlf_and_blank_lines_keep_true_line_numbers(tmp_path):
    path = written(tmp_path, b"\xef\xbb\xbf\r\n" + GOOD + b"\r\n \t\r\n" + GOOD)
    rows = read_rows(str(path))
    assert list(rows.rows) == [ROW, ROW]
    assert [rows.where(i) for i in range(2)] == [f"{path}:2", f"{path}:4"]


def test_only_newline_bytes_end_a_line(tmp_path):
    text = "one\u2028two\x85three\x0cfour"
    content = json.dumps(ROW | {"prompt": text}, ensure_ascii=False).replace("\f", "\\f").encode()
    rows = read_rows(str(written(tmp_path, content + b"\n" + GOOD)))
    assert [row["prompt"] for row in rows.rows] == [text, "a"]
    rows = read_rows(str(written(tmp_path, GOOD.replace(b", ", b",\r") + b"\n" + GOOD)))
    assert list(rows.rows) == [ROW, ROW]


def test_paired_surrogates_and_escaped_nul_are_text(tmp_path):
    rows = read_rows(str(written(tmp_path, rb'{"prompt": "\ud83d\ude00\u0000"}')))
    assert rows.rows[0]["prompt"] == "\U0001f600\x00"


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_an_error(tmp_path, content):
    with pytest.raises(DataError, match="there are no rows"):
        read_rows(str(written(tmp_path, content)))


@pytest.mark.parametrize(("magic", "kind"), [(b"\x1f\x8b\x08", "gzip"), (b"PAR1", "Parquet")])
def test_a_file_of_another_kind_is_recognised(tmp_path, magic, kind):
    with pytest.raises(DataError, match=f"holds {kind} data"):
        read_rows(str(written(tmp_path, magic + b"\x00" * 20)))


@pytest.mark.parametrize(
    "content",
    [[ROW, ROW], {"version": 1, "data": [ROW, ROW]}],
)
def test_json_holds_a_list_or_an_object_with_one(tmp_path, content):
    path = written(tmp_path, json.dumps(content, indent=1).encode(), "pairs.json")
    rows = read_rows(str(path))
    assert list(rows.rows) == [ROW, ROW]
    assert rows.where(1) == f"{path} row 1"


def test_json_lines_under_the_name_json_are_read(tmp_path):
    path = written(tmp_path, GOOD + b"\n" + GOOD + b"\n", "pairs.json")
    assert read_rows(str(path)).where(1) == f"{path}:2"
    assert len(read_rows(str(written(tmp_path, GOOD, "one.json")))) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": [], "b": []}', "an object with 2 lists"),
        (b'{"a": 1}', "an object with 0 lists"),
        (b"3", "a JSON int"),
        (b"[{}, 4]", "row 1: it is a JSON int"),
        (b"[\n{},\n{]\n", ":3: broken JSON"),
        (b'[\n"\xff"]', ":2: byte 4 of the file"),
    ],
)
def test_bad_json_documents_are_named(tmp_path, content, reason):
    with pytest.raises(DataError, match=reason):
        read_rows(str(written(tmp_path, content, "pairs.json")))


def test_parquet_arrow_csv_and_saved_folders(tmp_path):
    from datasets import Dataset, DatasetDict

    messages = [{"role": "user", "content": "hello"}]
    rows = [ROW | {"score": "3"}, ROW | {"score": "4"}]
    chats = Dataset.from_list([{"chosen": messages, "rejected": messages, "messages": messages}])
    chats.to_parquet(tmp_path / "chats.parquet")
    read = read_rows(str(tmp_path / "chats.parquet"))
    assert list(read.rows) == list(chats)

    Dataset.from_list(rows).to_csv(tmp_path / "pairs.csv")
    assert list(read_rows(str(tmp_path / "pairs.csv")).rows) == rows

    folder = tmp_path / "saved"
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(folder)
    read = read_rows(str(folder))
    assert list(read.rows) == rows
    assert read.where(1) == f"{folder}[train] row 1"
    with pytest.raises(UnknownSplitError, match=r"split 'test'.*\['train'\]"):
        read_rows(str(folder), split="test")
    arrow = next((folder / "train").glob("*.arrow"))
    assert list(read_rows(str(arrow)).rows) == rows


def test_csv_digits_stay_text(tmp_path):
    path = written(tmp_path, b"prompt,chosen,rejected\n1 + 1 =,2,3\n", "pairs.csv")
    assert read_rows(str(path)).rows[0]["chosen"] == "2"


def test_a_broken_parquet_file_is_a_data_error(tmp_path):
    path = written(tmp_path, b"not parquet", "pairs.parquet")
    with pytest.raises(DataError, match=r"pairs\.parquet can't be read as \.parquet"):
        read_rows(str(path))


def test_a_single_file_has_no_test_split(tmp_path):
    with pytest.raises(UnknownSplitError, match="one split, 'train'"):
        read_rows(str(written(tmp_path, GOOD)), split="test")


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/nowhere/pairs.parquet"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name):
    with pytest.raises(DataError, match="there is no file"):
        read_rows(name)


def test_a_hub_set_out_of_reach_says_what_to_pass_instead(monkeypatch):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'somebody/pairs' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError) as caught:
        read_rows("somebody/pairs")
    for part in ("somebody/pairs", "Couldn't reach", ".jsonl", '"rejected": "..."'):
        assert part in str(caught.value)


def test_a_wrong_hub_split_names_the_right_ones(monkeypatch):
    import datasets

    def no_such_split(*args, **kwargs):
        raise ValueError("Unknown split \"dev\". Should be one of ['train', 'test'].")

    monkeypatch.setattr(datasets, "load_dataset", no_such_split)
    with pytest.raises(UnknownSplitError, match=r"\['train', 'test'\]"):
        read_rows("somebody/pairs", split="dev")


def test_rows_from_memory():
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list([ROW, ROW])
    for given in ([ROW, ROW], table, table.to_pandas(), table.with_format("numpy")):
        rows = rows_from(given, "mine")
        assert list(rows.rows) == [ROW, ROW]
        assert rows.where(1) == "mine row 1"
    with pytest.raises(DataError, match="no rows"):
        rows_from([], "mine")
    with pytest.raises(DataError, match=r"parts \['train'\]"):
        rows_from(DatasetDict({"train": table}), "mine")
    with pytest.raises(DataError, match="of type int"):
        rows_from(3, "mine")


def test_the_room_imports_nothing_heavy():
    code = (
        "import sys, fastdpo.data; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
