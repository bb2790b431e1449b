"""Rows: full, few lengths, every group once, whatever its size; and how they are told apart."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import layers
from bench.packing import PAIRS, TOKENS, fill, pair_lengths, real_groups, updates_of
from fastdpo.batching import PromptGroup, group_tokens, pack_in_order, pack_update
from fastdpo.batching.bin_packing import fill_evenly, rounded_length
from tests.modeling.test_packed_pairs import random_groups


def group_of(prompt, *completions, seed=0):
    draw = np.random.default_rng(seed)
    sides = [draw.integers(1, 500, n, dtype=np.int32) for n in (prompt, *completions)]
    for number, side in enumerate(sides[1:]):
        side[0] = 500 + number  # nothing shared beyond the prompt
    return PromptGroup(sides[0], tuple(sides[1:]))


@given(st.lists(st.integers(1, 700), min_size=1, max_size=60), st.integers(128, 600))
def test_every_group_is_in_one_bin_that_holds_it(sizes, limit):
    bins = fill_evenly(sizes, limit)
    assert sorted(i for indices in bins for i in indices) == list(range(len(sizes)))
    for indices in bins:
        assert sum(sizes[i] for i in indices) <= limit or len(indices) == 1
    least = -(-sum(size for size in sizes if size <= limit) // limit)
    assert len(bins) >= least + sum(size > limit for size in sizes)


@given(st.integers(1, 1 << 17))
def test_lengths_are_few_and_hardly_longer_than_needed(tokens):
    length = rounded_length(tokens)
    assert tokens <= length < tokens + max(32, tokens / 32 + 1)
    assert rounded_length(length) == length


def test_few_lengths_in_an_octave():
    assert len({rounded_length(n) for n in range(2049, 4097)}) == 32
    assert len({rounded_length(n) for n in range(1, 1025)}) == 32


def test_a_long_pair_has_a_row_of_its_own_and_raises_no_other():
    groups = [group_of(2000, 300, 200), *(group_of(50, 30, 40, seed=i) for i in range(20))]
    long, *others = sorted(pack_update(groups, 512), key=lambda m: -m.input_ids.shape[1])
    assert long.group_indices == (0,)
    assert long.input_ids.shape[1] == rounded_length(group_tokens(groups[0]))
    assert all(m.input_ids.shape[1] <= 512 for m in others)


def test_a_limit_that_is_no_step_is_kept():
    groups = [group_of(50, 30, 40, seed=i) for i in range(40)]
    assert max(m.input_ids.shape[1] for m in pack_update(groups, 1001)) <= 1001


@pytest.mark.parametrize("layout", [{}, {"shared_prefix": False}, {"packing": False}])
def test_what_a_micro_batch_says_of_itself(layout):
    groups = random_groups(9)
    seen = []
    for micro_batch in pack_update(groups, 200, **layout):
        own = [groups[i] for i in micro_batch.group_indices]
        seen += micro_batch.group_indices
        lengths = [len(c) for g in own for c in g.completions]
        assert micro_batch.completion_tokens.tolist() == lengths
        assert micro_batch.token_mask.sum() == micro_batch.num_tokens
        rows = [len(g.prompt_ids) + len(c) - 1 for g in own for c in g.completions]
        assert micro_batch.max_seqlen == max(rows)
        if layout:
            assert micro_batch.num_tokens == sum(rows)
        assert bool(micro_batch.segments) == layout.get("packing", True)
        # Each scored state is at the place before its target, in a row of the right tokens.
        targets = torch.cat([torch.from_numpy(c) for g in own for c in g.completions])
        assert torch.equal(micro_batch.target_ids[micro_batch.token_index], targets.long())
        places = micro_batch.scored_positions[micro_batch.token_index]
        before = micro_batch.input_ids.flatten()[places]
        wanted = [np.concatenate([g.prompt_ids[-1:], c[:-1]]) for g in own for c in g.completions]
        assert torch.equal(before, torch.from_numpy(np.concatenate(wanted)).long())
        positions = micro_batch.position_ids.flatten()[places]
        starts = [len(g.prompt_ids) - 1 + np.arange(len(c)) for g in own for c in g.completions]
        assert torch.equal(positions, torch.from_numpy(np.concatenate(starts)))
    assert sorted(seen) == list(range(len(groups)))


def test_padded_rows_hold_no_more_than_t():
    groups = [group_of(50, 30, 40, seed=i) for i in range(20)] + [group_of(900, 20, 30)]
    laid = [*pack_update(groups, 1024, packing=False), *pack_in_order(groups, 1024, packing=False)]
    for micro_batch in laid:
        alone = len(micro_batch.group_indices) == 1
        assert micro_batch.input_ids.numel() <= 1024 or alone
        assert len(micro_batch.seq_lens) == len(micro_batch.input_ids)


def test_groups_of_a_list_are_laid_as_one_where_they_fit():
    story = group_of(200, 30, 40)
    groups = [
        story,
        group_of(60, 20, 20, seed=1),
        PromptGroup(story.prompt_ids, group_of(9, 50, 10, seed=2).completions),
        PromptGroup(story.prompt_ids, group_of(9, 8, 90, seed=3).completions),
    ]
    lists = [0, 1, 0, 0]
    (joined,) = pack_update(groups, 4096, lists=lists)
    (alone,) = pack_update(groups, 4096)
    assert alone.num_tokens - joined.num_tokens == 2 * len(story.prompt_ids)
    order = joined.group_indices
    assert sorted(order) == [0, 1, 2, 3]
    lengths = [len(c) for i in order for c in groups[i].completions]
    assert joined.completion_tokens.tolist() == lengths
    assert len(joined.segments) == 3, "two prompts and the filler"
    for limit in (300, 400):  # what does not fit together stays apart
        laid = pack_update(groups, limit, lists=lists)
        assert max(m.input_ids.shape[1] for m in laid) <= limit
    padded = pack_update(groups, 6 * 300, packing=False, lists=lists)
    assert [m.group_indices for m in padded] == [(0, 2, 3), (1,)]
    together = [groups[i] for i in (0, 2, 3, 1)]
    (in_order,) = pack_in_order(together, 4096, lists=[0, 0, 0, 1])
    assert in_order.num_tokens == joined.num_tokens


def test_completions_of_a_micro_batch_can_count_in_another_order_and_often():
    groups = [group_of(20, 5, 7), group_of(10, 3, 4, seed=1)]
    (micro_batch,) = pack_update(groups, 512)
    ends = micro_batch.completion_tokens.cumsum(0)[:-1]
    parts = micro_batch.token_index.tensor_split(ends)
    chosen = micro_batch.select([3, 0, 3])
    assert chosen.completion_tokens.tolist() == [4, 5, 4]
    assert torch.equal(chosen.token_index, torch.cat([parts[3], parts[0], parts[3]]))
    assert chosen.input_ids is micro_batch.input_ids
    assert micro_batch.select(range(4)) is micro_batch


def cells_of_the_table(sets, count):
    for name, groups in sets.items():
        for tokens in TOKENS:
            for pairs in PAIRS:
                found = []
                for update in updates_of(groups, pairs, count):
                    laid = pack_update(update, tokens)
                    padded = pack_update(update, tokens, packing=False)
                    found.append((sum(m.num_tokens for m in laid), fill(laid), fill(padded)))
                yield name, tokens, pairs, np.array(found)


def test_fill_on_real_lengths(shared_data, soak):
    """97 % where an update has 8 T tokens or more, and no cell below padding, pairs sorted."""
    held_to_account = 0
    for name, tokens, pairs, found in cells_of_the_table(real_groups(), 20 if soak else 2):
        total, packed, padded = found.T
        cell = f"{name} T={tokens} B={pairs}: {packed.mean():.3f}, padded {padded.mean():.3f}"
        assert packed.mean() >= padded.mean(), cell
        assert packed.mean() >= 0.9, cell
        if (large := total >= 8 * tokens).any():
            held_to_account += 1
            assert packed[large].mean() >= 0.97, cell
    assert held_to_account >= 5


def test_packing_is_fast():
    groups = [group_of(*lengths, seed=i) for i, lengths in enumerate(pair_lengths(1024))]
    sizes = [group_tokens(group) for group in groups]
    taken = []
    for _ in range(5):
        began = time.process_time()
        fill_evenly(sizes, 2048)
        taken.append(time.process_time() - began)
    assert min(taken) < 0.1, "about 2 ms on a quiet machine"


class OneTurn:
    """What a contender sees of the bench: one turn, and its metrics."""

    def __init__(self):
        self.facts, self.metrics = {}, []

    def ready(self, facts):
        self.facts = facts

    def answer(self, metrics):
        self.metrics.append(metrics)

    def __iter__(self):
        yield


@pytest.mark.parametrize("contender", layers.CONTENDERS)
def test_the_bench_of_layers_runs(contender):
    case = next(layers.cases(quick=True)) | {"contender": contender, "device": "cpu"}
    case |= {"pairs": 3, "row_tokens": 24, "dtype": "float32"}
    turns = OneTurn()
    layers.contend(case, turns)
    assert turns.facts["peak_mib"] > -1.0
    assert turns.metrics[0]["wall_s"] > 0


def test_the_bound_counts_products():
    """Of one pair without padding: tokens times weights, and the pairs of query and key."""
    case = {"device": "cpu", "pairs": 1, "row_tokens": 64, "prompt_share": 0.5}
    case |= {"micro_batch_tokens": 4096, "padded_pairs": 1}
    (group,) = layers.groups_of(case)
    (shared,) = layers.micro_batches_of(case, {})
    every = sum(layers.seen_keys(m) for m in layers.micro_batches_of(case, {"packing": False}))
    prompt, rows = len(group.prompt_ids), [len(c) - 1 for c in group.completions]
    own = sum(n * prompt + n * (n + 1) // 2 for n in rows) + prompt * (prompt + 1) // 2
    filler = shared.input_ids.numel() - shared.num_tokens
    assert layers.seen_keys(shared) == own + filler * (filler + 1) // 2
    assert every >= own
    bounds = [
        layers.step_flops(case | {"prompt_share": share}, {"packing": False})
        / layers.step_flops(case | {"prompt_share": share}, {})
        for share in (0.2, 0.8)
    ]
    assert bounds[0] < bounds[1]
