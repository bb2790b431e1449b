"""Tokenized preference pairs, many of them in few arrays, and the account of their making."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import index as as_index
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import DTypeLike

from fastdpo.data.row_keys import KEY_BYTES, completion_key, prompt_digest

EMPTY_PROMPT = "empty prompt"
EMPTY_COMPLETION = "empty completion"
IDENTICAL = "identical completions"
IDENTICAL_AFTER_TRUNCATION = "identical completions after truncation"
OVER_LONG_PROMPT = "over-long prompt"
NOTHING_SCORED = "a completion without a token of an assistant turn"

_LOCATIONS_KEPT = 5
_HASHED_PAIRS = 4096

ScoredMasks = tuple[np.ndarray | None, np.ndarray | None]
"""Which tokens of chosen and rejected are scored, (C,) and (R,) bool; None: every one."""


_COUNTS = (
    "truncated_prompts",
    "truncated_completions",
    "special_token_rows",
    "unstable_prompts",
    "repeated_prompts",
    "rows_of_turns",
)
"""The numbers of a report that are sums over the rows."""

QUIET_LOSS = 0.01
"""Share of the rows that may be dropped or cut without a warning."""


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """One prompt with its two completions, as token ids.

    Attributes:
        prompt_ids: (P,) int32, P >= 1; the state at its last position predicts both completions.
        chosen_ids: (C,) int32, C >= 1.
        rejected_ids: (R,) int32, R >= 1.
        row: index of the source row.
        cut: which parts lost tokens to a length limit: prompt, chosen, rejected.
        scored: which tokens of chosen and rejected are scored, at least one of each; a mask is
            there only where some are not.
    """

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    row: int
    cut: tuple[bool, bool, bool] = (False, False, False)
    scored: ScoredMasks = (None, None)

    @property
    def completions(self) -> tuple[np.ndarray, np.ndarray]:
        """Both completions, chosen first."""
        return self.chosen_ids, self.rejected_ids

    @property
    def scored_tokens(self) -> tuple[int, int]:
        """The number of tokens that are scored in chosen and rejected."""
        chosen, rejected = (
            len(ids) if mask is None else int(mask.sum())
            for ids, mask in zip(self.completions, self.scored, strict=True)
        )
        return chosen, rejected


class PairLengths(NamedTuple):
    """The number of tokens in each part of every pair: three (n,) int64 arrays."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


@dataclass
class Dropped:
    """The number of rows that were dropped for one reason, and the places of the first of them."""

    count: int = 0
    locations: list[str] = field(default_factory=list)


@dataclass
class PreparationReport:
    """An account of what became of the rows on their way to pairs; every dropped row is in it.

    Attributes:
        source: the file or data set.
        rows_read: rows looked at.
        pairs_kept: pairs that came out.
        dropped: reason -> count and the first locations.
        reasons: row -> why it was dropped; where a row makes several pairs, the first reason.
        truncated_prompts: pairs whose prompt was cut.
        truncated_completions: completions that were cut (up to two a pair).
        special_token_rows: rows whose content spells a special token.
        special_token_mode: what was done with them ("literal", "allow"), "" if there are none.
        unstable_prompts: rows whose tokenised prompt is not the beginning of the tokenised
            prompt + completion.
        unstable_example: for the first of those, where it is and the end of the prompt that is
            left out or comes back as part of the completion.
        repeated_prompts: rows whose completions both begin with their prompt.
        template_date: the day, as 2025-06-30, that the chat template was given; None if it writes
            none.
        rows_of_turns: rows with a completion of more than one assistant turn.
        shapes: how the rows were read, a sentence for each source.
        findings: what is odd about the pairs, and their lengths (see `fastdpo.data.checks`).
        notes: anything else to tell the user, one line each.
    """

    source: str
    rows_read: int = 0
    pairs_kept: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    truncated_prompts: int = 0
    truncated_completions: int = 0
    special_token_rows: int = 0
    special_token_mode: str = ""
    unstable_prompts: int = 0
    unstable_example: str = ""
    repeated_prompts: int = 0
    template_date: str | None = None
    rows_of_turns: int = 0
    shapes: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def drop(self, reason: str, row: int, where: str) -> None:
        """Count one dropped row; only the first few locations of a reason are kept."""
        self.reasons.setdefault(row, reason)
        entry = self.dropped.setdefault(reason, Dropped())
        entry.count += 1
        if len(entry.locations) < _LOCATIONS_KEPT:
            entry.locations.append(where)

    def add(self, later: "PreparationReport") -> None:
        """Take in the report on rows that follow; their number and the findings are not summed."""
        for reason, entry in later.dropped.items():
            known = self.dropped.setdefault(reason, Dropped())
            known.count += entry.count
            known.locations = (known.locations + entry.locations)[:_LOCATIONS_KEPT]
        for row, reason in later.reasons.items():
            self.reasons.setdefault(row, reason)
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.special_token_mode = joined_mode(self.special_token_mode, later.special_token_mode)
        self.unstable_example = self.unstable_example or later.unstable_example
        self.template_date = self.template_date or later.template_date
        self.notes += [note for note in later.notes if note not in self.notes]

    @property
    def loses_much(self) -> bool:
        """True where more than `QUIET_LOSS` of the rows were dropped or cut."""
        cut = self.truncated_prompts + self.truncated_completions
        lost = sum(entry.count for entry in self.dropped.values()) + cut
        return lost > QUIET_LOSS * self.rows_read

    def describe(self) -> str:
        """The report as a few plain lines for the screen."""
        lines = [f"{self.source}: {self.rows_read:,} rows read, {self.pairs_kept:,} pairs kept"]
        lines += [f"  {shape}" for shape in self.shapes]
        for reason, entry in self.dropped.items():
            places = [where.removeprefix(self.source).strip() for where in entry.locations]
            more = ", ..." if entry.count > len(places) else ""
            lines.append(f"  dropped {entry.count:,}, {reason}: {', '.join(places)}{more}")
        if self.truncated_prompts or self.truncated_completions:
            lines.append(
                f"  cut to length: {self.truncated_prompts:,} prompts, "
                f"{self.truncated_completions:,} completions"
            )
        if self.special_token_rows:
            done = {"literal": "encoded as plain text", "allow": "encoded as special tokens"}
            lines.append(
                f"  {self.special_token_rows:,} rows spell a special token in their content: "
                f"{done.get(self.special_token_mode, self.special_token_mode)}"
            )
        if self.unstable_prompts:
            lines.append(
                f"  {self.unstable_prompts:,} prompts tokenise differently once a completion "
                f"follows; the completion starts where they part, for example before "
                f"{self.unstable_example}"
            )
        if self.repeated_prompts:
            lines.append(
                f"  warning: in {self.repeated_prompts:,} rows both completions begin with the "
                "prompt once more; if they are whole texts, leave the prompt column out"
            )
        return "\n".join(lines + [f"  {note}" for note in (*self.notes, *self.findings)])


def joined_mode(known: str, mode: str) -> str:
    """Name what was done with special tokens in some rows and in those that follow."""
    return known or mode if mode in ("", known) or not known else "literal or allow"


class PairDataset(Sequence[Pair]):
    """Pairs over one flat token array: a million of them are four arrays, not millions of lists.

    Built by `PairBuilder` or `PairDataset.from_pairs`. The arrays of a `Pair` are read-only views.

    Attributes:
        keys: (n, 2) S32, the `row_key` of each pair's chosen and rejected completion.
        report: the account of the preparation.
        masks: by index, the masks of the pairs of which some tokens are not scored.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        offsets: np.ndarray,
        rows: np.ndarray,
        cut: np.ndarray,
        keys: np.ndarray,
        report: PreparationReport,
        masks: Mapping[int, ScoredMasks] | None = None,
    ):
        assert len(offsets) == 3 * len(rows) + 1, "three parts a pair, and the end"
        assert len(cut) == 3 * len(rows), "three parts a pair"
        assert keys.shape == (len(rows), 2), "two completions a pair"
        self._tokens = tokens
        self._tokens.flags.writeable = False
        self._offsets = offsets
        self._rows = rows
        self._cut = cut
        self.keys = keys
        self.report = report
        self.masks = dict(masks or {})

    @classmethod
    def from_pairs(
        cls, pairs: Iterable[Pair], report: PreparationReport | None = None
    ) -> "PairDataset":
        """Pack `pairs`; without a `report` one is made that says only how many there are."""
        builder = PairBuilder()
        for pair in pairs:
            parts = (pair.prompt_ids, *pair.completions)
            builder.add(*parts, pair.row, pair.cut, pair.scored)
        if report is None:
            count = len(builder)
            report = PreparationReport("pairs in memory", rows_read=count, pairs_kept=count)
        return builder.build(report)

    @property
    def lengths(self) -> PairLengths:
        """The number of tokens of every prompt, chosen and rejected completion, (n,) int64 each."""
        parts = np.diff(self._offsets).reshape(-1, 3)
        return PairLengths(parts[:, 0], parts[:, 1], parts[:, 2])

    @property
    def shared_tokens(self) -> np.ndarray:
        """(n,) int64: tokens at the start of both completions that are equal, the last one aside.

        A sequence's last token predicts nothing, so where one completion is the beginning of the
        other its last token does not count.
        """
        starts = self._offsets[:-1].reshape(-1, 3)
        most = np.minimum(*self.lengths[1:]) - 1
        shared = np.zeros(len(self), dtype=np.int64)
        alike = np.arange(len(self))
        for place in range(int(most.max(initial=0))):
            alike = alike[most[alike] > place]
            chosen, rejected = (self._tokens[starts[alike, side] + place] for side in (1, 2))
            alike = alike[chosen == rejected]
            if not len(alike):
                break
            shared[alike] = place + 1
        return shared

    @property
    def scored_tokens(self) -> np.ndarray:
        """(n, 2) int64: the number of scored tokens of every chosen and rejected completion."""
        counts = np.stack(self.lengths[1:], axis=1)
        for index in self.masks:
            counts[index] = self[index].scored_tokens
        return counts

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that the pairs consist of, masks and report apart, by the constructor's names.

        Tokens (sum of lengths,) int32, offsets (3 n + 1,) int64 of the parts in them, rows (n,)
        int64, cut (3 n,) bool, keys (n, 2) S32.
        """
        return {
            "tokens": self._tokens,
            "offsets": self._offsets,
            "rows": self._rows,
            "cut": self._cut,
            "keys": self.keys,
        }

    @cached_property
    def content_hash(self) -> str:
        """The sha256, in hex, of all token ids in order, and of the masks that there are.

        Read are, pair after pair, the length (8 bytes) and the ids of each part, then the masks.
        """
        digest = hashlib.sha256()
        masked = sorted(self.masks)
        # Pairs are read in runs that end after a masked pair or at the most that is copied at once.
        ends = sorted({*(each + 1 for each in masked), *range(0, len(self), _HASHED_PAIRS)})
        start = 0
        for end in [*ends, len(self)]:
            if start < end:
                digest.update(self._with_lengths(start, end).tobytes())
                for mask in self.masks.get(end - 1, ()):
                    digest.update(b"" if mask is None else mask.tobytes())
            start = max(start, end)
        return digest.hexdigest()

    def _with_lengths(self, start: int, end: int) -> np.ndarray:
        """(m,) int32: the parts of some pairs, the length of each in front of it as an int64."""
        bounds = self._offsets[3 * start : 3 * end + 1]
        first, lengths = int(bounds[0]), np.diff(bounds)
        joined = np.empty(int(bounds[-1]) - first + 2 * len(lengths), dtype=np.int32)
        places = bounds[:-1] - first + 2 * np.arange(len(lengths))
        is_length = np.zeros(len(joined), dtype=np.bool_)
        is_length[places] = is_length[places + 1] = True
        joined[is_length] = lengths.astype("<i8").view(np.int32)
        joined[~is_length] = self._tokens[first : int(bounds[-1])]
        return joined

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | Sequence[Pair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = as_index(index)
        if position < 0:
            position += len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        a, b, c, d = self._offsets[3 * position : 3 * position + 4].tolist()
        tokens = self._tokens
        cut = self._cut[3 * position : 3 * position + 3].tolist()
        return Pair(
            tokens[a:b],
            tokens[b:c],
            tokens[c:d],
            int(self._rows[position]),
            tuple(cut),
            self.masks.get(position, (None, None)),
        )

    def __iter__(self) -> Iterator[Pair]:
        return (self[i] for i in range(len(self)))


class PairBuilder:
    """Collects pairs one by one, or many at once, and packs them."""

    def __init__(self):
        self._tokens = array("i")
        self._offsets = array("q", [0])
        self._rows = array("q")
        self._cut = bytearray()
        self._keys = bytearray()
        self._masks: dict[int, ScoredMasks] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        prompt_ids: Iterable[int],
        chosen_ids: Iterable[int],
        rejected_ids: Iterable[int],
        row: int,
        cut: tuple[bool, bool, bool] = (False, False, False),
        scored: ScoredMasks = (None, None),
    ) -> None:
        """Append one pair; each part holds at least one id, and one of each side is scored."""
        prompt, chosen, rejected = parts = [
            np.asarray(part, dtype=np.int32) for part in (prompt_ids, chosen_ids, rejected_ids)
        ]
        for part in parts:
            assert len(part), f"a part of row {row} has no token"
            self._tokens.frombytes(part.tobytes())
            self._offsets.append(len(self._tokens))
        if any(mask is not None for mask in scored):
            self._masks[len(self._rows)] = scored
        digest = prompt_digest(prompt)
        self._keys += completion_key(digest.copy(), chosen, scored[0])
        self._keys += completion_key(digest, rejected, scored[1])
        self._rows.append(row)
        self._cut.extend(cut)

    def extend(self, other: "PairBuilder") -> None:
        """Append all pairs of another builder."""
        first, tokens = len(self), len(self._tokens)
        self._tokens.extend(other._tokens)
        offsets = np.frombuffer(other._offsets, dtype=np.int64)[1:] + tokens
        self._offsets.frombytes(offsets.tobytes())
        self._rows.extend(other._rows)
        self._cut += other._cut
        self._keys += other._keys
        self._masks |= {first + index: masks for index, masks in other._masks.items()}

    def build(self, report: PreparationReport) -> PairDataset:
        """Return the packed pairs, which lie in the builder's own memory: it is closed by this."""
        return PairDataset(
            _as_array(self._tokens, np.int32),
            _as_array(self._offsets, np.int64),
            _as_array(self._rows, np.int64),
            _as_array(self._cut, np.bool_),
            _as_array(self._keys, f"S{KEY_BYTES}").reshape(-1, 2),
            report,
            self._masks,
        )


def _as_array(buffer: "array[int] | bytearray", dtype: DTypeLike) -> np.ndarray:
    return np.frombuffer(buffer, dtype=dtype) if len(buffer) else np.empty(0, dtype=dtype)
