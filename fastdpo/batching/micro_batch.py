"""Micro-batches: the input of one pass of the backbone."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fastdpo.system.device import to_device


@dataclass(frozen=True, slots=True)
class Segment:
    """Where one group lies in a packed sequence: its prefix, then its suffixes, one by one.

    Attributes:
        start: place of its first token.
        prefix_tokens: tokens of the prefix.
        suffix_tokens: tokens of each suffix; none for filler.
    """

    start: int
    prefix_tokens: int
    suffix_tokens: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the whole group."""
        return self.prefix_tokens + sum(self.suffix_tokens)


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One packed sequence, R = 1, or R padded ones, of L tokens each.

    It holds C completions with N scored states. Completions that begin alike share states, so there
    are M >= N (completion, token) combinations. Completions follow each other as in
    `group_indices`, those of a group in its own order, wherever they lie.

    Attributes:
        input_ids: (R, L) int64.
        position_ids: (R, L) int64.
        segments: of a packed sequence, the filler last, without a suffix; empty for padded ones.
        scored_positions: (N,) int64, places in the flat R * L of the states that predict a token of
            a completion.
        target_ids: (N,) int64, the tokens that they predict.
        token_index: (M,) int64, indices into the N: completion by completion, tokens in order.
        completion_tokens: (C,) int64, scored tokens of each completion.
        group_indices: which of the packed groups lie here, in order.
        seq_lens: R numbers, the tokens before the filler in each sequence.
        host_input_ids: `input_ids` as they were on the host before `to`; None if they are there.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: tuple[Segment, ...]
    scored_positions: Tensor
    target_ids: Tensor
    token_index: Tensor
    completion_tokens: Tensor
    group_indices: tuple[int, ...]
    seq_lens: tuple[int, ...]
    host_input_ids: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are not filler."""
        return sum(self.seq_lens)

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest sequence: a prompt with one completion."""
        if not self.segments:
            return max(self.seq_lens)
        return max(s.prefix_tokens + max(s.suffix_tokens, default=0) for s in self.segments)

    @property
    def token_mask(self) -> Tensor:
        """(R, L) bool, False for filler."""
        lengths = torch.tensor(self.seq_lens, device=self.input_ids.device)
        columns = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return columns < lengths[:, None]

    def select(self, completions: Sequence[int]) -> "MicroBatch":
        """This micro-batch with its completions in another order, or some of them repeatedly.

        What is computed stays the same, and `group_indices` too. Log-probs come as chosen here,
        and a completion that several pairs hold counts for each of them.

        Args:
            completions: places among the C completions, in the order that is wanted.
        """
        if list(completions) == list(range(len(self.completion_tokens))):
            return self
        ends = self.completion_tokens.cumsum(0)[:-1]
        parts = self.token_index.tensor_split(ends)
        return replace(
            self,
            token_index=torch.cat([parts[place] for place in completions]),
            completion_tokens=self.completion_tokens[list(completions)],
        )

    def to(self, device: torch.device | str) -> "MicroBatch":
        """This micro-batch with its tensors on `device`."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        tensors = {
            name: to_device(value, device)
            for name, value in values.items()
            if isinstance(value, Tensor) and name != "host_input_ids"
        }
        on_host = self.input_ids if self.input_ids.device.type == "cpu" else self.host_input_ids
        return replace(self, **tensors, host_input_ids=on_host)
