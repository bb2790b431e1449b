"""Pairs to packed micro-batches: every prompt token once, no padding between sequences.

A group is one prompt with k completions. Its rows prompt + completion share their longest common
token prefix, the prefix, which is computed once; what remains of each row is a suffix that attends
to the prefix and to itself. A micro-batch is one row of at most T tokens: groups one after another,
each as [prefix | suffix 1 | ... | suffix k], and a filler segment that nothing reads.

    tokens       the  cat  sat  .   | ran  off  .   | the  dog ...
                 `--- prefix ---'`- suffix 1 -'`- suffix 2 -'`- next group ...
    positions     0    1    2   3     4   5    3   4  5      0    1

Unpacked, for models in which neighbours in a row would mix, a micro-batch is a batch of rows, one
a completion, filled up on the right: what comes after a token changes nothing before it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastdpo.batching.bin_packing import fill_evenly, rounded_length
from fastdpo.batching.groups import PromptGroup, group_tokens, shared_prefix_length
from fastdpo.batching.micro_batch import MicroBatch, Segment

PADDED_STEP_TOKENS = 8
"""Padded rows are multiples of this: what matrix units want, and hardly more padding."""


def default_micro_batch_tokens(device: torch.device) -> int:
    """T where nobody names one and no plan chooses it: 4,096 on CUDA, 2,048 on the CPU."""
    return 4096 if device.type == "cuda" else 2048


def pack_update(
    groups: Sequence[PromptGroup],
    micro_batch_tokens: int,
    *,
    shared_prefix: bool = True,
    packing: bool = True,
    merge_prompts: bool = False,
) -> list[MicroBatch]:
    """Lay the groups of one update into as few micro-batches as will do, evenly filled.

    Args:
        groups: the update's groups, at least one.
        micro_batch_tokens: T, the most tokens of a micro-batch; only a group that is longer by
            itself makes a longer one, which holds nothing else.
        shared_prefix: compute the tokens that a group's rows share once; off, once per completion.
        packing: lay groups one after another in one row; off, every completion into a padded row
            of its own, where nothing is shared.
        merge_prompts: compute a prompt that several of the groups share once for all of them.

    Returns:
        Micro-batches, each as long as it is full, rounded up; every group is in one of them.
    """
    alone: list[_Entry] = [((index,), group) for index, group in enumerate(groups)]
    if not packing:
        order = sorted(alone, key=lambda entry: -_max_seqlen(entry[1]))
        return list(_in_order(order, micro_batch_tokens, shared_prefix, packing))
    entries = _merged_entries(alone, micro_batch_tokens) if merge_prompts else alone
    sizes = [group_tokens(group, shared_prefix=shared_prefix) for _, group in entries]
    return [
        _collate([entries[i] for i in sorted(indices)], micro_batch_tokens, shared_prefix)
        for indices in fill_evenly(sizes, micro_batch_tokens)
    ]


def pack_in_order(
    groups: Iterable[PromptGroup],
    micro_batch_tokens: int,
    *,
    shared_prefix: bool = True,
    packing: bool = True,
) -> Iterator[MicroBatch]:
    """Pack a stream next-fit, each micro-batch as long as it is full: for length-sorted passes."""
    alone = (((index,), group) for index, group in enumerate(groups))
    return _in_order(alone, micro_batch_tokens, shared_prefix, packing)


_Entry = tuple[tuple[int, ...], PromptGroup]
"""What is laid as one: groups of one prompt, by their indices, and the group they make."""


def _in_order(
    entries: Iterable[_Entry], limit: int, shared_prefix: bool, packing: bool
) -> Iterator[MicroBatch]:
    waiting: list[_Entry] = []
    filled = rows = longest = 0
    for entry in entries:
        size = group_tokens(entry[1], shared_prefix=shared_prefix)
        count, own = len(entry[1].completions), _max_seqlen(entry[1])
        needed = filled + size if packing else (rows + count) * _padded(max(longest, own))
        if waiting and needed > limit:
            yield _collate(waiting, limit, shared_prefix, packing)
            waiting, filled, rows, longest = [], 0, 0, 0
        waiting.append(entry)
        filled, rows, longest = filled + size, rows + count, max(longest, own)
    if waiting:
        yield _collate(waiting, limit, shared_prefix, packing)


def _merged_entries(entries: Sequence[_Entry], limit: int) -> list[_Entry]:
    """Join groups of one prompt, as long as they fit into T and tokens are saved."""
    open_at: dict[bytes, int] = {}
    merged: list[_Entry] = []
    for indices, group in entries:
        at = open_at.get(group.prompt_ids.tobytes())
        if at is not None:
            joined = _merge_groups(merged[at][1], group)
            size = group_tokens(joined)
            if size <= limit and size < group_tokens(merged[at][1]) + group_tokens(group):
                merged[at] = (merged[at][0] + indices, joined)
                continue
        open_at[group.prompt_ids.tobytes()] = len(merged)
        merged.append((indices, group))
    return merged


def _merge_groups(first: PromptGroup, second: PromptGroup) -> PromptGroup:
    """One group of the completions of two."""
    known = [group.ref_logps for group in (first, second) if group.ref_logps is not None]
    assert len(known) in (0, 2), "reference log-probs are known for some groups only"
    ref_logps = np.concatenate(known) if known else None
    return PromptGroup(first.prompt_ids, first.completions + second.completions, ref_logps)


def _collate(
    entries: Sequence[_Entry], limit: int, shared_prefix: bool, packing: bool = True
) -> MicroBatch:
    """One micro-batch of all the entries."""
    lay = _packed_row if packing else _padded_rows
    laid = lay([group for _, group in entries], limit, shared_prefix)
    # A state and target that several completions share is scored once and counts in each of them.
    scored, token_index = np.unique(np.concatenate(laid.scored), return_inverse=True)
    completions = [completion for _, group in entries for completion in group.completions]
    known = [group.ref_logps for _, group in entries if group.ref_logps is not None]
    assert len(known) in (0, len(entries)), "reference log-probs are known for some groups only"
    return MicroBatch(
        input_ids=torch.from_numpy(laid.input_ids),
        position_ids=torch.from_numpy(laid.position_ids),
        segments=tuple(laid.segments),
        scored_positions=torch.from_numpy(scored >> 32),
        target_ids=torch.from_numpy(scored & 0xFFFFFFFF),
        token_index=torch.from_numpy(token_index),
        completion_tokens=torch.tensor([len(completion) for completion in completions]),
        ref_logps=torch.from_numpy(np.concatenate(known)) if known else None,
        group_indices=tuple(index for indices, _ in entries for index in indices),
        seq_lens=laid.seq_lens,
    )


def _padded(tokens: int) -> int:
    return -(-tokens // PADDED_STEP_TOKENS) * PADDED_STEP_TOKENS


def _max_seqlen(group: PromptGroup) -> int:
    return len(group.prompt_ids) + max(map(len, group.completions)) - 1


def _rows(group: PromptGroup) -> list[np.ndarray]:
    """What is computed for each completion: all of its row but the last token."""
    return [np.concatenate([group.prompt_ids, c[:-1]]) for c in group.completions]


@dataclass(frozen=True, slots=True, eq=False)
class _PackedArrays:
    """Where tokens lie, before there are tensors."""

    input_ids: np.ndarray  # (R, L) int64
    position_ids: np.ndarray  # (R, L) int64
    segments: list[Segment]
    scored: list[np.ndarray]  # (C,) int64 each: place in the R * L << 32 | target id
    seq_lens: tuple[int, ...]


def _packed_row(groups: Sequence[PromptGroup], limit: int, shared_prefix: bool) -> _PackedArrays:
    """Groups one after another, and a filler segment."""
    size = sum(group_tokens(group, shared_prefix=shared_prefix) for group in groups)
    length = rounded_length(size)
    row = _Row(min(length, limit) if size <= limit else length)
    for group in groups:
        if shared_prefix:
            row.append(group)
        else:
            for completion in group.completions:
                row.append(PromptGroup(group.prompt_ids, (completion,)))
    row.fill_up()
    return _PackedArrays(
        row.input_ids[None], row.position_ids[None], row.segments, row.scored, (size,)
    )


def _padded_rows(groups: Sequence[PromptGroup], limit: int, shared_prefix: bool) -> _PackedArrays:
    """Every completion in a row of its own; what is shared is computed for each."""
    rows = [row for group in groups for row in _rows(group)]
    lengths = tuple(map(len, rows))
    length = _padded(max(lengths))
    input_ids = np.zeros((len(rows), length), dtype=np.int64)
    scored: list[np.ndarray] = []
    completions = (
        (len(group.prompt_ids), completion) for group in groups for completion in group.completions
    )
    for at, (row, (prompt, completion)) in enumerate(zip(rows, completions, strict=True)):
        input_ids[at, : len(row)] = row
        where = at * length + np.arange(prompt - 1, len(row))
        scored.append(where << 32 | completion.astype(np.int64))
    position_ids = np.tile(np.arange(length), (len(rows), 1))
    return _PackedArrays(input_ids, position_ids, [], scored, lengths)


class _Row:
    """A row under construction."""

    def __init__(self, length: int) -> None:
        self.input_ids = np.zeros(length, dtype=np.int64)
        self.position_ids = np.zeros(length, dtype=np.int64)
        self.segments: list[Segment] = []
        self.scored: list[np.ndarray] = []  # (C,) int64 each: state position << 32 | target id
        self.filled = 0

    def append(self, group: PromptGroup) -> None:
        """Lay one group: its prefix, then its suffixes."""
        prefix, prompt = shared_prefix_length(group), len(group.prompt_ids)
        rows = _rows(group)
        start = self.filled
        self._write(rows[0][:prefix], 0)
        for row, completion in zip(rows, group.completions, strict=True):
            suffix = self.filled
            self._write(row[prefix:], prefix)
            where = np.concatenate(
                [np.arange(start, start + prefix), np.arange(suffix, self.filled)]
            )
            self.scored.append(where[prompt - 1 :] << 32 | completion.astype(np.int64))
        self.segments.append(Segment(start, prefix, tuple(len(row) - prefix for row in rows)))

    def fill_up(self) -> None:
        """Give the rest of the row to a segment of its own that nothing reads."""
        rest = len(self.input_ids) - self.filled
        if rest:
            self.segments.append(Segment(self.filled, rest, ()))
            self._write(np.zeros(rest, dtype=np.int64), 0)

    def _write(self, token_ids: np.ndarray, first_position: int) -> None:
        where = slice(self.filled, self.filled + len(token_ids))
        self.input_ids[where] = token_ids
        self.position_ids[where] = np.arange(first_position, first_position + len(token_ids))
        self.filled += len(token_ids)
