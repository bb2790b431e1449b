"""Pairs to packed micro-batches: every prompt token once, no padding between sequences.

A group is one prompt with k completions. Its rows prompt + completion share their longest common
token prefix, the trunk, which is computed once; what remains of each row is a branch that attends
to the trunk and to itself. A micro-batch is one row of T tokens: groups one after another, each as
[trunk | branch 1 | ... | branch k], and a filler segment that nothing reads.

    tokens       the  cat  sat  .   | ran  off  .   | the  dog ...
                 `--- trunk ---'`- branch 1 -'`- branch 2 -'`- next group ...
    positions     0    1    2   3     4   5    3   4  5      0    1
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastdpo.data.pairs import PairDataset

ROUNDING_TOKENS = 128
"""Micro-batch lengths are multiples of this, so that few shapes occur in a run."""


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One prompt and its completions, with their reference log-probs when they are known."""

    prompt_ids: np.ndarray  # (P,) int32, P >= 1
    completions: tuple[np.ndarray, ...]  # k arrays of (C,) int32, C >= 1
    ref_logps: np.ndarray | None = None  # (k,) float64, nats


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
        return Group(pair.prompt_ids, pair.completions, ref_logps)


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
    """One packed row. C completions in all, N scored states, M >= N scored (token, completion)s."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64
    segments: tuple[Segment, ...]  # the filler, if any, is the last and has no branch
    scored_positions: Tensor  # (N,) int64: the states that predict a completion token
    target_ids: Tensor  # (N,) int64
    token_index: Tensor  # (M,) int64 into the N: completion by completion, tokens in order
    completion_tokens: Tensor  # (C,) int64: scored tokens of each completion
    ref_logps: Tensor | None  # (C,) float64
    group_indices: tuple[int, ...]  # which of the packed groups lie here, in order
    real_tokens: int  # tokens computed for a group: T less the filler

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The same micro-batch with its tensors on `device`."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in (
                "input_ids",
                "position_ids",
                "scored_positions",
                "target_ids",
                "token_index",
                "completion_tokens",
            )
        }
        ref_logps = None if self.ref_logps is None else self.ref_logps.to(device)
        return replace(self, **moved, ref_logps=ref_logps)


def default_micro_batch_tokens(device: torch.device) -> int:
    """T when the user names none: 4,096 on CUDA, 2,048 on the CPU, until the planner chooses it."""
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


def group_tokens(group: Group, *, shared_prefix: bool = True) -> int:
    """Tokens that the group takes in a row."""
    rows = sum(len(group.prompt_ids) + len(completion) - 1 for completion in group.completions)
    if not shared_prefix:
        return rows
    return rows - (len(group.completions) - 1) * trunk_length(group)


def pack_update(
    groups: Sequence[Group], micro_batch_tokens: int, *, shared_prefix: bool = True
) -> list[MicroBatch]:
    """Lay the groups of one update into as few micro-batches of one common length as will do.

    Args:
        groups: the update's groups, at least one.
        micro_batch_tokens: T, the most tokens of a micro-batch; a longer group raises it.
        shared_prefix: compute the tokens that a group's rows share once; off, once per completion.

    Returns:
        Micro-batches of one length, the fullest rounded up to 128; every group is in one of them.
    """
    sizes = [group_tokens(group, shared_prefix=shared_prefix) for group in groups]
    bins, length = _fill_evenly(sizes, max(micro_batch_tokens, max(sizes)))
    return [
        _lay_out([(i, groups[i]) for i in sorted(indices)], length, shared_prefix)
        for indices in bins
    ]


def pack_in_order(
    groups: Iterable[Group], micro_batch_tokens: int, *, shared_prefix: bool = True
) -> Iterator[MicroBatch]:
    """Pack a stream next-fit, each micro-batch as long as it is full: for length-sorted passes."""
    waiting: list[tuple[int, Group]] = []
    filled = 0
    for index, group in enumerate(groups):
        size = group_tokens(group, shared_prefix=shared_prefix)
        if waiting and filled + size > micro_batch_tokens:
            yield _lay_out(waiting, _rounded(filled), shared_prefix)
            waiting, filled = [], 0
        waiting.append((index, group))
        filled += size
    if waiting:
        yield _lay_out(waiting, _rounded(filled), shared_prefix)


def _fill_evenly(sizes: Sequence[int], limit: int) -> tuple[list[list[int]], int]:
    """Fewest bins of at most `limit`, then the smallest common capacity that holds them.

    Best-fit decreasing at each capacity tried; returns the bins' indices and the common length.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    total, largest = sum(sizes), max(sizes)
    count = -(-total // limit)
    while True:
        capacity = max(largest, -(-total // count))
        while True:
            bins = _best_fit(sizes, order, capacity)
            if len(bins) <= count:
                return bins, _rounded(max(sum(sizes[i] for i in indices) for indices in bins))
            if capacity == limit:
                break
            capacity = min(_rounded(capacity + 1), limit)
        count += 1


def _best_fit(sizes: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for index in order:
        size = sizes[index]
        fitting = [b for b in range(len(bins)) if room[b] >= size]
        if fitting:
            best = min(fitting, key=lambda b: room[b])
            bins[best].append(index)
            room[best] -= size
        else:
            bins.append([index])
            room.append(capacity - size)
    return bins


def _rounded(tokens: int) -> int:
    return -(-tokens // ROUNDING_TOKENS) * ROUNDING_TOKENS


def _lay_out(groups: Sequence[tuple[int, Group]], length: int, shared_prefix: bool) -> MicroBatch:
    """One row of `length` tokens from (index, group)s that fit it."""
    row = _Row(length)
    for _, group in groups:
        if shared_prefix:
            row.append(group)
        else:
            for completion in group.completions:
                row.append(Group(group.prompt_ids, (completion,)))
    real_tokens = row.filled
    row.fill_up()
    # A state and target that several completions share is scored once and counts in each of them.
    scored, token_index = np.unique(np.concatenate(row.scored), return_inverse=True)
    completions = [completion for _, group in groups for completion in group.completions]
    known = [group.ref_logps for _, group in groups if group.ref_logps is not None]
    assert len(known) in (0, len(groups)), "reference log-probs are known for some groups only"
    return MicroBatch(
        input_ids=torch.from_numpy(row.input_ids)[None],
        position_ids=torch.from_numpy(row.position_ids)[None],
        segments=tuple(row.segments),
        scored_positions=torch.from_numpy(scored >> 32),
        target_ids=torch.from_numpy(scored & 0xFFFFFFFF),
        token_index=torch.from_numpy(token_index),
        completion_tokens=torch.tensor([len(completion) for completion in completions]),
        ref_logps=torch.from_numpy(np.concatenate(known)) if known else None,
        group_indices=tuple(index for index, _ in groups),
        real_tokens=real_tokens,
    )


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
        rows = [np.concatenate([group.prompt_ids, c[:-1]]) for c in group.completions]
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
