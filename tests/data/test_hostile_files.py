"""Files that unpack to more than there is, or name what lies outside their folder."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from fastdpo.data import DataError, read_rows, sizes

ROW = {"prompt": "Well?", "chosen": "yes", "rejected": "no"}
LINE = json.dumps(ROW) + "\n"


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch, tmp_path):
    monkeypatch.setattr(sizes, "FREE_OF_DOUBT_BYTES", 2**20)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def bomb_table(megabytes=2, rows=100):
    """A Parquet file of a few kilobytes: one text, repeated by its dictionary."""
    indices = pa.array([0] * rows, pa.int32())
    text = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * (megabytes * 2**20)]))
    return pa.table({"prompt": text, "chosen": ["a"] * rows, "rejected": ["b"] * rows})


def write_parquet(table, path):
    parquet.write_table(table, path, compression="zstd")
    return path


def test_a_parquet_file_that_repeats_a_long_text(tmp_path):
    path = write_parquet(bomb_table(), tmp_path / "bomb.parquet")
    assert path.stat().st_size < 20_000
    with pytest.raises(DataError, match=r"bomb.parquet: a file of [\d,]+ bytes unpacks to 200 MiB"):
        read_rows(str(path))


def test_a_parquet_file_of_texts_that_are_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "FREE_OF_DOUBT_BYTES", 2**28)
    path = write_parquet(bomb_table(17, 1), tmp_path / "long.parquet")
    with pytest.raises(DataError, match="column 'prompt' holds a text of 17 MiB, longer than 16"):
        read_rows(str(path))


def test_the_parquet_file_of_the_issue(request):
    path = request.config.rootpath.parent / "shared" / "cases" / "bomb.parquet"
    if not path.is_file():
        pytest.skip("needs ../shared/cases/bomb.parquet, which is no part of the project")
    with pytest.raises(DataError, match="a file of 2,602 bytes unpacks to 5,000 MiB"):
        read_rows(str(path), max_line_mib=64)


def test_texts_inside_messages_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "FREE_OF_DOUBT_BYTES", 2**28)
    text = "x" * (17 * 2**20)
    messages = [[{"role": "user", "content": text}]]
    table = pa.table({"prompt": messages, "chosen": ["a"], "rejected": ["b"]})
    with pytest.raises(DataError, match="column 'prompt' holds a text of 17 MiB"):
        read_rows(str(write_parquet(table, tmp_path / "nested.parquet")))


def test_an_arrow_file_of_packed_buffers(tmp_path):
    table = pa.table({"prompt": ["x" * 2**20] * 64, "chosen": ["a"] * 64, "rejected": ["b"] * 64})
    path = tmp_path / "packed.arrow"
    with ipc.new_stream(path, table.schema, options=ipc.IpcWriteOptions(compression="zstd")) as out:
        out.write_table(table)
    with pytest.raises(DataError, match=r"packed\.arrow: a file of .* unpacks to 64 MiB"):
        read_rows(str(path))


def test_rows_of_nothing_are_counted(tmp_path):
    table = pa.table({name: pa.nulls(10**7) for name in ROW})
    with pytest.raises(DataError, match="unpacks to"):
        read_rows(str(write_parquet(table, tmp_path / "nulls.parquet")))


def test_memory_that_does_not_suffice_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "FREE_OF_DOUBT_BYTES", 2**40)
    monkeypatch.setattr("fastdpo.data.tables.available_bytes", lambda: 2**20)
    path = write_parquet(pa.table({"prompt": ["x" * 2**20] * 128}), tmp_path / "large.parquet")
    with pytest.raises(DataError, match=r"unpacks to more than the memory .* \(1 MiB\)"):
        read_rows(str(path))


ZEROS = LINE.encode() + b" " * (8 * 2**20)


def tar_of(content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("a.jsonl")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", content)
    return buffer.getvalue()


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


PACKED = {
    "a.jsonl.gz": gzip.compress, "a.jsonl": gzip.compress, "a.jsonl.bz2": bz2.compress,
    "a.jsonl.xz": lzma.compress, "a.zip": zip_of, "a.jsonl.zst": zstd,
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_file_of_a_folder(tmp_path, name, monkeypatch):
    monkeypatch.setattr(sizes, "MOST_RATIO", 100)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_bytes(PACKED[name](ZEROS))
    with pytest.raises(DataError, match=rf"{name}: a file of [\d,]+ bytes unpacks to \d"):
        read_rows(str(folder))
    assert not list(tmp_path.glob("cache/**/*.arrow"))


def test_sparse_members_of_a_tar(tmp_path, request):
    path = request.config.rootpath.parent / "shared" / "cases" / "sparse-bomb.tar"
    if not path.is_file():
        pytest.skip("needs ../shared/cases/sparse-bomb.tar, which is no part of the project")
    with pytest.raises(DataError, match=r"sparse-bomb\.tar: a file of 10,240 bytes unpacks to"):
        sizes.check_files([path], "a folder", tmp_path)


def test_other_archives_are_refused_by_name(tmp_path):
    path = tmp_path / "a.7z"
    path.write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(100))
    with pytest.raises(DataError, match="a 7z archive; unpack it"):
        sizes.check_files([path], "a folder", tmp_path)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zip_of, zstd])
def test_a_damaged_archive_is_one_sentence(tmp_path, pack):
    packed = pack(bytes(range(256)) * 400)
    path = tmp_path / "a"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match="damaged"):
        sizes.check_files([path], "a folder", tmp_path)


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "free_bytes", lambda _: 50)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(LINE)
    with pytest.raises(DataError, match="where 0 MiB are free; make room there, or set HF_HOME"):
        read_rows(str(folder))
    assert not list(tmp_path.glob("cache/**/*.arrow"))


def folder_that_names(tmp_path, names):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text(LINE)
    (tmp_path / "private.jsonl").write_text(LINE)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        f"  - split: train\n    path: {names}\n---\n"
    )
    return folder


@pytest.mark.parametrize("where", ["../private.jsonl", "absolute", "deep", "glob"])
def test_a_readme_names_no_file_outside(tmp_path, where):
    names = {
        "absolute": str(tmp_path / "private.jsonl"),
        "deep": "sub/../../private.jsonl",
        "glob": "../priv*.jsonl",
    }.get(where, where)
    folder = folder_that_names(tmp_path, names)
    (folder / "sub").mkdir()
    with pytest.raises(DataError, match=r"README\.md of .*data names .*private\.jsonl.* outside"):
        read_rows(str(folder))


def test_a_readme_names_files_inside(tmp_path):
    rows = read_rows(str(folder_that_names(tmp_path, "train.jsonl")))
    assert len(rows) == 1


def test_a_link_of_the_users_own_is_followed(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "elsewhere.jsonl").write_text(LINE)
    (folder / "train.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    assert len(read_rows(str(folder))) == 1


@pytest.mark.parametrize("damage", ["outside", "split", "json", "list", "number"])
def test_a_saved_folder_names_no_file_outside(tmp_path, damage):
    from datasets import Dataset, DatasetDict

    folder = tmp_path / "saved"
    DatasetDict({"train": Dataset.from_list([ROW])}).save_to_disk(str(folder))
    state, parts = folder / "train" / "state.json", folder / "dataset_dict.json"
    content = json.loads(state.read_text())
    content["_data_files"][0]["filename"] = 7 if damage == "number" else "../../private.arrow"
    if damage in ("outside", "number"):
        state.write_text(json.dumps(content))
    elif damage == "split":
        parts.write_text(json.dumps({"splits": ["../elsewhere"]}))
    else:
        parts.write_text({"json": "{", "list": "[]"}[damage])
    with pytest.raises(DataError, match=r"no file of its own|cannot be read"):
        read_rows(str(folder))
