"""Tokenized preference pairs, many of them in few arrays, and the account of their making."""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index as as_index
from typing import NamedTuple, overload

import numpy as np

EMPTY_PROMPT = "empty prompt"
EMPTY_COMPLETION = "empty completion"
IDENTICAL = "identical completions"
IDENTICAL_AFTER_TRUNCATION = "identical completions after truncation"
OVER_LONG_PROMPT = "over-long prompt"
NOTHING_SCORED = "a completion without a token of an assistant turn"

_LOCATIONS_KEPT = 5

ScoredMasks = tuple[np.ndarray | None, np.ndarray | None]
"""Which tokens of chosen and rejected are scored, (C,) and (R,) bool; None: every one."""


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


class PairDataset(Sequence[Pair]):
    """Pairs over one flat token array: a million of them are four arrays, not millions of lists.

    Built by `PairBuilder` or `PairDataset.from_pairs`. The arrays of a `Pair` are read-only views.

    Attributes:
        report: the account of the preparation.
        masks: by index, the masks of the pairs of which some tokens are not scored.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        offsets: np.ndarray,
        rows: np.ndarray,
        cut: np.ndarray,
        report: PreparationReport,
        masks: Mapping[int, ScoredMasks] | None = None,
    ):
        assert len(offsets) == 3 * len(rows) + 1, "three parts a pair, and the end"
        assert len(cut) == 3 * len(rows), "three parts a pair"
        self._tokens = tokens
        self._tokens.flags.writeable = False
        self._offsets = offsets
        self._rows = rows
        self._cut = cut
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
    def scored_tokens(self) -> np.ndarray:
        """(n, 2) int64: the number of scored tokens of every chosen and rejected completion."""
        counts = np.stack(self.lengths[1:], axis=1)
        for index in self.masks:
            counts[index] = self[index].scored_tokens
        return counts

    def fingerprints(self) -> list[int]:
        """Return a hash for each pair, equal for pairs of equal tokens."""
        bounds = self._offsets[:-1].reshape(-1, 3)
        ends = [*bounds[1:, 0].tolist(), int(self._offsets[-1])]
        return [
            hash((self._tokens[start:end].tobytes(), chosen - start, rejected - start))
            for (start, chosen, rejected), end in zip(bounds.tolist(), ends, strict=True)
        ]

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
    """Collects pairs one by one and packs them."""

    def __init__(self):
        self._tokens = array("i")
        self._offsets = array("q", [0])
        self._rows = array("q")
        self._cut = bytearray()
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
        for part in (prompt_ids, chosen_ids, rejected_ids):
            self._tokens.extend(part.tolist() if isinstance(part, np.ndarray) else part)
            assert len(self._tokens) > self._offsets[-1], f"a part of row {row} has no token"
            self._offsets.append(len(self._tokens))
        if any(mask is not None for mask in scored):
            self._masks[len(self._rows)] = scored
        self._rows.append(row)
        self._cut.extend(cut)

    def build(self, report: PreparationReport) -> PairDataset:
        """Return the packed pairs; more can be added to the builder afterwards."""
        return PairDataset(
            np.array(self._tokens, dtype=np.int32),
            np.array(self._offsets, dtype=np.int64),
            np.array(self._rows, dtype=np.int64),
            np.array(self._cut, dtype=np.bool_),
            report,
            self._masks,
        )
