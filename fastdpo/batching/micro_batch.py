"""Micro-batches: what one pass of the backbone is given."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """Where one group lies in the row: its prefix from `start`, then its suffixes, one by one."""

    start: int
    prefix_tokens: int
    suffix_tokens: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the whole group."""
        return self.prefix_tokens + sum(self.suffix_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One packed row, R = 1, or R padded ones, of L tokens.

    C completions in all, N scored states, M >= N scored (token, completion)s. Completions follow
    each other as in `group_indices`, each group's in its own order, wherever they lie.
    """

    input_ids: Tensor  # (R, L) int64
    position_ids: Tensor  # (R, L) int64
    segments: tuple[Segment, ...]  # of a packed row, the filler last, without a suffix; or none
    scored_positions: Tensor  # (N,) int64 into the R * L: the states that predict a completion
    target_ids: Tensor  # (N,) int64
    token_index: Tensor  # (M,) int64 into the N: completion by completion, tokens in order
    completion_tokens: Tensor  # (C,) int64: scored tokens of each completion
    ref_logps: Tensor | None  # (C,) float64
    group_indices: tuple[int, ...]  # which of the groups lie here, in order
    seq_lens: tuple[int, ...]  # R: tokens computed for a group; what follows them is filler

    @property
    def num_tokens(self) -> int:
        """Tokens computed for a group: R * L less the filler."""
        return sum(self.seq_lens)

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest sequence: a prompt with one completion."""
        if not self.segments:
            return max(self.seq_lens)
        return max(s.prefix_tokens + max(s.suffix_tokens, default=0) for s in self.segments)

    @property
    def token_mask(self) -> Tensor:
        """(R, L) bool: what is not filler."""
        lengths = torch.tensor(self.seq_lens, device=self.input_ids.device)
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
