"""Groups: one prompt and its completions, and the prefix that their sequences share."""

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
from torch.utils.data import Dataset

from fastdpo.data.pairs import PairDataset

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""The columns of TRL's prepared data sets, the last two where the reference is known."""


@dataclass(frozen=True, slots=True, eq=False)
class PromptGroup:
    """One prompt and its k completions, with their reference log-probs when they are known.

    A pair reads as an example of TRL's prepared data sets: `pair["chosen_ids"]`, `dict(pair)`.

    Attributes:
        prompt_ids: (P,) int32, P >= 1.
        completions: k arrays of (C,) int32, C >= 1.
        ref_logps: (k,) float64, nats, or None.
        row: index of the data set's row that it is from, counted from 0; -1 for none.
        scored: k masks (C,) bool of the tokens that are scored, None for a completion of which
            every token is; None where that holds for all of them.
    """

    prompt_ids: np.ndarray
    completions: tuple[np.ndarray, ...]
    ref_logps: np.ndarray | None = None
    row: int = -1
    scored: tuple[np.ndarray | None, ...] | None = None

    @property
    def masks(self) -> tuple[np.ndarray | None, ...]:
        """The mask of each completion, None where every token is scored."""
        return self.scored or (None,) * len(self.completions)

    @property
    def scored_tokens(self) -> list[int]:
        """The number of scored tokens of each completion."""
        return [
            len(ids) if mask is None else int(mask.sum())
            for ids, mask in zip(self.completions, self.masks, strict=True)
        ]

    def keys(self) -> tuple[str, ...]:
        """The columns of a pair under TRL's names: `ID_COLUMNS`, and `REF_COLUMNS` if known."""
        is_known = self.ref_logps is not None and not np.isnan(self.ref_logps).any()
        return ID_COLUMNS + (REF_COLUMNS if is_known else ())

    def __contains__(self, column: object) -> bool:
        return column in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __getitem__(self, column: str) -> Any:
        """A column of a pair: a list of token ids, or a log-prob in nats."""
        if column not in self.keys():
            raise KeyError(f"{column}: a prepared pair has {', '.join(self.keys())}")
        if column == "prompt_ids":
            return self.prompt_ids.tolist()
        side = int("rejected" in column)
        if column in ID_COLUMNS:
            return self.completions[side].tolist()
        assert self.ref_logps is not None, "it is among the keys"
        return float(self.ref_logps[side])

    def only(self, places: Sequence[int]) -> "PromptGroup":
        """The group of some of these completions, without their reference log-probs."""
        completions = tuple(self.completions[place] for place in places)
        masks = tuple(self.masks[place] for place in places)
        return PromptGroup(self.prompt_ids, completions, row=self.row, scored=masks)

    def joined(self, other: "PromptGroup") -> "PromptGroup":
        """The group of the completions of both, which have one prompt."""
        return PromptGroup(
            self.prompt_ids,
            self.completions + other.completions,
            row=self.row,
            scored=self.masks + other.masks,
        )

    def digests(self) -> list[bytes]:
        """A hash of each completion with its prompt and mask: (k,) of 16 bytes."""
        prompt = hashlib.blake2b(_with_length(self.prompt_ids), digest_size=16)
        found = []
        for ids, mask in zip(self.completions, self.masks, strict=True):
            digest = prompt.copy()
            digest.update(_with_length(ids) + (b"" if mask is None else mask.tobytes()))
            found.append(digest.digest())
        return found


class PairGroups(Dataset[PromptGroup], Sequence[PromptGroup]):
    """The pairs of a data set as groups, with their reference log-probs once they are known.

    Args:
        pairs: tokenized pairs.

    Attributes:
        ref_logps: (n, 2) float64 of chosen and rejected, nats, or None; NaN for pairs that are not
            trained on.
    """

    def __init__(self, pairs: PairDataset) -> None:
        self.pairs = pairs
        self.ref_logps: np.ndarray | None = None

    @property
    def content_hash(self) -> str:
        """The sha256, in hex, of all token ids in order, and of the masks that there are."""
        return self.pairs.content_hash

    @property
    def row_keys(self) -> np.ndarray:
        """(n, 2) S32: the key of each pair's completions in the store of reference log-probs."""
        return self.pairs.keys

    @cached_property
    def lists(self) -> np.ndarray:
        """(n,) int64: `lists_of` these pairs."""
        names, each = np.unique(self.row_keys, return_inverse=True)
        each = each.reshape(self.row_keys.shape)
        holders = np.bincount(each.ravel(), minlength=len(names))
        lists = np.arange(len(self), dtype=np.int64)
        sharing = np.flatnonzero((holders[each] > 1).any(axis=1))
        lists[sharing] = sharing[linked(each[sharing].tolist())]
        return lists

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def column_names(self) -> list[str]:
        """The columns under TRL's names."""
        return list(self[0].keys())

    @overload
    def __getitem__(self, index: int) -> PromptGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[PromptGroup]: ...
    @overload
    def __getitem__(self, index: str) -> list[Any]: ...
    def __getitem__(self, index: int | slice | str) -> Any:  # pyrefly: ignore[bad-override]
        """The pair of an index, those of a slice, or a column by its name."""
        if isinstance(index, str):
            return [pair[index] for pair in self]
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        pair = self.pairs[index]
        ref_logps = None if self.ref_logps is None else self.ref_logps[index]
        return PromptGroup(pair.prompt_ids, pair.completions, ref_logps, pair.row, pair.scored)


def lists_of(groups: Sequence[PromptGroup]) -> np.ndarray:
    """Find the groups of one prompt that are linked by completions they share: a list.

    All pairs of several rated completions are one, for example. Every other group is a list of its
    own.

    Returns:
        (n,) int64: the index of the first group of each one's list.
    """
    return linked([group.digests() for group in groups])


def linked(digests: Sequence[Sequence[Hashable]]) -> np.ndarray:
    """Find the lists of groups, as `lists_of` does, by names of their completions.

    Args:
        digests: the names of each group's completions: its `digests`, or any that differ likewise.

    Returns:
        (n,) int64: the index of the first group of each one's list.
    """
    holder: dict[Hashable, int] = {}
    parents = list(range(len(digests)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = index = parents[parents[index]]
        return index

    for index, its in enumerate(digests):
        for digest in its:
            one, other = root(holder.setdefault(digest, index)), root(index)
            parents[max(one, other)] = min(one, other)
    return np.array([root(index) for index in range(len(parents))], dtype=np.int64)


def _with_length(ids: np.ndarray) -> bytes:
    return len(ids).to_bytes(8, "little") + ids.tobytes()


def shared_prefix_length(group: PromptGroup) -> int:
    """How many input tokens all sequences of the group share.

    A sequence's last token is never an input (nothing is predicted from it), so the prefix ends
    before the end of the shortest one; it always holds the whole prompt.
    """
    first = group.completions[0]
    common = min(len(completion) for completion in group.completions) - 1
    for other in group.completions[1:]:
        differs = np.flatnonzero(first[:common] != other[:common])
        common = int(differs[0]) if len(differs) else common
    return len(group.prompt_ids) + common


def longest_sequence(groups: Sequence[PromptGroup]) -> int:
    """Count the tokens of the longest prompt + completion; 0 without groups."""
    if isinstance(groups, PairGroups):
        lengths = groups.pairs.lengths
        both = lengths.prompt + np.maximum(lengths.chosen, lengths.rejected)
        return int(both.max(initial=0))
    return max(
        (len(group.prompt_ids) + max(map(len, group.completions)) for group in groups), default=0
    )


def group_tokens(group: PromptGroup, *, shared_prefix: bool = True, packing: bool = True) -> int:
    """How many tokens the group takes in a micro-batch."""
    lengths = [len(group.prompt_ids) + len(completion) - 1 for completion in group.completions]
    if not packing:
        return len(lengths) * max(lengths)
    repeated = (len(lengths) - 1) * shared_prefix_length(group) if shared_prefix else 0
    return sum(lengths) - repeated
