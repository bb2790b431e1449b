"""Groups: one prompt and its completions, with the prefix that their rows share."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch.utils.data import Dataset

from fastdpo.data.pairs import PairDataset


@dataclass(frozen=True, slots=True, eq=False)
class PromptGroup:
    """One prompt and its completions, with their reference log-probs when they are known."""

    prompt_ids: np.ndarray  # (P,) int32, P >= 1
    completions: tuple[np.ndarray, ...]  # k arrays of (C,) int32, C >= 1
    ref_logps: np.ndarray | None = None  # (k,) float64, nats
    row: int = -1  # of the source, counted from 0; -1 where there is none


class PairGroups(Dataset[PromptGroup], Sequence[PromptGroup]):
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

    def __getitem__(self, index: int) -> PromptGroup:  # pyrefly: ignore[bad-override]
        pair = self.pairs[index]
        ref_logps = None if self.ref_logps is None else self.ref_logps[index]
        return PromptGroup(pair.prompt_ids, pair.completions, ref_logps, pair.row)


def shared_prefix_length(group: PromptGroup) -> int:
    """Input tokens that all rows of the group share.

    A row's last token is never an input (nothing is predicted from it), so the prefix ends before
    the end of the shortest row; it always holds the whole prompt.
    """
    first = group.completions[0]
    common = min(len(completion) for completion in group.completions) - 1
    for other in group.completions[1:]:
        differs = np.flatnonzero(first[:common] != other[:common])
        common = int(differs[0]) if len(differs) else common
    return len(group.prompt_ids) + common


def longest_sequence(groups: Sequence[PromptGroup]) -> int:
    """Count the tokens of the longest prompt + completion; 0 without groups."""
    return max(
        (len(group.prompt_ids) + max(map(len, group.completions)) for group in groups), default=0
    )


def group_tokens(group: PromptGroup, *, shared_prefix: bool = True, packing: bool = True) -> int:
    """Tokens that the group takes in a micro-batch."""
    rows = [len(group.prompt_ids) + len(completion) - 1 for completion in group.completions]
    if not packing:
        return len(rows) * max(rows)
    return sum(rows) - ((len(rows) - 1) * shared_prefix_length(group) if shared_prefix else 0)
