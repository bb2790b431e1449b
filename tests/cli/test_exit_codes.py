"""cli/exit_codes.py: what a command ends with, for errors of ours, of libraries, and for faults."""

import os
import subprocess
import sys

import numpy as np
import pyarrow
import pytest
import torch
from datasets.exceptions import DatasetGenerationError
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from fastdpo.cli.parser import command
from fastdpo.system.oom import DoesNotFitError


def no_gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines")


def damaged_weights():
    raise SafetensorError("Error while deserializing header: incomplete metadata")


def endless_pattern():
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    tokenizer.encode("a" * 60 + "b")


def no_package():
    import a_package_that_is_not_there  # noqa: F401


def no_package_of_a_library():
    raise ImportError("\nLlamaConverter requires the protobuf library but it was not found.\nMore")


def no_set():
    raise DatasetGenerationError("An error occurred while generating the dataset")


ENDS = {
    "CPU memory": (lambda: torch.empty(2**50), 3, "DefaultCPUAllocator"),
    "numpy's memory": (lambda: np.empty(2**50), 3, "Unable to allocate"),
    "arrow's memory": (lambda: pyarrow.allocate_buffer(2**55), 3, "out of memory"),
    "GPU memory": (no_gpu_memory, 3, "(CUDA out of memory. Tried to allocate 2 GiB.)"),
    "a damaged file": (damaged_weights, 2, "copy or download it again"),
    "a tokenizer's panic": (endless_pattern, 2, "retry-limit"),
    "a missing package": (no_package, 2, "pip install a_package_that_is_not_there"),
    "a library's package": (no_package_of_a_library, 2, "requires the protobuf library"),
    "a data set": (no_set, 2, "pass its rows as a .jsonl file"),
    "a fault": (lambda: [][0], 70, "Please report it"),
    "another fault": (lambda: None + 1, 70, "This is a fault of fastdpo"),
    "a name of ours": (lambda: __import__("fastdpo.nothing"), 70, "fault of fastdpo"),
}


@pytest.mark.parametrize("name", ENDS)
def test_an_end_has_its_code_and_line(name, capsys):
    cause, code, said = ENDS[name]
    assert command(lambda _: cause()) == code
    written = capsys.readouterr().err
    assert said in written
    assert ("Traceback" in written) == (code == 70)
    if code != 70:
        assert written.startswith("error: ")
        assert written.count("\n") == 1


def test_what_does_not_fit_keeps_its_own_advice(capsys):
    def main(_):
        raise DoesNotFitError("a single completion does not fit")

    assert command(main) == 3
    assert capsys.readouterr().err == "error: a single completion does not fit\n"


def test_a_traceback_of_bad_input_is_shown_on_request(capsys, monkeypatch):
    def main(_):
        raise ValueError("no such thing")

    monkeypatch.setenv("FASTDPO_DEBUG", "1")
    assert command(main) == 2
    assert "Traceback" in capsys.readouterr().err


def test_names_move_no_cursor(capsys):
    def main(_):
        raise ValueError("there is no file \x1b]0;title\x07\x9b2Jx\u202e.jsonl")

    command(main)
    said = "there is no file \\u001b]0;title\\u0007\\u009b2Jx\\u202e.jsonl"
    assert capsys.readouterr().err == f"error: {said}\n"


def test_messages_of_the_log_move_no_cursor(capsys):
    import logging

    command(lambda _: logging.getLogger("fastdpo.x").warning("column %s", "\x1b[2J"))
    assert capsys.readouterr().err == "column \\u001b[2J\n"


def test_the_process_ends_with_the_code():
    source = (
        "import sys; from fastdpo.cli.parser import command; sys.exit(command(lambda _: [][0]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, env=os.environ
    )
    assert ran.returncode == 70
    assert "IndexError" in ran.stderr
