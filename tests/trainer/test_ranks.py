"""Several processes share a run, and train what one process trains.

Each group of ranks does many cases, since what costs is to start one.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastdpo.cli.exit_codes import EXIT_LOST_RANK
from tests.project.test_docs import blocks_of, lines_of
from tests.several_ranks import outputs, run_ranks
from tests.tiny_trainer import HELD_OUT
from tests.trainer.rank_cases import (
    CASES,
    AtEvaluation,
    AtUpdate,
    all_of,
    fill_a_store,
    run_command,
    run_out_of_memory,
    save_inputs,
    talk,
    train_cases,
)

GRADIENT, WEIGHTS = 1e-6, 1e-4
"""Of the norm: one update's gradient in fp32, and the weights after 20 updates."""

TIMED = {
    "perf/pairs_per_second", "perf/tokens_per_second", "train_runtime", "train_samples_per_second",
    "train_steps_per_second", "memory/peak_gib",
}  # fmt: skip

PAGE = Path(__file__).parents[2] / "docs" / "several-gpus.md"
PARTS = {
    "cases": (train_cases, CASES),
    "memory": (run_out_of_memory,),
    "store": (fill_a_store,),
    "talk": (talk,),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    return all_of(PARTS, inputs, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module", params=[2, 3])
def group(request, inputs, tmp_path_factory, soak):
    """What each rank of a group has found; the larger one does every other case."""
    count, folder = request.param, tmp_path_factory.mktemp("group")
    cases = CASES if count == 2 or soak else CASES[1::2]
    parts = {**PARTS, "cases": (train_cases, cases)}
    found = run_ranks(count, all_of, folder, parts, inputs, folder)
    assert not any(isinstance(each, int) for each in found), outputs(folder, count)
    return found


def apart(found, expected):
    """The norm of the difference, relative to that of what was expected."""
    assert found.keys() == expected.keys()
    difference = sum((found[n] - each).double().square().sum() for n, each in expected.items())
    whole = sum(each.double().square().sum() for each in expected.values())
    return float((difference / whole).sqrt())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_train_what_one_process_trains(alone, group, case):
    if case.name not in group[0]["cases"]:
        pytest.skip("run by --soak, and by the smaller group")
    one, *others = (each["cases"][case.name] for each in (alone, *group))
    for other in others:
        assert apart(other.gradient, one.gradient) <= GRADIENT
        assert other.without == one.without
        result, expected = other.result, one.result
        torch.testing.assert_close(result.loss, expected.loss, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(result.logps, expected.logps, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result.ref_logps, expected.ref_logps, rtol=1e-6, atol=1e-6)
        assert result.token_metrics.keys() == expected.token_metrics.keys()
        for name, values in expected.token_metrics.items():
            theirs = result.token_metrics[name].double().sum()
            torch.testing.assert_close(theirs, values.double().sum(), rtol=1e-5, atol=1e-4)
        assert apart(other.weights, one.weights) <= WEIGHTS
        for mine, theirs in zip(one.logs, other.logs, strict=True):
            assert mine.keys() == theirs.keys()
            for name in mine.keys() - TIMED:
                assert theirs[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-4), name
    for name, weight in others[0].weights.items():  # on all ranks to the bit
        assert all(torch.equal(weight, other.weights[name]) for other in others[1:])


def test_an_update_sends_its_gradient_once(group):
    """Beside it go two numbers a pair, one a trained tensor, a few flags, and logged metrics."""
    for outcome in group[0]["cases"].values():
        gradient = sum(each.nbytes for each in outcome.gradient.values())
        tensors, tokens = len(outcome.gradient), len(outcome.result.token_completions)
        rest = outcome.traffic.tensor_bytes - gradient
        terms = 3 * 8 * outcome.result.logps.numel() + 8 * (tensors + 2)
        assert 0 < rest <= terms + 8 * 4 * tokens + 8 * 16
        assert outcome.traffic.collectives <= 10


def test_memory_that_runs_out_on_one_rank_is_agreed_on(alone, group):
    for index, (loss, whole) in enumerate(alone["memory"]):
        found = [each["memory"][index] for each in group]
        assert len(set(found)) == 1  # all ranks, loss and layout
        assert found[0][0] == pytest.approx(loss, rel=1e-6)
        assert whole < 4096
        assert found[0][1] < 4096


def test_the_store_is_the_same_and_no_row_is_computed_twice(alone, group):
    logps, computed, metrics, scores = alone["store"]
    found = [each["store"] for each in group]
    assert sum(each[1] for each in found) == computed
    assert all(0 < each[1] < computed for each in found)
    for its_logps, _, its_metrics, its_scores in found:
        np.testing.assert_allclose(its_logps, logps, rtol=1e-6)
        assert its_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)
        np.testing.assert_allclose(its_scores.logps, scores.logps, rtol=1e-6)
        torch.testing.assert_close(its_scores.extras, scores.extras)


def test_what_ranks_tell_each_other(group):
    count = len(group)
    for rank, found in enumerate(each["talk"] for each in group):
        one_each = 1.0 * sum(range(1, count + 1))
        assert found == {
            "first": 0,
            "gathered": [each for each in range(count) for _ in range(each)],
            "highest": 10,
            "total": sum(range(1, count + 1)),
            "joined": [[float(each)] * 2 for each in range(count) for _ in range(each)],
            "sent": [0.0] * 3,
            "summed": [[one_each] * size for size in (5, 70, 0, 3)],
            "after": rank,
            "errors": [
                "FileNotFoundError(2, 'No such file')",
                "RuntimeError('CUDA out of memory')"
                if rank == count - 1
                else f"RuntimeError('out of memory on rank {count - 1}')",
                found["errors"][2],
            ],
        }
        assert "data.rows: rank 1 has 1, rank 0 0" in found["errors"][2]
        assert "seed" not in found["errors"][2]


TRAIN = [
    "fastdpo.train", "--model", "my-model", "--dataset", "pairs.jsonl", "--lora",
    "--output_dir", "out", "--per_device_train_batch_size", "8", "--learning_rate", "5e-3",
    "--save_steps", "1", "--save_strategy", "steps", "--ref_cache", "reference", "--use_cpu",
]  # fmt: skip


def start(folder, count, words, callback=None):
    """Exit codes of a command's ranks, and all that they have written."""
    codes = run_ranks(count, run_command, folder / "ranks", words, folder, callback)
    return codes, outputs(folder / "ranks", count)


@pytest.fixture
def place(inputs, tmp_path):
    for path in inputs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory):
    """The adapter of one process."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for path in inputs.iterdir():
        (folder / path.name).symlink_to(path)
    codes, written = start(folder, 1, TRAIN)
    assert codes == [0], written
    return load_file(folder / "out" / "adapter_model.safetensors")


RESUME = ["--resume_from_checkpoint", "true"]


@pytest.mark.parametrize(("count", "then", "dies"), [(2, 3, 1), (3, 2, 0)])
def test_a_lost_rank_ends_the_run_with_one_message(place, uninterrupted, count, then, dies):
    codes, written = start(place, count, TRAIN, AtUpdate(dies, 3, signal.SIGKILL))
    assert codes.pop(dies) == -signal.SIGKILL
    assert set(codes) == {EXIT_LOST_RANK}, written
    errors = re.findall("^error: .*", written, re.MULTILINE)
    assert len(errors) == 1 or dies == 0, written  # the first rank held what they talk through
    assert "another process of this run has ended" in errors[0]
    assert "Traceback" not in written
    assert (place / "out" / "checkpoint-2").is_dir()
    codes, written = start(place, then, [*TRAIN, *RESUME])
    assert codes == [0] * then, written
    assert written.count("The adapter lies in out.") == 1
    adapter = load_file(place / "out" / "adapter_model.safetensors")
    assert apart(adapter, uninterrupted) <= WEIGHTS


def test_the_commands_of_the_page(place, monkeypatch):
    """torchrun's processes are forked here; --soak lets torchrun itself start them."""
    monkeypatch.setenv("FASTDPO_CACHE", str(place / "cache"))
    blocks = [block for block in blocks_of(PAGE.read_text()) if block.info == "bash ranks"]
    lines = [line for block in blocks for line in lines_of(block.text)]
    assert len(lines) >= 5
    for line in lines:
        launcher, option, count, _, *words = shlex.split(line)
        assert (launcher, option) == ("torchrun", "--nproc_per_node")
        codes, written = start(place, int(count), words)
        assert codes == [0] * int(count), written
    assert len((place / "scores.jsonl").read_text().splitlines()) == len(HELD_OUT)
    assert json.loads((place / "out" / "evaluation.json").read_text())["pairs"] == len(HELD_OUT)
    assert (place / "long" / "checkpoint-2").is_dir()


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "torch.distributed.run", "--nproc_per_node", "2"],
        ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"],
    ],
    ids=["torchrun", "accelerate"],
)
def test_real_launchers(place, soak, uninterrupted, launcher):
    if not soak:
        pytest.skip("starts each process with its imports; run by --soak")
    words = [sys.executable, *launcher, "-m", *TRAIN]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The adapter lies in out.") == 1
    adapter = load_file(place / "out" / "adapter_model.safetensors")
    assert apart(adapter, uninterrupted) <= WEIGHTS


def test_torchrun_lets_the_reason_be_told(place, soak):
    if not soak:
        pytest.skip("starts each process with its imports; run by --soak")
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", *TRAIN]
    with subprocess.Popen(
        [*words, "--num_train_epochs", "500"], cwd=place, stderr=subprocess.PIPE, text=True
    ) as run:
        while not (place / "out" / "checkpoint-2").is_dir():
            assert run.poll() is None
            time.sleep(0.1)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, written = run.communicate(timeout=120)
    assert run.returncode != 0
    assert len(re.findall("^.*error: another process of this run", written, re.MULTILINE)) == 1


EVALUATE = ["--eval_dataset", "held_out.jsonl", "--eval_strategy", "steps", "--eval_steps", "2"]


@pytest.mark.parametrize(
    "callback",
    [AtUpdate(1, 2, signal.SIGTERM), AtEvaluation(1, signal.SIGTERM)],
    ids=["in the update", "in the evaluation after it"],
)
def test_a_signal_to_one_rank_stops_all_at_the_same_update(place, uninterrupted, callback):
    codes, written = start(place, 2, [*TRAIN, *EVALUATE], callback)
    assert codes == [143, 143], written
    assert "eval_loss" not in (place / "out" / "metrics.jsonl").read_text()
    assert sorted(path.name for path in (place / "out").glob("checkpoint-*"))[-1] == "checkpoint-2"
    lines = (place / "out" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["step"] <= 2 for line in lines)
    codes, written = start(place, 1, [*TRAIN, *EVALUATE, *RESUME])
    assert codes == [0], written
    adapter = load_file(place / "out" / "adapter_model.safetensors")
    assert apart(adapter, uninterrupted) <= WEIGHTS
