"""A base in host memory on a CUDA device: the same numbers, what it holds, and what it costs."""

import gc

import pytest
import torch

from bench import base_weights as bench
from bench.harness import Recorder, read
from fastdpo.modeling.activations import ACTIVATIONS, apply_activation_plan
from fastdpo.modeling.adapters import add_adapter, lora_config
from fastdpo.modeling.base_weights import host_weights
from fastdpo.modeling.loading import load_model
from tests.failing_backward import backward_breaks_off
from tests.gpu.test_memory import LAYERS, assert_close, base_folder, gradients  # noqa: F401
from tests.project.test_bench import InProcessTurns

pytestmark = pytest.mark.gpu

MIXTURES = [(choice,) * LAYERS for choice in ACTIVATIONS] + [
    ("recompute", "keep", "offload", "keep_attention", "recompute", "keep"),
    ("offload", "offload", "recompute", "keep_attention", "keep", "keep"),
]


def policy(folder, base_weights, in_4bit):
    torch.manual_seed(1)
    model = load_model(
        str(folder), dtype=torch.bfloat16, load_in_4bit=in_4bit, base_weights=base_weights
    )
    model = add_adapter(model, lora_config(16, 32, 0.1, None))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


@pytest.mark.parametrize("in_4bit", [False, True])
def test_gradients_are_those_of_resident_weights(base_folder, in_4bit):  # noqa: F811
    """To the order of atomic sums in the attention's backward; a copy too late is far off."""
    resident = policy(base_folder, "gpu", in_4bit)
    wanted = gradients(resident)
    again = gradients(resident)
    noise = max(float((again[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)
    del resident
    model = policy(base_folder, "host", in_4bit)
    weights = host_weights(model)
    assert all(block.host.is_pinned() for block in weights._blocks)
    for number, plan in enumerate(MIXTURES):
        weights.use_buffers(2 + number % 3)
        apply_activation_plan(model, plan)
        for _ in range(3):
            found = gradients(model)
            assert torch.equal(found["log-probs"], wanted["log-probs"]), plan
            assert_close(found, wanted, max(1e-4, 4 * noise))


def test_a_backward_that_breaks_off_leaves_the_weights_and_no_memory(base_folder):  # noqa: F811
    model = policy(base_folder, "host", False)
    apply_activation_plan(model, MIXTURES[-2])
    wanted = gradients(model)
    model.zero_grad()
    gc.collect()
    before = torch.cuda.memory_allocated()
    for stop in range(20):
        at = 1 + stop % (LAYERS - 1)
        with backward_breaks_off(model, at), pytest.raises(torch.OutOfMemoryError):
            gradients(model)
        model.zero_grad()
        gc.collect()
        assert torch.cuda.memory_allocated() <= before
    assert torch.equal(gradients(model)["log-probs"], wanted["log-probs"])


@pytest.mark.parametrize("in_4bit", [False, True])
@pytest.mark.parametrize("where", ["host", "gpu"])
def test_the_peak_is_predicted_within_3_percent(where, in_4bit):
    """At T = 2k, 4k, 8k and 16k, with tokens/s printed beside it."""
    lengths = [2048, 4096, 8192, 16384]
    line = InProcessTurns(bench.UPDATES * len(lengths))
    case = {"model": "llama-3.1-8b", "config": {"num_hidden_layers": 6}, "dtype": "bfloat16"}
    case |= {"device": "cuda", "load_in_4bit": in_4bit, "base_weights": where}
    bench.contend(case | {"micro_batch_tokens": lengths}, line)
    assert line.result is not None
    predicted = line.result.facts["predicted_mib"]
    for tokens in lengths:
        turns = [turn for turn in line.result.turns if turn["tokens"] == tokens]
        rate = tokens / min(turn["wall_s"] for turn in turns)
        peak = max(turn["peak_mib"] for turn in turns)
        print(f"T {tokens:,}: {rate:,.0f} tokens/s, {peak:.0f} MiB, {predicted[str(tokens)]:.0f}")
        assert predicted[str(tokens)] == pytest.approx(peak, rel=0.03)


def test_the_rate_of_the_copies_is_written(tmp_path):
    recorder = Recorder("base_weights", tmp_path / "rows.jsonl")
    bench.copies(recorder, torch.device("cuda", 0), bench.COPIES_BYTES)
    (row,) = read(tmp_path / "rows.jsonl")
    print(f"{row.p50:.1f} GB/s from pinned memory")
    assert row.p50 > 0
