"""The small parts by pytest-benchmark: `pytest bench/`.

They are for comparing two states of the code on one machine (`--benchmark-autosave`,
`--benchmark-compare`); what users feel is measured by the other benches.
"""

import numpy as np
import pytest
import torch
from fastdpo_kernels import linear_logprobs

from bench.inputs import HeadInputs, head_inputs, pair_lengths
from fastdpo.batching import PromptGroup, pack_update
from fastdpo.ref_cache.store import ReferenceStore, ScoredCompletion, group_keys, row_key

PAIRS = 64


@pytest.fixture(scope="module")
def head() -> HeadInputs:
    return head_inputs("peaked", 256, 128, 4096, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def groups() -> list[PromptGroup]:
    draw = np.random.default_rng(0)
    return [
        PromptGroup(
            draw.integers(0, 512, prompt, dtype=np.int32),
            tuple(draw.integers(0, 512, length, dtype=np.int32) for length in completions),
        )
        for prompt, *completions in pair_lengths(PAIRS, longest=1024)
    ]


def test_head_score(benchmark, head):
    with torch.no_grad():
        logps = benchmark(linear_logprobs, head.hidden_states, head.weight, head.target_ids)
    assert (logps <= 0).all()


def test_head_with_gradient(benchmark, head):
    states = head.hidden_states.clone().requires_grad_()

    def forward_and_backward() -> None:
        states.grad = None
        linear_logprobs(states, head.weight, head.target_ids).sum().backward()

    benchmark(forward_and_backward)
    assert states.grad is not None


@pytest.mark.parametrize("micro_batch_tokens", [2048, 8192])
def test_pack_update(benchmark, groups, micro_batch_tokens):
    micro_batches = benchmark(pack_update, groups, micro_batch_tokens)
    assert sum(len(m.group_indices) for m in micro_batches) == PAIRS


def test_row_keys(benchmark, groups):
    keys = benchmark(lambda: [key for group in groups for key in group_keys(group)])
    assert len(set(keys)) == 2 * PAIRS


def test_store_look_up(benchmark, tmp_path):
    store = ReferenceStore(tmp_path, {})
    keys = [row_key(np.array([i]), np.array([1])) for i in range(10_000)]
    one = np.array([-1.0], dtype=np.float32)
    store.append([ScoredCompletion(key, -1.0, one) for key in keys])
    assert np.isfinite(benchmark(store.lookup, keys)).all()
