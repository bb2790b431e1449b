"""Compressed files of text are data files: same rows, same places in messages, bounded."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pytest

from fastdpo.data import DataError, read_held_out, read_rows

ROW = {"prompt": "a", "chosen": " b", "rejected": " c"}
LINES = "".join(json.dumps(ROW) + "\n" for _ in range(3))
CONTENTS = {
    ".jsonl": LINES,
    ".json": json.dumps([ROW] * 3),
    ".csv": "prompt,chosen,rejected\n" + "a, b, c\n" * 3,
    ".tsv": "prompt\tchosen\trejected\n" + "a\t b\t c\n" * 3,
}


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("ending", CONTENTS)
def test_compressed_files_have_the_rows_of_their_content(tmp_path, ending, packed):
    path = tmp_path / f"pairs{ending}{packed}"
    path.write_bytes(PACKERS[packed](CONTENTS[ending].encode()))
    rows = read_rows(str(path))
    assert [dict(row) for row in rows.rows] == [ROW] * 3
    assert read_held_out(str(path), split="test").rows == rows.rows
    assert len(read_rows(str(path), split="train[:2]")) == 2
    (tmp_path / f"plain{ending}").write_text(CONTENTS[ending])
    plain = read_rows(str(tmp_path / f"plain{ending}"))
    assert rows.where(2) == plain.where(2).replace(f"plain{ending}", f"pairs{ending}{packed}")


@pytest.mark.parametrize("packed", PACKERS)
def test_a_broken_line_is_named_with_its_number(tmp_path, packed):
    path = tmp_path / f"pairs.jsonl{packed}"
    path.write_bytes(PACKERS[packed]((LINES + '{"prompt": \n').encode()))
    with pytest.raises(DataError, match=rf"pairs\.jsonl\{packed}:4: broken JSON"):
        read_rows(str(path))


@pytest.mark.parametrize("packed", PACKERS)
def test_damaged_and_misnamed_files_are_refused(tmp_path, packed):
    whole = PACKERS[packed](b"".join(json.dumps(ROW | {"n": i}).encode() for i in range(9999)))
    for content in (whole[: len(whole) // 2], LINES.encode()):
        path = tmp_path / f"pairs.jsonl{packed}"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"cannot be unpacked|cut off|broken JSON"):
            read_rows(str(path))
    parquet = tmp_path / f"pairs.parquet{packed}"
    parquet.write_bytes(whole)
    with pytest.raises(DataError, match="unpack or convert it"):
        read_rows(str(parquet))


def test_a_file_that_unpacks_to_far_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fastdpo.data.sizes.FREE_OF_DOUBT_BYTES", 2**20)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n" * 2**24))
    with pytest.raises(DataError, match="over 1,000 times its size"):
        read_rows(str(path))
