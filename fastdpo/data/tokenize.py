"""Turning rows into pairs of token ids, with every dropped or cut row counted."""

from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from fastdpo.data.chat_template import ensure_chat_template
from fastdpo.data.checks import check_pairs
from fastdpo.data.errors import DataError
from fastdpo.data.normalize import PreferenceRow, is_blank
from fastdpo.data.pairs import (
    EMPTY_COMPLETION,
    EMPTY_PROMPT,
    IDENTICAL,
    IDENTICAL_AFTER_TRUNCATION,
    NOTHING_SCORED,
    OVER_LONG_PROMPT,
    PairBuilder,
    PairDataset,
    PreparationReport,
    ScoredMasks,
)
from fastdpo.data.ranked import NoPreference
from fastdpo.data.reading import Rows
from fastdpo.data.ready_made import bare_text
from fastdpo.data.rendering import RenderedRow, Renderer
from fastdpo.data.scores import opposed_scores
from fastdpo.data.truncation import truncate
from fastdpo.data.workers import on_processes
from fastdpo.options import TokenizationOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK_PAIRS = 512
_CHUNK_LETTERS = 2**23
_BATCH_LETTERS = 2**25
_PROGRESS_FROM_ROWS = 2_000
_PROMPT_FROM_LETTERS = 16

Ids = list[int]
_T = TypeVar("_T")


def prepare_pairs(
    rows: Rows,
    tokenizer: "PreTrainedTokenizerBase",
    options: TokenizationOptions | None = None,
    *,
    vocabulary_size: int | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> PairDataset:
    """Normalize, render, tokenize and truncate preference rows.

    The prompt ids are what tokenized prompt, prompt + chosen and prompt + rejected have in common
    at their start; the rest of each is its completion (TRL's rule). String completions end with
    exactly one EOS; conversations end as their chat template ends them.

    Args:
        rows: from `read_rows` or `rows_from`.
        tokenizer: without a chat template it gets the plain one when conversational rows come.
        options: lengths, special tokens and strictness; a `DPOConfig` is one, None takes the
            defaults.
        vocabulary_size: number of embeddings of the model; ids beyond it are an error.
        limit: stop reading at this many pairs; what a stream needs that has no end.
        progress: show a progress bar for more than 2,000 rows.

    Returns:
        The pairs in the order of the rows, with the account of what was dropped and cut.

    Raises:
        ValueError: `limit` is below 1.
        DataError: a malformed row, a tokenizer that lacks what the rows need, an id beyond the
            vocabulary, a dropped row under `strict_data`, or no pair left.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, at least 1 is needed, or None for no limit")
    options = options or TokenizationOptions()
    whole = _Whole(rows, PairMaker(tokenizer, options, vocabulary_size))

    def most() -> int:
        return _CHUNK_PAIRS if limit is None else min(_CHUNK_PAIRS, limit - whole.kept)

    chunks = _chunks(rows, whole.report, most, progress)
    if limit is None:
        made = on_processes(whole.maker, chunks, options.dataset_num_proc, _left(rows, whole))
    else:
        made = map(whole.maker.make, chunks)
    with closing(chunks):
        for each in made:
            whole.add(each)
            if whole.kept == limit:
                return whole.finish(f"reading stopped at {limit:,} pairs, all that were asked for")
    return whole.finish()


class ChunkRow(NamedTuple):
    """A row, or a part of one that has many preferences, on its way to pairs."""

    number: int
    where: str
    preferences: list[PreferenceRow]
    reason: str | None  # why it has no preference, for the count


@dataclass(frozen=True, slots=True, eq=False)
class MadePairs:
    """The pairs of a chunk of rows, with their part of the report."""

    builder: PairBuilder
    report: PreparationReport
    counts: Counter[str]  # what findings about all rows are made of


class _Whole:
    """The pairs and the report of all chunks together."""

    def __init__(self, rows: Rows, maker: "PairMaker"):
        self.rows, self.maker = rows, maker
        self.report = PreparationReport(rows.source)
        self.builder = PairBuilder()
        self.counts: Counter[str] = Counter()

    @property
    def kept(self) -> int:
        """The number of pairs so far."""
        return len(self.builder)

    def add(self, made: MadePairs) -> None:
        """Take in what became of the next chunk."""
        self.builder.extend(made.builder)
        self.report.add(made.report)
        self.counts += made.counts
        if made.counts["conversational"]:
            ensure_chat_template(self.maker.tokenizer)  # it may have been made elsewhere

    def finish(self, note: str | None = None) -> PairDataset:
        """Return the pairs with their complete report."""
        report, counts = self.report, self.counts
        report.pairs_kept = self.kept
        report.notes += [] if note is None else [note]
        if not report.pairs_kept:
            raise DataError(
                f"no pair is left to train on:\n{report.describe()}\nraise max_length if "
                "prompts are over-long; otherwise correct the rows named above"
            )
        pairs = self.builder.build(report)
        report.findings += check_pairs(pairs, self.rows.where)
        if counts["with NUL"]:
            report.findings.append(
                f"warning: {counts['with NUL']:,} rows hold the character NUL, which is no text"
            )
        if counts["empty prompts"] and self.maker.bos_token_id is not None:
            report.findings.append(
                f"warning: {counts['empty prompts']:,} rows have no prompt: their answers follow "
                "the BOS token alone"
            )
        report.findings += opposed_scores(counts["scored"], counts["opposed"])
        report.findings += bare_text(counts["ready-made"], counts["bare"])
        return pairs


class PairMaker:
    """Makes pairs of chunks of rows; what it makes of one does not depend on those before it.

    Args:
        tokenizer: as for `prepare_pairs`.
        options: how rows become token ids.
        vocabulary_size: number of embeddings of the model, or None.
        is_instruct: whether the tokenizer came with a chat template; None looks.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        options: TokenizationOptions,
        vocabulary_size: int | None,
        is_instruct: bool | None = None,
    ):
        self.tokenizer = tokenizer
        self.options = options
        self.vocabulary_size = vocabulary_size
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._places: dict[int, str] = {}
        self._begin()
        self.renderer = Renderer(tokenizer, options, self.report, self.counts, is_instruct)

    def told(self) -> tuple[Any, ...]:
        """Return what another process can make an equal maker of, for the same day."""
        options = TokenizationOptions()
        for each in fields(TokenizationOptions):  # a DPOConfig has a device, among others
            setattr(options, each.name, getattr(self.options, each.name))
        options.template_date = self.renderer.day
        return self.tokenizer, options, self.vocabulary_size, self.renderer.is_instruct

    @classmethod
    def of_told(cls, told: tuple[Any, ...]) -> Self:
        """The maker that `told` tells of."""
        return cls(*told)

    def _begin(self) -> None:
        self.report = PreparationReport("")
        self.builder = PairBuilder()
        self.counts: Counter[str] = Counter()

    def make(self, chunk: list[ChunkRow]) -> MadePairs:
        """Render, tokenize and truncate the preferences of some rows.

        Raises:
            DataError: of the first row that cannot be used.
        """
        self._begin()
        self.renderer.count_in(self.report, self.counts)
        self._places = {row.number: row.where for row in chunk}
        batch: list[RenderedRow] = []
        letters = 0
        for row in chunk:
            if row.reason is not None:
                self._drop(row.reason, row.number)
            for preference in row.preferences:
                rendered = self._render(row.number, preference)
                if rendered is not None:
                    batch.append(rendered)
                    letters += sum(map(len, rendered.texts))
                if letters > _BATCH_LETTERS:
                    self._add(batch)
                    batch, letters = [], 0
        self._add(batch)
        return MadePairs(self.builder, self.report, self.counts)

    def _render(self, index: int, row: PreferenceRow) -> RenderedRow | None:
        for completion in (row.chosen, row.rejected):
            if isinstance(completion, str):
                completion = self.renderer.without_eos(completion)
            if is_blank(completion):
                return self._drop(EMPTY_COMPLETION, index)
        if row.prompt == []:
            return self._drop(EMPTY_PROMPT, index)
        self.counts["with NUL"] += "\\x00" in repr((row.prompt, row.chosen, row.rejected))
        self.counts["conversational"] += row.is_conversational
        if isinstance(row.prompt, str):
            self._look_at_prompt(row.prompt, str(row.chosen), str(row.rejected))
        if row.score_margin is not None:
            self.counts["scored"] += 1
            self.counts["opposed"] += row.score_margin < 0
        try:
            return self.renderer.render(index, row)
        except DataError as error:
            raise DataError(f"{self._where(index)}: {error}") from error

    def _look_at_prompt(self, prompt: str, chosen: str, rejected: str) -> None:
        """Count prompts that are empty, and those that both completions begin with once more."""
        self.counts["empty prompts"] += not self.renderer.without_bos(prompt).strip()
        if len(prompt) >= _PROMPT_FROM_LETTERS:
            words = " ".join(prompt.split())
            self.report.repeated_prompts += all(
                " ".join(side[: 2 * len(prompt)].split()).startswith(words)
                for side in (chosen, rejected)
            )

    def _add(self, batch: list[RenderedRow]) -> None:
        """Tokenize a batch and keep its pairs."""
        for rendered, ids in zip(batch, self.renderer.encode(batch), strict=True):
            self._add_pair(rendered, *ids)

    def _where(self, row: int) -> str:
        return self._places[row]

    def _add_pair(
        self, rendered: RenderedRow, prompt_alone: Ids, with_chosen: Ids, with_rejected: Ids
    ) -> None:
        row = rendered.row
        if self.vocabulary_size is not None:
            self._check_vocabulary(row, with_chosen, with_rejected)
        shared = min(
            _common_prefix_length(prompt_alone, with_chosen),
            _common_prefix_length(prompt_alone, with_rejected),
        )
        prompt, chosen, rejected = (
            prompt_alone[:shared],
            with_chosen[shared:],
            with_rejected[shared:],
        )
        if reason := self._useless(prompt, chosen, rejected):
            return self._drop(reason, row)
        truncated = truncate(
            prompt,
            chosen,
            rejected,
            options=self.options,
            bos_token_id=self.bos_token_id,
            find_turns=lambda: self.renderer.prompt_turns(rendered),
        )
        if truncated is None:
            return self._drop(OVER_LONG_PROMPT, row)
        if truncated[1] == truncated[2]:
            return self._drop(IDENTICAL_AFTER_TRUNCATION, row)
        scored = self._masks(rendered, shared, len(truncated[1]), len(truncated[2]))
        if any(mask is not None and not mask.any() for mask in scored):
            return self._drop(NOTHING_SCORED, row)
        cut = (
            len(truncated[0]) < shared,
            len(truncated[1]) < len(chosen),
            len(truncated[2]) < len(rejected),
        )
        self.report.truncated_prompts += cut[0]
        self.report.truncated_completions += cut[1] + cut[2]
        if shared < len(prompt_alone):
            self._note_unstable(row, prompt_alone[shared:])
        self.builder.add(*truncated, row, cut, scored)

    def _masks(self, rendered: RenderedRow, shared: int, chosen: int, rejected: int) -> ScoredMasks:
        """The masks of a pair's completions of these lengths, which begin after `shared` ids."""
        if rendered.spans == (None, None):
            return None, None
        try:
            masks = self.renderer.masks(rendered)
        except DataError as error:
            raise DataError(f"{self._where(rendered.row)}: {error}") from error
        of_chosen, of_rejected = (
            None
            if mask is None or mask[shared : shared + length].all()
            else mask[shared : shared + length]
            for mask, length in zip(masks, (chosen, rejected), strict=True)
        )
        return of_chosen, of_rejected

    def _useless(self, prompt: Ids, chosen: Ids, rejected: Ids) -> str | None:
        """Return the reason why a pair cannot teach anything, or None."""
        if not prompt:
            return EMPTY_PROMPT
        for completion in (chosen, rejected):
            if not completion or completion == [self.eos_token_id]:
                return EMPTY_COMPLETION
        return IDENTICAL if chosen == rejected else None

    def _drop(self, reason: str, row: int) -> None:
        where = self._where(row)
        if self.options.strict_data:
            raise DataError(
                f"{where}: {reason}, and strict_data is on; correct or remove the row, or leave "
                "strict_data off to have such rows dropped and counted"
            )
        self.report.drop(reason, row, where)

    def _note_unstable(self, row: int, trimmed: Ids) -> None:
        if not self.report.unstable_prompts:
            text = self.tokenizer.decode(trimmed)
            self.report.unstable_example = f"{text!r} in {self._where(row)}"
        self.report.unstable_prompts += 1

    def _check_vocabulary(self, row: int, with_chosen: Ids, with_rejected: Ids) -> None:
        largest = max(max(with_chosen, default=0), max(with_rejected, default=0))
        if largest >= (self.vocabulary_size or 0):
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"{self._where(row)}: the token {token!r} has the id {largest}, and the model "
                f"has {self.vocabulary_size} embeddings; use the tokenizer of this model, or "
                "resize its embeddings to the tokenizer"
            )


def _common_prefix_length(ids: Ids, other: Ids) -> int:
    if other[: len(ids)] == ids:
        return len(ids)
    pairs = enumerate(zip(ids, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(other)))


def _chunks(
    rows: Rows, report: PreparationReport, most: Callable[[], int], progress: bool
) -> Generator[list[ChunkRow]]:
    """Cut the rows into chunks of `most()` preferences, and count them into the report.

    Where a row is malformed, those before it come first.
    """
    chunk: list[ChunkRow] = []
    pairs = letters = 0
    try:
        for number, preferences in _with_progress(rows.preferences(report.shapes), rows, progress):
            report.rows_read += 1
            where = rows.where(number)
            reason = preferences.reason if isinstance(preferences, NoPreference) else None
            preferences = list(preferences)
            while True:
                room = max(1, most() - pairs)
                part, preferences = preferences[:room], preferences[room:]
                chunk.append(ChunkRow(number, where, part, reason))
                pairs += len(part)
                letters += sum(map(_letters, part))
                if pairs >= most() or len(chunk) >= _CHUNK_PAIRS or letters > _CHUNK_LETTERS:
                    yield chunk
                    chunk, pairs, letters = [], 0, 0
                if not preferences:
                    break
    except DataError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def _letters(row: PreferenceRow) -> int:
    """About how many letters a preference has."""
    sides = (row.prompt, row.chosen, row.rejected)
    turns = [turn for side in sides for turn in (side if isinstance(side, list) else [side])]
    return sum(len(turn if isinstance(turn, str) else turn.get("content") or "") for turn in turns)


def _left(rows: Rows, whole: _Whole) -> Callable[[], float | None]:
    """How many times as many rows as were read are left; None where that is not known."""

    def left() -> float | None:
        if rows.is_stream:
            return None
        return len(rows) / max(1, whole.report.rows_read) - 1

    return left


def _with_progress(items: Iterable[_T], rows: Rows, progress: bool) -> Iterable[_T]:
    if not progress or (not rows.is_stream and len(rows) <= _PROGRESS_FROM_ROWS):
        return items
    from tqdm.auto import tqdm

    total = None if rows.is_stream else len(rows)
    return tqdm(items, total=total, desc="tokenising", unit="row")
