"""From rows to pairs of token ids: the way in which every dropped or cut row is counted."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from fastdpo.data.errors import DataError
from fastdpo.data.formats import PreferenceRow, is_blank, preference_row
from fastdpo.data.pairs import (
    EMPTY_COMPLETION,
    EMPTY_PROMPT,
    IDENTICAL,
    IDENTICAL_AFTER_TRUNCATION,
    OVER_LONG_PROMPT,
    PairBuilder,
    PairDataset,
    PreparationReport,
)
from fastdpo.data.reading import Rows
from fastdpo.data.rendering import CONTROL_TOKEN_POLICIES, RenderedRow, Renderer
from fastdpo.data.truncation import TRUNCATION_MODES, truncate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_ROWS = 512
_PROGRESS_FROM_ROWS = 2_000

Ids = list[int]
_T = TypeVar("_T")


def prepare_pairs(
    rows: Rows,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_completion",
    special_tokens_in_content: str | None = None,
    strict_data: bool = False,
    vocabulary_size: int | None = None,
    progress: bool = True,
) -> PairDataset:
    """Normalise, render, tokenise and truncate preference rows.

    The prompt ids are what tokenised prompt, prompt + chosen and prompt + rejected have in common
    at their start; the rest of each is its completion (TRL's rule). String completions end with
    exactly one EOS; conversations end as their chat template ends them.

    Args:
        rows: from `read_rows` or `rows_from`.
        tokenizer: without a chat template it gets the plain one when conversational rows come.
        max_length: most tokens of prompt + completion, at least 2; None for no limit.
        truncation_mode: "keep_completion" cuts the prompt from its left first, "keep_start" keeps
            the first tokens (TRL); see `fastdpo.data.truncation`.
        special_tokens_in_content: "literal" encodes control tokens spelled in the content as plain
            text, "allow" as control tokens, "error" refuses them; None means literal for
            conversations and allow for strings.
        strict_data: make every row that would be dropped an error.
        vocabulary_size: number of embeddings of the model; ids beyond it are an error.
        progress: show a progress bar for more than 2,000 rows.

    Returns:
        The pairs in the order of the rows, with the account of what was dropped and cut.

    Raises:
        ValueError: an option has an unknown value.
        DataError: a malformed row, a tokenizer that lacks what the rows need, an id beyond the
            vocabulary, a dropped row under `strict_data`, or no pair left.
    """
    _check_choice("truncation_mode", truncation_mode, TRUNCATION_MODES)
    if special_tokens_in_content is not None:
        _check_choice(
            "special_tokens_in_content", special_tokens_in_content, CONTROL_TOKEN_POLICIES
        )
    if max_length is not None and max_length < 2:
        raise ValueError(
            f"max_length is {max_length}, at least 2 is needed: a prompt and a completion token"
        )
    preparation = _Preparation(
        rows,
        tokenizer,
        max_length=max_length,
        truncation_mode=truncation_mode,
        policy=special_tokens_in_content,
        strict_data=strict_data,
        vocabulary_size=vocabulary_size,
    )
    batch: list[RenderedRow] = []
    for index, row in _with_progress(_preference_rows(rows), len(rows), progress):
        rendered = preparation.render(index, row)
        if rendered is not None:
            batch.append(rendered)
        if len(batch) == _BATCH_ROWS:
            preparation.add(batch)
            batch = []
    preparation.add(batch)
    return preparation.finish()


class _Preparation:
    """The state of one `prepare_pairs` call: rows go in rendered and in order, pairs come out."""

    def __init__(
        self,
        rows: Rows,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_length: int | None,
        truncation_mode: str,
        policy: str | None,
        strict_data: bool,
        vocabulary_size: int | None,
    ):
        self.rows = rows
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncation_mode = truncation_mode
        self.strict_data = strict_data
        self.vocabulary_size = vocabulary_size
        self.report = PreparationReport(rows.source)
        self.renderer = Renderer(tokenizer, policy, self.report)
        self.builder = PairBuilder()

    def render(self, index: int, row: PreferenceRow) -> RenderedRow | None:
        """The texts of a row, None if it is useless already."""
        self.report.rows_read += 1
        for completion in (row.chosen, row.rejected):
            if isinstance(completion, str):
                completion = self.renderer.without_eos(completion)
            if is_blank(completion):
                return self._drop(EMPTY_COMPLETION, index)
        if row.prompt == []:
            return self._drop(EMPTY_PROMPT, index)
        try:
            return self.renderer.render(index, row)
        except DataError as error:
            raise DataError(f"{self.rows.where(index)}: {error}") from error

    def add(self, batch: list[RenderedRow]) -> None:
        """Tokenise a batch and keep its pairs."""
        for rendered, ids in zip(batch, self.renderer.encode(batch), strict=True):
            self._add_pair(rendered.row, *ids)

    def finish(self) -> PairDataset:
        """The pairs and their report."""
        self.report.pairs_kept = len(self.builder)
        if not self.report.pairs_kept:
            raise DataError(
                f"no pair is left to train on:\n{self.report.describe()}\nraise max_length if "
                "prompts are over-long; otherwise correct the rows named above"
            )
        return self.builder.build(self.report)

    def _add_pair(self, row: int, prompt_alone: Ids, with_chosen: Ids, with_rejected: Ids) -> None:
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
        cut = truncate(
            prompt,
            chosen,
            rejected,
            max_length=self.max_length,
            mode=self.truncation_mode,
            bos_token_id=self.tokenizer.bos_token_id,
        )
        if cut is None:
            return self._drop(OVER_LONG_PROMPT, row)
        if cut[1] == cut[2]:
            return self._drop(IDENTICAL_AFTER_TRUNCATION, row)
        self.report.truncated_prompts += len(cut[0]) < shared
        self.report.truncated_completions += len(cut[1]) < len(chosen)
        self.report.truncated_completions += len(cut[2]) < len(rejected)
        if shared < len(prompt_alone):
            self._note_unstable(row, prompt_alone[shared:])
        self.builder.add(*cut, row)

    def _useless(self, prompt: Ids, chosen: Ids, rejected: Ids) -> str | None:
        """Why a pair can't teach anything, or None."""
        if not prompt:
            return EMPTY_PROMPT
        for completion in (chosen, rejected):
            if not completion or completion == [self.tokenizer.eos_token_id]:
                return EMPTY_COMPLETION
        return IDENTICAL if chosen == rejected else None

    def _drop(self, reason: str, row: int) -> None:
        where = self.rows.where(row)
        if self.strict_data:
            raise DataError(
                f"{where}: {reason}, and strict_data is on; correct or remove the row, or leave "
                "strict_data off to have such rows dropped and counted"
            )
        self.report.drop(reason, where)

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


def _preference_rows(rows: Rows) -> Iterator[tuple[int, PreferenceRow]]:
    """Number and normalised row; a malformed one stops all, naming the first and how many."""
    iterator = enumerate(rows.rows)
    for index, row in iterator:
        try:
            yield index, preference_row(row)
        except DataError as error:
            others = sum(_is_malformed(other) for _, other in iterator)
            more = f"; {others:,} later rows are malformed too" if others else ""
            raise DataError(f"{rows.where(index)}: {error}{more}") from error


def _is_malformed(row: Mapping[str, Any]) -> bool:
    try:
        preference_row(row)
    except DataError:
        return True
    return False


def _common_prefix_length(ids: Ids, other: Ids) -> int:
    if other[: len(ids)] == ids:
        return len(ids)
    pairs = enumerate(zip(ids, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(other)))


def _with_progress(items: Iterable[_T], total: int, progress: bool) -> Iterable[_T]:
    if not progress or total <= _PROGRESS_FROM_ROWS:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, total=total, desc="tokenising", unit="row")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; it has to be one of {', '.join(map(repr, known))}")
