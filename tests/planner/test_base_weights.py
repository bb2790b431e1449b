"""Plans with the base in host memory: what fits, whether copies hide, and why it is chosen."""

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from bench import base_weights as bench
from bench import harness
from fastdpo.plan import BASES
from fastdpo.planner import (
    Training,
    Workload,
    architecture_named,
    gpu_spec,
    longest_pair,
    make_plan,
)
from fastdpo.planner.architecture import architecture_of_config
from fastdpo.planner.gpus import HOST_GB_PER_S
from fastdpo.planner.memory_layout import MemoryLayout, MemoryStrategy
from fastdpo.planner.search import buffer_counts, strategies
from fastdpo.planner.speed import MicroBatchTimes
from fastdpo.planner.terms import GIB, MIB, base_blocks
from tests.project.test_bench import InProcessTurns

LORA, QLORA = Training("lora"), Training("qlora")
LLAMA_70B = LlamaConfig(
    vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def llama():
    return architecture_named("llama-3.1-8b")


def planned(architecture, training, size, base_weights, *, tokens=2048, host=32, **options):
    return make_plan(
        architecture, training, gpu_spec(size), Workload(tokens, 16 * tokens),
        host_bytes=int(host * GIB), base_weights=base_weights, **options,
    )  # fmt: skip


def test_16_bits_of_an_8b_fit_8_gb_from_the_host_alone(llama):
    on_gpu = planned(llama, LORA, "8", "gpu")
    assert not on_gpu.fits
    assert "the base in host memory (--base_weights host)" in on_gpu.notes[0]
    made = planned(llama, LORA, "8", "auto")
    assert made.fits
    assert made.base_buffers == 2
    assert made.pinned_host_bytes > base_blocks(llama, LORA).bytes == 6_979_321_856 * 2
    assert made.terms["linear layers"] == 0
    assert made.terms["buffers of the base"] == 2 * 6_979_321_856 * 2 // 32
    assert "since the pairs do not fit beside it on the GPU" in made.notes[0]
    assert f"at {HOST_GB_PER_S:g} GB/s (assumed) and hide behind" in made.notes[0]
    assert made.notes[0] in made.describe()
    without_room = planned(llama, LORA, "8", "auto", host=8)
    assert not without_room.fits
    assert "of pinned host memory and may have 8.00 GiB" in "".join(without_room.notes)


def test_a_70b_in_nf4_fits_24_gb_from_the_host_alone():
    architecture = architecture_of_config(LLAMA_70B, "llama-70b")
    options = {"gpu": gpu_spec("24"), "host_bytes": 64 * GIB}
    assert longest_pair(architecture, QLORA, **options) is None
    made = longest_pair(architecture, QLORA, **options, base_weights="host")
    assert made.micro_batch_tokens > 4096
    assert 32 * GIB < base_blocks(architecture, QLORA).bytes < 34 * GIB


def test_auto_leaves_the_base_on_the_gpu_where_that_is_as_fast(llama):
    made = planned(llama, LORA, "24", "auto")
    assert made.base_buffers == 0
    assert made.notes == (
        "The base lies on the GPU, where it fits; from host memory it would be hardly faster.",
    )
    assert replace(made, notes=()) == planned(llama, LORA, "24", "gpu")


def test_auto_takes_the_host_where_more_is_kept_for_it(llama):
    on_gpu, made = (planned(llama, QLORA, "8", each) for each in ("gpu", "auto"))
    assert on_gpu.fits
    assert made.base_buffers
    assert made.activation_counts["keep"] > on_gpu.activation_counts["keep"]
    gain = made.tokens_per_second / on_gpu.tokens_per_second
    assert gain > 1.1
    assert f"is {gain - 1:.0%} faster, since more is kept" in made.notes[0]


def test_copies_that_do_not_hide_are_said_and_counted(llama):
    short = {"tokens": 256, "micro_batch_tokens": 256}
    on_gpu = planned(llama, LORA, "80", "gpu", **short)
    made = planned(llama, LORA, "80", "host", **short)
    assert "do not hide behind" in made.notes[0]
    assert "as requested" in made.notes[0]
    assert made.base_buffers == 24, "as many as there is a choice of: the GPU is large"
    assert made.tokens_per_second < on_gpu.tokens_per_second
    layout = MemoryLayout(
        llama, LORA, Workload(256, 256).shape(256), MemoryStrategy("adamw_torch", base_buffers=24)
    )
    assert layout.copied_bytes == base_blocks(llama, LORA).bytes * 8 // 32


def test_the_time_of_a_micro_batch_hides_what_runs_beside_it():
    times = MicroBatchTimes(1.0, 3.0, offloaded=0.5, copied=0.75, launches=0.1)
    assert times.copies_hide
    assert times.total == 4.0
    late = replace(times, copied=2.75)
    assert not late.copies_hide
    assert late.total == 2.75 + 3.25
    assert replace(times, copied=0.0, offloaded=2.5).total == 5.0
    assert replace(times, launches=7.0).total == 7.0


def test_strategies_of_the_host_follow_and_save_more_and_more(llama):
    assert buffer_counts(llama, LORA) == [24, 16, 8, 2]
    for training in (LORA, QLORA):
        on_gpu = strategies(llama, training, change_optimizer=False)
        both = strategies(llama, training, change_optimizer=False, base_weights="auto")
        host = strategies(llama, training, change_optimizer=False, base_weights="host")
        assert both == [*on_gpu, *host]
        assert all(each.base_buffers for each in host)
        last = strategies(llama, training, change_optimizer=True, base_weights="auto")[-2:]
        assert [each.optimizer for each in last] == ["adamw_8bit"] * 2
        assert [bool(each.base_buffers) for each in last] == [False, True]
    full = Training("full")
    assert strategies(llama, full, change_optimizer=False, base_weights="auto") == strategies(
        llama, full, change_optimizer=False
    )
    with pytest.raises(ValueError, match="all weights are trained"):
        strategies(llama, full, change_optimizer=False, base_weights="host")


def test_small_layers_share_blocks_and_few_blocks_share_buffers():
    sizes = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 172}
    tiny = architecture_of_config(
        LlamaConfig(**sizes, num_hidden_layers=3, num_attention_heads=8), "tiny"
    )
    blocks = base_blocks(tiny, LORA)
    assert (blocks.count, blocks.largest) == (1, blocks.bytes)
    assert blocks.bytes < 8 * MIB
    assert buffer_counts(tiny, LORA) == [1]


def test_the_bench_runs_at_toy_size_and_trains_alike(tmp_path, monkeypatch):
    losses = {}

    def solo(function, case, *, turns):
        assert function == bench.CONTENDER
        line = InProcessTurns(turns)
        bench.contend(case, line)
        losses[case["base_weights"], case["load_in_4bit"]] = [
            turn["loss"] for turn in line.result.turns
        ]
        return line.result

    monkeypatch.setattr(bench, "solo", solo)
    monkeypatch.setattr(bench, "ALIASES", ("llama-3.2-3b",))
    monkeypatch.setattr(bench, "CONFIGS", {})
    recorder = harness.Recorder("base_weights", tmp_path / "rows.jsonl", prints=False)
    bench.main(recorder, quick=True)
    for in_4bit in (False, True):
        assert losses["host", in_4bit] == losses["gpu", in_4bit]
        assert losses["host", in_4bit][-1] < losses["host", in_4bit][0]
    rows = harness.read(tmp_path / "rows.jsonl")
    assert {row.metric for row in rows} == {
        "copied_gb_per_s", "update_s", "useful_tokens_per_s", "peak_mib", "longest_row_tokens",
    }  # fmt: skip
    by_way = {row.contender: row for row in rows if row.metric == "longest_row_tokens"}
    assert set(by_way) == {f"plan, {way}" for way in BASES}
    assert by_way["plan, 16 bits from host"].p50 > by_way["plan, 16 bits on GPU"].p50
