"""Rounding a merge to 16 bits: what nearest swallows, stochastic rounding keeps in the mean."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from fastdpo import merge
from fastdpo.merging.fidelity import Fidelity, Preference, Shift
from fastdpo.merging.rounding import ROUNDED, Rounding, round_stochastically, round_update
from tests.merging.test_merge import llama, make, workplace  # noqa: F401


def all_numbers(dtype):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return numbers[numbers.isfinite()]


def neighbors(exact, dtype):
    """The numbers of the dtype below and above each value, or the value itself twice."""
    numbers = all_numbers(dtype).double().unique()
    below = numbers[torch.searchsorted(numbers, exact.double(), right=True) - 1]
    return below, numbers[torch.searchsorted(numbers, exact.double())]


@pytest.mark.parametrize("dtype", ROUNDED)
def test_a_draw_is_one_of_two_neighbors_and_right_in_the_mean(dtype):
    draw = torch.Generator().manual_seed(1)
    exact = torch.cat([
        torch.randn(300, generator=draw), 1e-6 * torch.randn(50, generator=draw), torch.zeros(1),
    ])  # fmt: skip
    lower, upper = neighbors(exact, dtype)
    draws = torch.stack(
        [round_stochastically(exact, dtype, f"seed {i}").double() for i in range(800)]
    )
    assert ((draws == lower) | (draws == upper)).all()
    error = (draws.mean(dim=0) - exact.double()).abs()
    assert (error <= 5 * (upper - lower) / 2 / 800**0.5).all()
    again = round_stochastically(exact, dtype, "seed 0").double()
    assert torch.equal(again, draws[0])


@pytest.mark.parametrize("dtype", ROUNDED)
def test_numbers_of_the_dtype_and_beyond_it_stay(dtype):
    own = all_numbers(dtype)
    assert torch.equal(round_stochastically(own.float(), dtype, "any"), own)
    largest = torch.finfo(dtype).max
    assert round_stochastically(torch.tensor([largest * 1.0001]), dtype, "any").isfinite().all()


def test_stochastic_only_where_nearest_swallows():
    before = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for size, swallowed in ((1e-5, True), (1.0, False)):
        after = before.float() + size * torch.rand(64, 64)
        nearest, at_nearest = round_update(
            before, after, torch.bfloat16, stochastic=False, seed="0"
        )
        drawn, counts = round_update(before, after, torch.bfloat16, stochastic=True, seed="0")
        assert (counts.stochastic == 64 * 64) is swallowed
        assert counts.unchanged_nearest == at_nearest.unchanged_written
        assert torch.equal(drawn, nearest) is not swallowed
        assert counts.unchanged_written == int((drawn == before).sum())


ARGV = ["--adapter", "adapter", "--dataset", "pairs.jsonl"]


@pytest.fixture
def small_update(workplace):  # noqa: F811
    """A bf16 base and an adapter whose update is below the dtype's resolution almost everywhere."""
    make(llama(), LoraConfig(r=4, target_modules="all-linear"), dtype=torch.bfloat16)
    path = Path("adapter/adapter_model.safetensors")
    save_file({n: t * (0.0003 if "lora_B" in n else 1.0) for n, t in load_file(path).items()}, path)
    return workplace


def report_of(folder="merged"):
    return json.loads(Path(folder, "merge.json").read_text())["report"]


def test_a_swallowed_update_is_kept_and_both_roundings_are_shown(small_update, capsys):
    merge.main(ARGV)
    said = capsys.readouterr().out
    report = report_of()
    assert report["written"] == "bf16 stochastic"
    counts = report["roundings"]["bf16 stochastic"]
    assert counts["stochastic"] > 0.9 * counts["weights"]
    assert counts["unchanged_nearest"] > 0.8 * counts["weights"]
    assert "updated weights are as they were (to nearest" in said
    learned = report["learned"]["margin"]
    lost = {way: abs(kept["margin"] - learned) for way, kept in report["kept"].items()}
    assert set(lost) == {"bf16 stochastic", "bf16 nearest"}
    merge.main([*ARGV, "--output_dir", "again"])
    first = load_all("merged")
    assert all(torch.equal(tensor, first[name]) for name, tensor in load_all("again").items())
    merge.main([*ARGV, "--output_dir", "other", "--rounding_seed", "1"])
    other = load_all("other")
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


def load_all(folder):
    return {n: t for path in Path(folder).glob("*.safetensors") for n, t in load_file(path).items()}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_dtype_that_is_asked_for_is_written(small_update, dtype):
    merge.main([*ARGV, "--dtype", dtype])
    wanted = getattr(torch, dtype)
    assert {tensor.dtype for tensor in load_all("merged").values()} == {wanted}
    assert json.loads(Path("merged/config.json").read_text())["dtype"] == dtype
    index = json.loads(Path("merged/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_all("merged").values())
    report = report_of()
    shift = report["shifts"]["bf16 stochastic"]["token_worst"]
    if dtype == "float32":  # nothing is rounded
        assert shift < 1e-4
        assert set(report["kept"]) == {"bf16 stochastic"}
        assert report["kept"]["bf16 stochastic"]["margin"] == pytest.approx(
            report["learned"]["margin"], abs=1e-4
        )


def test_less_than_nine_tenths_kept_is_warned_of():
    def fidelity(margin, dtype="bfloat16"):
        kept = {"bf16 nearest": Preference(margin, 0.5), "bf16 stochastic": Preference(1.0, 0.75)}
        return Fidelity(
            in_4bit=False, written="bf16 nearest", dtype=dtype, adapter=[[0.0, 0.0]],
            learned=Preference(1.0, 0.75), merged={}, kept=kept,
            shifts=dict.fromkeys(kept, Shift(*[0.1] * 6)), on_whole_base=None,
            roundings=dict.fromkeys(kept, Rounding(100, 93, 93, 0)),
        )  # fmt: skip

    said = fidelity(0.46).describe()
    assert "Warning: the merged model keeps 46.0%" in said
    assert "--onto bf16 --rounding stochastic --overwrite" in said
    assert "--dtype float32" in said
    assert "Warning" not in fidelity(0.95).describe()
