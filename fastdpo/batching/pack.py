"""Pairs to packed micro-batches: every prompt token once, no padding between sequences.

A group is one prompt with k completions. Its sequences prompt + completion share their longest
common token prefix, which is computed once; what remains of each is a suffix that attends to the
prefix and to itself. Groups of one list are laid as one where they fit into T. A micro-batch is one
packed sequence of at most T tokens: groups one after another, each as [prefix | suffix 1 | ... |
suffix k], and a filler segment that nothing reads.

    tokens       the  cat  sat  .   | ran  off  .   | the  dog ...
                 `--- prefix ---'`- suffix 1 -'`- suffix 2 -'`- next group ...
    positions     0    1    2   3     4   5    3   4  5      0    1

Without packing, for models in which neighbours would mix, a micro-batch is a batch of sequences,
one for each completion, padded on the right: what comes after a token changes nothing before it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastdpo.batching.bin_packing import fill_evenly, rounded_length
from fastdpo.batching.groups import PromptGroup, group_tokens, shared_prefix_length
from fastdpo.batching.micro_batch import MicroBatch, Segment

PADDED_STEP_TOKENS = 8
"""Lengths of padded sequences are multiples of this, which matrix units like and costs little."""


def default_micro_batch_tokens(device: torch.device) -> int:
    """T where neither options nor a plan give it: 4,096 on CUDA, 2,048 on the CPU."""
    return 4096 if device.type == "cuda" else 2048


def pack_update(
    groups: Sequence[PromptGroup],
    micro_batch_tokens: int,
    *,
    shared_prefix: bool = True,
    packing: bool = True,
    lists: Sequence[int] | None = None,
) -> list[MicroBatch]:
    """Lay the groups of one update into as few micro-batches as will do, evenly filled.

    Args:
        groups: the update's groups; of none, no micro-batch is made.
        micro_batch_tokens: T, the most tokens of a micro-batch; only a group that is longer by
            itself makes a longer one, which holds nothing else.
        shared_prefix: compute the prefix of a group once; off, once per completion.
        packing: lay groups one after another in one sequence; off, every completion into a padded
            sequence of its own, where nothing is shared.
        lists: the list that each group belongs to. Groups of one list, which have one prompt, are
            laid as one group, or as few as T allows. None: each belongs to a list of its own.

    Returns:
        Micro-batches, each as long as it is full, rounded up; every group is in one of them.
    """
    entries = _joined_lists(groups, lists, micro_batch_tokens, shared_prefix, packing)
    if not packing:
        order = sorted(entries, key=lambda entry: -_max_seqlen(entry[1]))
        return list(_in_order(order, micro_batch_tokens, shared_prefix, packing))
    sizes = [group_tokens(group, shared_prefix=shared_prefix) for _, group in entries]
    return [
        _collate([entries[i] for i in sorted(indices)], micro_batch_tokens, shared_prefix)
        for indices in fill_evenly(sizes, micro_batch_tokens)
    ]


def pack_in_order(
    groups: Sequence[PromptGroup],
    micro_batch_tokens: int,
    *,
    shared_prefix: bool = True,
    packing: bool = True,
    lists: Sequence[int] | None = None,
) -> Iterator[MicroBatch]:
    """Pack groups next-fit, one micro-batch after another: for length-sorted passes.

    Takes the arguments of `pack_update`, groups of one list following each other, and yields
    micro-batches each as long as it is full.
    """
    entries = _joined_lists(groups, lists, micro_batch_tokens, shared_prefix, packing)
    return _in_order(entries, micro_batch_tokens, shared_prefix, packing)


_Entry = tuple[tuple[int, ...], PromptGroup]
"""Indices of groups of one list, and the group that is packed for them."""


def _in_order(
    entries: Iterable[_Entry], limit: int, shared_prefix: bool, packing: bool
) -> Iterator[MicroBatch]:
    waiting: list[_Entry] = []
    filled = sequences = longest = 0
    for entry in entries:
        size = group_tokens(entry[1], shared_prefix=shared_prefix)
        count, length = len(entry[1].completions), _max_seqlen(entry[1])
        padded = (sequences + count) * _padded(max(longest, length))
        if waiting and (filled + size if packing else padded) > limit:
            yield _collate(waiting, limit, shared_prefix, packing)
            waiting, filled, sequences, longest = [], 0, 0, 0
        waiting.append(entry)
        filled, sequences, longest = filled + size, sequences + count, max(longest, length)
    if waiting:
        yield _collate(waiting, limit, shared_prefix, packing)


def _joined_lists(
    groups: Sequence[PromptGroup],
    lists: Sequence[int] | None,
    limit: int,
    shared_prefix: bool,
    packing: bool,
) -> list[_Entry]:
    """The groups, those of one list joined as long as they fit into T."""
    newest: dict[int, int] = {}  # of each list, the entry that may still grow
    entries: list[_Entry] = []
    for index, (group, name) in enumerate(zip(groups, lists or range(len(groups)), strict=True)):
        if name in newest:
            indices, before = entries[newest[name]]
            joined = before.joined(group)
            if group_tokens(joined, shared_prefix=shared_prefix, packing=packing) <= limit:
                entries[newest[name]] = (*indices, index), joined
                continue
        newest[name] = len(entries)
        entries.append(((index,), group))
    return entries


def _collate(
    entries: Sequence[_Entry], limit: int, shared_prefix: bool, packing: bool = True
) -> MicroBatch:
    """One micro-batch of all the entries."""
    lay_out = _pack if packing else _pad
    laid = lay_out([group for _, group in entries], limit, shared_prefix)
    # A state and target that several completions share is scored once and counts in each of them.
    scored, token_index = np.unique(np.concatenate(laid.scored), return_inverse=True)
    lengths = [length for _, group in entries for length in group.scored_tokens]
    return MicroBatch(
        input_ids=torch.from_numpy(laid.input_ids),
        position_ids=torch.from_numpy(laid.position_ids),
        segments=tuple(laid.segments),
        scored_positions=torch.from_numpy(scored >> 32),
        target_ids=torch.from_numpy(scored & 0xFFFFFFFF),
        token_index=torch.from_numpy(token_index),
        completion_tokens=torch.tensor(lengths),
        group_indices=tuple(index for indices, _ in entries for index in indices),
        seq_lens=laid.seq_lens,
    )


def _padded(tokens: int) -> int:
    return -(-tokens // PADDED_STEP_TOKENS) * PADDED_STEP_TOKENS


def _max_seqlen(group: PromptGroup) -> int:
    return len(group.prompt_ids) + max(map(len, group.completions)) - 1


def _inputs(group: PromptGroup) -> list[np.ndarray]:
    """The input tokens of each completion: prompt and completion, less the last token."""
    return [np.concatenate([group.prompt_ids, c[:-1]]) for c in group.completions]


def _scored(positions: np.ndarray, completion: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The (place of the state << 32 | target id) of each scored token of a completion, int64."""
    scored = positions << 32 | completion.astype(np.int64)
    return scored if mask is None else scored[mask]


@dataclass(frozen=True, slots=True, eq=False)
class _PackedArrays:
    """A micro-batch before there are tensors; R, L and C as in `MicroBatch`."""

    input_ids: np.ndarray  # (R, L) int64
    position_ids: np.ndarray  # (R, L) int64
    segments: list[Segment]
    scored: list[np.ndarray]  # for each completion, int64: place in the R * L << 32 | target id
    seq_lens: tuple[int, ...]


def _pack(groups: Sequence[PromptGroup], limit: int, shared_prefix: bool) -> _PackedArrays:
    """Lay groups one after another into one sequence, and a filler segment."""
    size = sum(group_tokens(group, shared_prefix=shared_prefix) for group in groups)
    length = rounded_length(size)
    packed = _PackedSequence(min(length, limit) if size <= limit else length)
    for group in groups:
        if shared_prefix:
            packed.append(group)
        else:
            for place in range(len(group.completions)):
                packed.append(group.only([place]))
    packed.fill_up()
    return _PackedArrays(
        packed.input_ids[None], packed.position_ids[None], packed.segments, packed.scored, (size,)
    )


def _pad(groups: Sequence[PromptGroup], limit: int, shared_prefix: bool) -> _PackedArrays:
    """Lay every completion into a sequence of its own; its prompt is computed for each."""
    sequences = [tokens for group in groups for tokens in _inputs(group)]
    lengths = tuple(map(len, sequences))
    length = _padded(max(lengths))
    input_ids = np.zeros((len(sequences), length), dtype=np.int64)
    scored: list[np.ndarray] = []
    completions = (
        (len(group.prompt_ids), completion, mask)
        for group in groups
        for completion, mask in zip(group.completions, group.masks, strict=True)
    )
    for index, (tokens, (prompt, completion, mask)) in enumerate(
        zip(sequences, completions, strict=True)
    ):
        input_ids[index, : len(tokens)] = tokens
        positions = index * length + np.arange(prompt - 1, len(tokens))
        scored.append(_scored(positions, completion, mask))
    position_ids = np.tile(np.arange(length), (len(sequences), 1))
    return _PackedArrays(input_ids, position_ids, [], scored, lengths)


class _PackedSequence:
    """A packed sequence under construction."""

    def __init__(self, length: int) -> None:
        self.input_ids = np.zeros(length, dtype=np.int64)
        self.position_ids = np.zeros(length, dtype=np.int64)
        self.segments: list[Segment] = []
        self.scored: list[np.ndarray] = []  # for each completion: state place << 32 | target id
        self.filled = 0

    def append(self, group: PromptGroup) -> None:
        """Lay one group: its prefix, then its suffixes."""
        prefix, prompt = shared_prefix_length(group), len(group.prompt_ids)
        inputs = _inputs(group)
        start = self.filled
        self._write(inputs[0][:prefix], 0)
        for tokens, completion, mask in zip(inputs, group.completions, group.masks, strict=True):
            suffix = self.filled
            self._write(tokens[prefix:], prefix)
            positions = np.concatenate(
                [np.arange(start, start + prefix), np.arange(suffix, self.filled)]
            )
            self.scored.append(_scored(positions[prompt - 1 :], completion, mask))
        suffixes = tuple(len(tokens) - prefix for tokens in inputs)
        self.segments.append(Segment(start, prefix, suffixes))

    def fill_up(self) -> None:
        """Give the rest to a segment of its own that nothing reads."""
        rest = len(self.input_ids) - self.filled
        if rest:
            self.segments.append(Segment(self.filled, rest, ()))
            self._write(np.zeros(rest, dtype=np.int64), 0)

    def _write(self, token_ids: np.ndarray, first_position: int) -> None:
        places = slice(self.filled, self.filled + len(token_ids))
        self.input_ids[places] = token_ids
        self.position_ids[places] = np.arange(first_position, first_position + len(token_ids))
        self.filled += len(token_ids)
