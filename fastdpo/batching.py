"""Pairs to packed micro-batches: every prompt token once, no padding between sequences.

A group is one prompt with k completions. Its rows prompt + completion share their longest common
token prefix, the trunk, which is computed once; what remains of each row is a branch that attends
to the trunk and to itself. A micro-batch is one row of at most T tokens: groups one after another,
each as [trunk | branch 1 | ... | branch k], and a filler segment that nothing reads.

    tokens       the  cat  sat  .   | ran  off  .   | the  dog ...
                 `--- trunk ---'`- branch 1 -'`- branch 2 -'`- next group ...
    positions     0    1    2   3     4   5    3   4  5      0    1

Unpacked, for models in which neighbours in a row would mix, a micro-batch is a batch of rows, one
a completion, filled up on the right: what comes after a token changes nothing before it.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastdpo.data.pairs import PairDataset
from fastdpo.packing import fill_evenly, rounded_length

PADDED_STEP_TOKENS = 8
"""Padded rows are multiples of this: what matrix units want, and hardly more padding."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One prompt and its completions, with their reference log-probs when they are known."""

    prompt_ids: np.ndarray  # (P,) int32, P >= 1
    completions: tuple[np.ndarray, ...]  # k arrays of (C,) int32, C >= 1
    ref_logps: np.ndarray | None = None  # (k,) float64, nats
    row: int = -1  # of the source, counted from 0; -1 where there is none


class PairGroups(Dataset[Group], Sequence[Group]):
    """The pairs of a data set as groups, with their reference log-probs once they are known.

    Args:
        pairs: tokenised pairs.

    Attributes:
        ref_logps: (n, 2) float64 of chosen and rejected, nats, or None.
    """

    def __init__(self, pairs: PairDataset) -> None:
        self.pairs = pairs
        self.ref_logps: np.ndarray | None = None

    @cached_property
    def content_hash(self) -> str:
        """The sha256, in hex, of all token ids in order."""
        digest = hashlib.sha256()
        for pair in self.pairs:
            for ids in (pair.prompt_ids, *pair.completions):
                digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Group:  # pyrefly: ignore[bad-override]
        pair = self.pairs[index]
        ref_logps = None if self.ref_logps is None else self.ref_logps[index]
        return Group(pair.prompt_ids, pair.completions, ref_logps, pair.row)


@dataclass(frozen=True, slots=True)
class Segment:
    """Where one group lies in the row: its trunk from `start`, then its branches, one by one."""

    start: int
    trunk_tokens: int
    branch_tokens: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the whole group."""
        return self.trunk_tokens + sum(self.branch_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One packed row, R = 1, or R padded ones, of L tokens.

    C completions in all, N scored states, M >= N scored (token, completion)s. Completions follow
    each other as in `group_indices`, each group's in its own order, wherever they lie.
    """

    input_ids: Tensor  # (R, L) int64
    position_ids: Tensor  # (R, L) int64
    segments: tuple[Segment, ...]  # of a packed row, the filler last, without a branch; or none
    scored_positions: Tensor  # (N,) int64 into the R * L: the states that predict a completion
    target_ids: Tensor  # (N,) int64
    token_index: Tensor  # (M,) int64 into the N: completion by completion, tokens in order
    completion_tokens: Tensor  # (C,) int64: scored tokens of each completion
    ref_logps: Tensor | None  # (C,) float64
    group_indices: tuple[int, ...]  # which of the groups lie here, in order
    row_tokens: tuple[int, ...]  # R: tokens computed for a group; what follows them is filler

    @property
    def real_tokens(self) -> int:
        """Tokens computed for a group: R * L less the filler."""
        return sum(self.row_tokens)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest sequence: a prompt with one completion."""
        if not self.segments:
            return max(self.row_tokens)
        return max(s.trunk_tokens + max(s.branch_tokens, default=0) for s in self.segments)

    @property
    def real_mask(self) -> Tensor:
        """(R, L) bool: what is not filler."""
        lengths = torch.tensor(self.row_tokens, device=self.input_ids.device)
        columns = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return columns < lengths[:, None]

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same micro-batch with its tensors on `device`."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        tensors = {
            name: value.to(device, non_blocking=True)
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


def default_micro_batch_tokens(device: torch.device) -> int:
    """T where nobody names one and no plan chooses it: 4,096 on CUDA, 2,048 on the CPU."""
    return 4096 if device.type == "cuda" else 2048


def trunk_length(group: Group) -> int:
    """Input tokens that all rows of the group share.

    A row's last token is never an input (nothing is predicted from it), so the trunk ends before
    the end of the shortest row; it always holds the whole prompt.
    """
    first = group.completions[0]
    common = min(len(completion) for completion in group.completions) - 1
    for other in group.completions[1:]:
        differs = np.flatnonzero(first[:common] != other[:common])
        common = int(differs[0]) if len(differs) else common
    return len(group.prompt_ids) + common


def group_tokens(group: Group, *, shared_prefix: bool = True, packing: bool = True) -> int:
    """Tokens that the group takes in a micro-batch."""
    rows = [len(group.prompt_ids) + len(completion) - 1 for completion in group.completions]
    if not packing:
        return len(rows) * max(rows)
    return sum(rows) - ((len(rows) - 1) * trunk_length(group) if shared_prefix else 0)


def pack_update(
    groups: Sequence[Group],
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
        order = sorted(alone, key=lambda entry: -_longest_row(entry[1]))
        return list(_in_order(order, micro_batch_tokens, shared_prefix, packing))
    entries = _merged_entries(alone, micro_batch_tokens) if merge_prompts else alone
    sizes = [group_tokens(group, shared_prefix=shared_prefix) for _, group in entries]
    return [
        _lay_out([entries[i] for i in sorted(indices)], micro_batch_tokens, shared_prefix)
        for indices in fill_evenly(sizes, micro_batch_tokens)
    ]


def pack_in_order(
    groups: Iterable[Group],
    micro_batch_tokens: int,
    *,
    shared_prefix: bool = True,
    packing: bool = True,
) -> Iterator[MicroBatch]:
    """Pack a stream next-fit, each micro-batch as long as it is full: for length-sorted passes."""
    alone = (((index,), group) for index, group in enumerate(groups))
    return _in_order(alone, micro_batch_tokens, shared_prefix, packing)


_Entry = tuple[tuple[int, ...], Group]
"""What is laid as one: groups of one prompt, by their indices, and the group they make."""


def _in_order(
    entries: Iterable[_Entry], limit: int, shared_prefix: bool, packing: bool
) -> Iterator[MicroBatch]:
    waiting: list[_Entry] = []
    filled = rows = longest = 0
    for entry in entries:
        size = group_tokens(entry[1], shared_prefix=shared_prefix)
        count, own = len(entry[1].completions), _longest_row(entry[1])
        needed = filled + size if packing else (rows + count) * _padded(max(longest, own))
        if waiting and needed > limit:
            yield _lay_out(waiting, limit, shared_prefix, packing)
            waiting, filled, rows, longest = [], 0, 0, 0
        waiting.append(entry)
        filled, rows, longest = filled + size, rows + count, max(longest, own)
    if waiting:
        yield _lay_out(waiting, limit, shared_prefix, packing)


def _merged_entries(entries: Sequence[_Entry], limit: int) -> list[_Entry]:
    """Join groups of one prompt, as long as they fit into T and tokens are saved."""
    open_at: dict[bytes, int] = {}
    merged: list[_Entry] = []
    for indices, group in entries:
        at = open_at.get(group.prompt_ids.tobytes())
        if at is not None:
            joined = _joined(merged[at][1], group)
            size = group_tokens(joined)
            if size <= limit and size < group_tokens(merged[at][1]) + group_tokens(group):
                merged[at] = (merged[at][0] + indices, joined)
                continue
        open_at[group.prompt_ids.tobytes()] = len(merged)
        merged.append((indices, group))
    return merged


def _joined(first: Group, second: Group) -> Group:
    """One group of the completions of two."""
    known = [group.ref_logps for group in (first, second) if group.ref_logps is not None]
    assert len(known) in (0, 2), "reference log-probs are known for some groups only"
    ref_logps = np.concatenate(known) if known else None
    return Group(first.prompt_ids, first.completions + second.completions, ref_logps)


def _lay_out(
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
        row_tokens=laid.row_tokens,
    )


def _padded(tokens: int) -> int:
    return -(-tokens // PADDED_STEP_TOKENS) * PADDED_STEP_TOKENS


def _longest_row(group: Group) -> int:
    return len(group.prompt_ids) + max(map(len, group.completions)) - 1


def _rows(group: Group) -> list[np.ndarray]:
    """What is computed for each completion: all of its row but the last token."""
    return [np.concatenate([group.prompt_ids, c[:-1]]) for c in group.completions]


@dataclass(frozen=True, slots=True, eq=False)
class _Laid:
    """Where tokens lie, before there are tensors."""

    input_ids: np.ndarray  # (R, L) int64
    position_ids: np.ndarray  # (R, L) int64
    segments: list[Segment]
    scored: list[np.ndarray]  # (C,) int64 each: place in the R * L << 32 | target id
    row_tokens: tuple[int, ...]


def _packed_row(groups: Sequence[Group], limit: int, shared_prefix: bool) -> _Laid:
    """Groups one after another, and a filler segment."""
    size = sum(group_tokens(group, shared_prefix=shared_prefix) for group in groups)
    length = rounded_length(size)
    row = _Row(min(length, limit) if size <= limit else length)
    for group in groups:
        if shared_prefix:
            row.append(group)
        else:
            for completion in group.completions:
                row.append(Group(group.prompt_ids, (completion,)))
    row.fill_up()
    return _Laid(row.input_ids[None], row.position_ids[None], row.segments, row.scored, (size,))


def _padded_rows(groups: Sequence[Group], limit: int, shared_prefix: bool) -> _Laid:
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
    return _Laid(input_ids, position_ids, [], scored, lengths)


class _Row:
    """A row under construction."""

    def __init__(self, length: int) -> None:
        self.input_ids = np.zeros(length, dtype=np.int64)
        self.position_ids = np.zeros(length, dtype=np.int64)
        self.segments: list[Segment] = []
        self.scored: list[np.ndarray] = []  # (C,) int64 each: state position << 32 | target id
        self.filled = 0

    def append(self, group: Group) -> None:
        """Lay one group: its trunk, then its branches."""
        trunk, prompt = trunk_length(group), len(group.prompt_ids)
        rows = _rows(group)
        start = self.filled
        self._write(rows[0][:trunk], 0)
        for row, completion in zip(rows, group.completions, strict=True):
            branch = self.filled
            self._write(row[trunk:], trunk)
            where = np.concatenate(
                [np.arange(start, start + trunk), np.arange(branch, self.filled)]
            )
            self.scored.append(where[prompt - 1 :] << 32 | completion.astype(np.int64))
        self.segments.append(Segment(start, trunk, tuple(len(row) - trunk for row in rows)))

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
