"""scoring.py: every group once, also after memory has run out."""

import logging

import numpy as np
import pytest
import torch

from fastdpo.batching import group_tokens
from fastdpo.modeling import scoring
from fastdpo.modeling.layout import ExecutionLayout
from fastdpo.modeling.scoring import score_groups, score_pairs
from fastdpo.system.oom import DoesNotFitError
from tests.modeling.test_packed_pairs import model_of, random_groups

T = 200


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


@pytest.fixture
def memory_for(monkeypatch):
    """Let memory run out in micro-batches of more than so many tokens."""

    def bound(tokens):
        tried = []
        real = scoring.packed_logprobs

        def packed_logprobs(model, micro_batch, outputs):
            tried.append(micro_batch.num_tokens)
            if micro_batch.num_tokens > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return real(model, micro_batch, outputs)

        monkeypatch.setattr(scoring, "packed_logprobs", packed_logprobs)
        return tried

    return bound


def sizes(groups):
    rows = [[len(g.prompt_ids) + len(c) - 1 for c in g.completions] for g in groups]
    return max(map(group_tokens, groups)), max(map(max, rows))


@pytest.mark.parametrize("part", ["micro-batches", "completions"])
def test_memory_that_runs_out_changes_nothing_but_the_work(model, memory_for, part, caplog):
    groups = random_groups()
    expected = score_pairs(model, groups, ExecutionLayout(T), outputs=("entropy",))
    longest_group, max_seqlen = sizes(groups)
    assert max_seqlen < longest_group
    bound = longest_group if part == "micro-batches" else max_seqlen
    tried, layout = memory_for(bound), ExecutionLayout(4 * T)
    with caplog.at_level(logging.WARNING):
        found = score_pairs(model, groups, layout, outputs=("entropy",))
    failed = [tokens for tokens in tried if tokens > bound]
    assert layout.micro_batch_tokens < 4 * T, "lowered for whoever uses it next"
    assert (layout.most_group_tokens is not None) == (part == "completions")
    assert failed, "memory has run out"
    assert sum("Out of memory" in line for line in caplog.messages) == len(failed)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logps, expected.logps, rtol=1e-6)
    torch.testing.assert_close(found.token_logps, expected.token_logps)
    torch.testing.assert_close(found.extras["entropy"], expected.extras["entropy"])


def test_every_group_comes_once_in_the_same_order(model, memory_for):
    groups = random_groups()
    expected = [each.index for each in score_groups(model, groups, ExecutionLayout(T))]
    memory_for(sizes(groups)[1])
    found = [each.index for each in score_groups(model, groups, ExecutionLayout(T))]
    assert found == expected
    assert sorted(found) == list(range(len(groups)))


def test_memory_that_never_suffices_ends_with_what_to_do(model, memory_for):
    model.train()
    memory_for(0)
    with pytest.raises(DoesNotFitError, match=r"single completion.*--max_length"):
        score_pairs(model, random_groups(), ExecutionLayout(T))
    assert model.training, "as before"


def test_another_error_is_not_taken_for_a_lack_of_memory(model, monkeypatch):
    def wrong(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(scoring, "packed_logprobs", wrong)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        score_pairs(model, random_groups(), ExecutionLayout(T))
