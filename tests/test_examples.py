"""The examples, each run in process: the kernel's losses are the usual path's."""

import importlib.util
import tempfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
BOUND = 1e-4


@pytest.fixture(autouse=True)
def temporary_files_go_with_the_test(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def main_of(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def check(losses, printed, updates):
    usual, kernel = losses
    assert len(usual) == len(kernel) == updates
    assert len(set(usual)) == updates, "the losses do not move: nothing was trained"
    for one, other in zip(usual, kernel, strict=True):
        assert abs(one - other) <= BOUND
        assert f"usual {one:.6f}  kernel {other:.6f}" in printed


@pytest.mark.parametrize("name", ["kernel_in_pytorch_loop", "kernel_in_transformers_trainer"])
def test_cross_entropy_in_other_loops(name, capsys):
    losses = main_of(name)(["--updates", "4"])
    check(losses, capsys.readouterr().out, 4)


def test_logprobs_in_trl(capsys):
    utils = pytest.importorskip("trl.trainer.utils", reason="needs trl (pip install fastdpo[dev])")
    stock = utils._ChunkedLogProbFunction
    results = main_of("kernel_in_trl")([])
    assert utils._ChunkedLogProbFunction is stock
    printed = capsys.readouterr().out
    assert list(results) == ["DPOTrainer", "SFTTrainer"]
    for losses in results.values():
        check(losses, printed, 4)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_say_their_command(path):
    lines = path.read_text().splitlines()
    assert len(lines) < 80
    assert any(f"python examples/{path.name}" in line for line in lines[:5])
    assert any("s on two cores" in line for line in lines[:5])
    assert any("# Changed: " in line for line in lines)
