"""Turning rows into pairs of token ids, with every dropped or cut row counted."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

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
from fastdpo.data.rendering import RenderedRow, Renderer
from fastdpo.data.scores import opposed_scores
from fastdpo.data.truncation import truncate
from fastdpo.options import TokenizationOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_ROWS = 512
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
    preparation = _Preparation(rows, tokenizer, options or TokenizationOptions(), vocabulary_size)
    batch: list[RenderedRow] = []
    letters = 0
    for row, preferences in _with_progress(preparation.preferences(), rows, progress):
        known = len(batch)
        batch += preparation.render(row, preferences)
        wanted = _BATCH_ROWS if limit is None else min(_BATCH_ROWS, limit - preparation.kept)
        letters += sum(len(text) for each in batch[known:] for text in each.texts)
        if len(batch) >= wanted or letters > _BATCH_LETTERS:
            preparation.add(batch[:wanted])
            batch, letters = batch[wanted:], 0
        if preparation.kept == limit:
            return preparation.finish(
                f"reading stopped at {limit:,} pairs, all that were asked for"
            )
    preparation.add(batch)
    return preparation.finish()


class _Preparation:
    """The state of one `prepare_pairs` call: rows go in rendered and in order, pairs come out."""

    def __init__(
        self,
        rows: Rows,
        tokenizer: "PreTrainedTokenizerBase",
        options: TokenizationOptions,
        vocabulary_size: int | None,
    ):
        self.rows = rows
        self.tokenizer = tokenizer
        self.options = options
        self.vocabulary_size = vocabulary_size
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.report = PreparationReport(rows.source)
        self.renderer = Renderer(tokenizer, options, self.report)
        self.builder = PairBuilder()
        self._rows_with_nul = self._empty_prompts = self._scored = self._opposed = 0

    @property
    def kept(self) -> int:
        """The number of pairs so far."""
        return len(self.builder)

    def preferences(self) -> Iterator[tuple[int, list[PreferenceRow]]]:
        """Yield the number and the preferences of each row, and count the rows."""
        for row, preferences in self.rows.preferences(self.report.shapes):
            self.report.rows_read += 1
            yield row, preferences

    def render(self, row: int, preferences: list[PreferenceRow]) -> list[RenderedRow]:
        """Render the preferences of a row; those that are useless already are dropped."""
        if isinstance(preferences, NoPreference) and preferences.reason is not None:
            self._drop(preferences.reason, row)
        rendered = [self._render(row, preference) for preference in preferences]
        return [texts for texts in rendered if texts is not None]

    def _render(self, index: int, row: PreferenceRow) -> RenderedRow | None:
        for completion in (row.chosen, row.rejected):
            if isinstance(completion, str):
                completion = self.renderer.without_eos(completion)
            if is_blank(completion):
                return self._drop(EMPTY_COMPLETION, index)
        if row.prompt == []:
            return self._drop(EMPTY_PROMPT, index)
        self._rows_with_nul += "\\x00" in repr((row.prompt, row.chosen, row.rejected))
        if isinstance(row.prompt, str):
            self._look_at_prompt(row.prompt, str(row.chosen), str(row.rejected))
        if row.score_margin is not None:
            self._scored += 1
            self._opposed += row.score_margin < 0
        try:
            return self.renderer.render(index, row)
        except DataError as error:
            raise DataError(f"{self.rows.where(index)}: {error}") from error

    def _look_at_prompt(self, prompt: str, chosen: str, rejected: str) -> None:
        """Count prompts that are empty, and those that both completions begin with once more."""
        self._empty_prompts += not self.renderer.without_bos(prompt).strip()
        if len(prompt) >= _PROMPT_FROM_LETTERS:
            words = " ".join(prompt.split())
            self.report.repeated_prompts += all(
                " ".join(side[: 2 * len(prompt)].split()).startswith(words)
                for side in (chosen, rejected)
            )

    def add(self, batch: list[RenderedRow]) -> None:
        """Tokenize a batch and keep its pairs."""
        for rendered, ids in zip(batch, self.renderer.encode(batch), strict=True):
            self._add_pair(rendered, *ids)

    def finish(self, note: str | None = None) -> PairDataset:
        """Return the pairs with their complete report."""
        self.report.pairs_kept = self.kept
        self.report.notes += [] if note is None else [note]
        if not self.report.pairs_kept:
            raise DataError(
                f"no pair is left to train on:\n{self.report.describe()}\nraise max_length if "
                "prompts are over-long; otherwise correct the rows named above"
            )
        pairs = self.builder.build(self.report)
        self.report.findings += check_pairs(pairs, self.rows.where)
        if self._rows_with_nul:
            self.report.findings.append(
                f"warning: {self._rows_with_nul:,} rows hold the character NUL, which is no text"
            )
        if self._empty_prompts and self.bos_token_id is not None:
            self.report.findings.append(
                f"warning: {self._empty_prompts:,} rows have no prompt: their answers follow the "
                "BOS token alone"
            )
        self.report.findings += opposed_scores(self._scored, self._opposed)
        self.report.findings += self.renderer.findings()
        return pairs

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
            raise DataError(f"{self.rows.where(rendered.row)}: {error}") from error
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
        where = self.rows.where(row)
        if self.options.strict_data:
            raise DataError(
                f"{where}: {reason}, and strict_data is on; correct or remove the row, or leave "
                "strict_data off to have such rows dropped and counted"
            )
        self.report.drop(reason, row, where)

    def _note_unstable(self, row: int, trimmed: Ids) -> None:
        if not self.report.unstable_prompts:
            text = self.tokenizer.decode(trimmed)
            self.report.unstable_example = f"{text!r} in {self.rows.where(row)}"
        self.report.unstable_prompts += 1

    def _check_vocabulary(self, row: int, with_chosen: Ids, with_rejected: Ids) -> None:
        largest = max(max(with_chosen, default=0), max(with_rejected, default=0))
        if largest >= (self.vocabulary_size or 0):
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"{self.rows.where(row)}: the token {token!r} has the id {largest}, and the model "
                f"has {self.vocabulary_size} embeddings; use the tokenizer of this model, or "
                "resize its embeddings to the tokenizer"
            )


def _common_prefix_length(ids: Ids, other: Ids) -> int:
    if other[: len(ids)] == ids:
        return len(ids)
    pairs = enumerate(zip(ids, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(other)))


def _with_progress(items: Iterable[_T], rows: Rows, progress: bool) -> Iterable[_T]:
    if not progress or (not rows.is_stream and len(rows) <= _PROGRESS_FROM_ROWS):
        return items
    from tqdm.auto import tqdm

    total = None if rows.is_stream else len(rows)
    return tqdm(items, total=total, desc="tokenising", unit="row")
