"""Bad input, file by file: what the command says, its exit code, and that nothing is written.

tests/data/corpus/manifest.json lists every file with what is expected of it; rows are numbered as
in the catalogue of section 3A of the project's pitfalls. Files too large to keep are made here.
"""

import contextlib
import gc
import io
import json
import logging
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fastdpo import train
from fastdpo.cli.parser import command
from fastdpo.data import DataError, read_rows
from fastdpo.data.json_lines import parse_json_lines
from tests.tiny_trainer import CONFIG, byte_tokenizer

CORPUS = Path(__file__).parent / "corpus"
CASES = json.loads((CORPUS / "manifest.json").read_text())
OPTIONS = ["--lora", "--max_steps", "1", "--save_strategy", "no", "--use_cpu", "--disable_tqdm"]
TABLE: list[str] = []


def good(number):
    return json.dumps(
        {"prompt": f"Day {number} was", "chosen": f" good, {number}.", "rejected": f" bad {number}"}
    ).encode()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, one with fewer embeddings than its tokenizer has tokens, one without EOS."""
    folder = tmp_path_factory.mktemp("models")
    config = LlamaConfig(**CONFIG.to_dict() | {"num_hidden_layers": 1, "hidden_size": 32})
    for name, vocabulary in (("base", 288), ("narrow", 256), ("no-eos", 288)):
        config.vocab_size = vocabulary
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer = byte_tokenizer()
        if name == "no-eos":
            tokenizer.eos_token = None
        tokenizer.save_pretrained(folder / name)
    return folder


def made(kind, size, path):
    """The inputs that are not kept as files."""
    if kind == "long-line":
        long = json.dumps({**json.loads(good(2)), "note": "x" * (size * 2**20 - 200)})
        path.write_bytes(b"\n".join([good(0), good(1), long.encode(), good(3)]))
    elif kind == "endless":
        path.write_bytes(b"x" * (size * 2**20))
    elif kind == "folder":
        path.mkdir()
    else:
        lines = [good(n) for n in range(8)]
        if size:
            lines[2] = b"{]"
        feed(path, b"\n".join(lines))


def feed(path, content):
    """A FIFO that somebody writes into."""
    os.mkfifo(path)

    def write():
        with contextlib.suppress(BrokenPipeError):  # the reader has seen enough
            path.write_bytes(content)

    threading.Thread(target=write, daemon=True).start()


def run(argv, monkeypatch, capsys, caplog):
    """Exit code, and all that the command says."""
    monkeypatch.setattr("sys.argv", ["train", *argv])
    caplog.set_level(logging.INFO, logger="fastdpo")
    try:
        code = command(train.main)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.err + captured.out + "\n".join(r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['id']} {case['file']}")
def test_corpus(case, models, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTDPO_CACHE", str(tmp_path / "cache"))
    path = CORPUS / case["file"]
    if "made" in case:
        path = tmp_path / case["file"]
        made(*case["made"], path)
    before = sorted(tmp_path.rglob("*"))
    argv = ["--model", str(models / case.get("model", "base")), *OPTIONS, *case.get("options", [])]
    if path.suffix == ".yaml":
        argv += ["--config", str(path), "--dataset", str(CORPUS / "bom-crlf-blanks.jsonl")]
    else:
        argv += ["--dataset", str(path)]
    code, said = run(argv, monkeypatch, capsys, caplog)
    TABLE.append(f"{case['id']}  {case['file']:34} exit {code}  {behaviour(said, code, path)}")
    assert code == case["exit"], said
    assert "Traceback" not in said
    for part in case["says"]:
        assert part in said, f"{part!r} is not in what was said:\n{said}"
    if case["exit"]:
        if ":3: " in case["says"] or path.suffix != ".yaml":
            assert str(path) in said or case["id"] in ("B26",)
        assert sorted(tmp_path.rglob("*")) == before, "something was written"


def behaviour(said, code, path):
    """What a table has room for: the error, or what became of the rows."""
    if code:
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")][:1]
    else:
        (line,) = [line for line in said.splitlines() if "pairs kept" in line][:1]
    return line.replace(str(path.parent) + "/", "").removeprefix("error: ")[:150]


def test_every_row_of_the_catalogue_is_here():
    """B24's names inside manifests and links are test_checkpoint's."""
    assert {case["id"] for case in CASES} == {f"B{number:02}" for number in range(1, 28)}
    print("\n".join(sorted(TABLE)))
    kept = {path.name for path in CORPUS.iterdir()} - {"manifest.json"}
    assert kept == {
        case["file"] for case in CASES if "made" not in case and case["file"] != "absent.jsonl"
    }


def test_a_real_process_ends_with_one_line(models, tmp_path):
    """Through the shell, one file by its name and one through standard input."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "fastdpo.train", "--model", str(models / "base"), *OPTIONS]
    bad = CORPUS / "lone-surrogate.jsonl"
    with bad.open("rb") as stdin:
        ended = subprocess.run(
            [*argv, "--dataset", "/dev/stdin"],
            stdin=subprocess.PIPE if stdin is None else stdin,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=120,
        )
    assert ended.returncode == 2, ended.stderr
    complaint = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert complaint == [line for line in complaint if line.startswith("error: /dev/stdin:3: ")]
    assert len(complaint) == 1
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


# Size


def numbered_rows(count):
    return b"\n".join(good(number) for number in range(count)) + b"\n"


def test_reading_holds_one_line_of_the_file(tmp_path):
    """A line that is read is let go of: of 64 MiB no more is held at once than one line."""

    class Watched(io.RawIOBase):
        """64 lines of 1 MiB that are made as they are asked for."""

        left = 64

        def readable(self):
            return True

        def readinto(self, buffer):
            if not self.left:
                return 0
            self.left -= 1
            line = b'{"x": "' + b"y" * (len(buffer) - 10) + b'"}\n'
            buffer[: len(line)] = line
            return len(line)

    held = peak_of(lambda: parse_json_lines(io.BufferedReader(Watched(), 2**20), "watched"))
    assert held < 64 * 2**20 * 1.2 + 8 * 2**20  # the strings of the rows, and little beside


def test_a_line_without_end_is_not_read_to_its_end():
    class Endless(io.RawIOBase):
        given = 0

        def readable(self):
            return True

        def readinto(self, buffer):
            assert self.given < 3 * 2**20, "read on and on"
            self.given += len(buffer)
            buffer[:] = b"x" * len(buffer)
            return len(buffer)

    with pytest.raises(DataError, match=r"endless:1: the line is longer than 2 MiB"):
        parse_json_lines(io.BufferedReader(Endless()), "endless", max_line_mib=2)


def peak_of(call):
    import tracemalloc

    gc.collect()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("through", ["file", "pipe"])
def test_two_hundred_thousand_rows(tmp_path, soak, through):
    """A fault at the end has its line; time and memory are printed."""
    count = 200_000 if soak else 20_000
    path = tmp_path / "pairs.jsonl"
    content = numbered_rows(count) + b"{]"
    if through == "pipe":
        feed(path, content)
    else:
        path.write_bytes(content)
    began = time.perf_counter()
    with pytest.raises(DataError, match=rf"pairs\.jsonl:{count + 1}: the file ends in the middle"):
        read_rows(str(path))
    path.unlink()
    if through == "pipe":
        feed(path, numbered_rows(count))
    else:
        path.write_bytes(numbered_rows(count))
    rows = read_rows(str(path))
    assert len(rows) == count
    assert rows.where(count - 1) == f"{path}:{count}"
    took = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{count:,} rows twice through a {through}: {took:.1f} s, process peak {peak:.0f} MiB")
