"""layout.py: what shrinks when memory runs out, in which order, and what a checkpoint stores."""

import json

import numpy as np
import pytest
import torch

from fastdpo.batching import PromptGroup
from fastdpo.modeling.layout import ExecutionLayout, distinct_items, group_length, run_within_memory
from fastdpo.modeling.packing import PackingMode
from fastdpo.system.oom import DoesNotFitError

MODE = PackingMode()
UNPACKED = PackingMode(packing=False, shared_prefix=False)


def group(prompt, *completions):
    """A group whose completions differ from their first token on."""
    ids = [np.arange(tokens) + 10 * side for side, tokens in enumerate(completions)]
    return PromptGroup(np.zeros(prompt, dtype=np.int32), tuple(ids))


GROUPS = [group(50, 11, 15), group(20, 5, 9), group(30, 40, 2), group(10, 3, 4)]


def whole(groups=GROUPS):
    return distinct_items(groups)[0]


def test_a_layout_survives_json():
    layout = ExecutionLayout(512, ("offload", "keep"), 2048, None, True, 300, "sdpa-per-segment")
    stored = json.loads(json.dumps(layout.as_json()))
    assert ExecutionLayout.from_json(stored) == layout
    stored["layer_policy"] = stored.pop("activation_plan")  # as 0.1 wrote it
    assert ExecutionLayout.from_json(stored) == layout
    held = ExecutionLayout(1)
    held.assign(layout)
    assert held == layout


def test_t_is_halved_down_to_one_group_before_groups_are_split():
    layout, items = ExecutionLayout(1000), whole()
    lengths = [group_length(each, MODE) for each in GROUPS]
    assert lengths == [74, 32, 70, 15]
    seen = []
    for _ in range(4):
        layout.shrink(items, MODE, "out of memory")
        seen.append((layout.micro_batch_tokens, layout.most_group_tokens))
    assert seen == [(95, None), (74, None), (73, 73), (73, 73)]
    split = layout.split(items, MODE)
    assert [each.completions for each in split] == [(0,), (1,), (2, 3), (4, 5), (6, 7)]
    assert layout.split(split, MODE) == split


@pytest.mark.parametrize("mode", [MODE, UNPACKED])
def test_a_single_completion_that_does_not_fit_ends_the_run(mode):
    layout = ExecutionLayout(10)
    alone = whole([group(50, 11)])
    with pytest.raises(DoesNotFitError, match="60 tokens"):
        layout.shrink(alone, mode, "out of memory")


@pytest.mark.parametrize("most", [70, 69])
def test_work_goes_on_in_smaller_units_and_nothing_is_done_twice(most):
    """Units of as many items as T holds; more than `most` tokens in one run out of memory."""
    layout, undone = ExecutionLayout(150), []

    def lay_out(items):
        while items:
            count = 1
            while count < len(items) and tokens(items[: count + 1]) <= layout.micro_batch_tokens:
                count += 1
            yield items[:count], items[:count]
            items = items[count:]

    def tokens(items):
        return sum(group_length(each.group, MODE) for each in items)

    def work(items):
        if tokens(items) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [completion for each in items for completion in each.completions]

    sorted_items = sorted(whole(), key=lambda item: -group_length(item.group, MODE))
    results = run_within_memory(
        sorted_items, layout, MODE, lay_out=lay_out, work=work, undo=lambda: undone.append(1)
    )
    done = [completion for unit in results for completion in unit]
    assert done == [0, 1, 4, 5, 2, 3, 6, 7]
    assert undone
    assert layout.most_group_tokens == (73 if most == 70 else 69)


def test_other_errors_pass():
    def work(items):
        raise RuntimeError("shapes do not match")

    units = run_within_memory(
        whole(), ExecutionLayout(9), MODE, lay_out=lambda items: [(items, items)], work=work
    )
    with pytest.raises(RuntimeError, match="shapes do not match"):
        next(units)
