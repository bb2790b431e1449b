"""Rendering a preference row as the three texts whose tokens make its pair."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdpo.data.arrival import TemplateAbilities
from fastdpo.data.chat_template import ensure_chat_template
from fastdpo.data.errors import DataError
from fastdpo.data.normalize import Messages, PreferenceRow
from fastdpo.data.pairs import PreparationReport, joined_mode
from fastdpo.data.prompt_turns import PromptTurns, find_turns
from fastdpo.data.ready_made import ReadyMadeText, check_is_text
from fastdpo.data.special_tokens import SpecialTokens
from fastdpo.data.template_date import asks_for_date, today, with_date
from fastdpo.data.template_variables import TemplateVariables
from fastdpo.data.tokenizer_bounds import check_growth, explaining_panics
from fastdpo.data.turns import AssistantTurns, Span, has_several_turns
from fastdpo.options import TokenizationOptions
from fastdpo.system.limits import TooSlowError, cpu_seconds, more_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")

MOST_SECONDS = 10.0
"""CPU seconds that the chat template has for one row; usual ones take a thousandth of one."""
MOST_BYTES = 2**30
"""Memory that it has for one row."""
MOST_LETTERS = 2**26
"""Letters that it may make of one row."""


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """The texts of one row: prompt, prompt + chosen, prompt + rejected.

    Attributes:
        row: index of the source row.
        texts: the three, ready for the tokenizer.
        conversational: a template wrote them, special tokens included; else the tokenizer adds
            what it adds to any text.
        sentinel: the character that breaks special tokens inside the content; None without any.
        spans: of the second and the third text, the characters that are scored; None: all of the
            completion.
        prompt: the turns of the first text, with the tools and variables that the template got;
            None for ready-made text.
    """

    row: int
    texts: tuple[str, str, str]
    conversational: bool
    sentinel: str | None
    spans: tuple[list[Span] | None, list[Span] | None] = (None, None)
    prompt: tuple[Messages, list[Any] | None, dict[str, Any]] | None = None


class Renderer:
    """Renders rows as texts and encodes these, with one BOS and one EOS each.

    Args:
        tokenizer: gets the plain chat template if it has none and a conversational row comes.
        options: `special_tokens_in_content` says what becomes of special tokens in the content,
            `score_turns` which turns of a completion are scored.
        report: where special-token rows, the plain template and its date are put down.
        counts: where rows of ready-made text are counted.
        is_instruct: whether the tokenizer came with a chat template; None looks.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        options: TokenizationOptions,
        report: PreparationReport,
        counts: Counter[str],
        is_instruct: bool | None = None,
    ):
        self.tokenizer = tokenizer
        self._options = options
        self._report, self._counts = report, counts
        self._variables = TemplateVariables(tokenizer)
        self.day = options.template_date or today()
        self._dated: dict[str, str | None] = {}
        self._special_tokens = SpecialTokens(tokenizer)
        self._assistant_turns = AssistantTurns(tokenizer)
        self._bos, self._eos = tokenizer.bos_token, tokenizer.eos_token  # slow to look up
        self._bos_id, self._eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        for name, text, token in (
            ("bos_token", self._bos, self._bos_id),
            ("eos_token", self._eos, self._eos_id),
        ):
            self._check_is_token(name, text, token)
        check_growth(tokenizer)
        probe = _encode(tokenizer, ["a"], add_special_tokens=True)[0]
        self._adds_bos = bool(probe) and probe[0] == self._bos_id
        self._abilities: TemplateAbilities | None = None
        with_template = tokenizer.chat_template is not None
        self.is_instruct = with_template if is_instruct is None else is_instruct
        self._ready_made = ReadyMadeText(tokenizer, self._special_tokens)

    def count_in(self, report: PreparationReport, counts: Counter[str]) -> None:
        """Put down what concerns the rows from here on in another report."""
        self._report, self._counts = report, counts

    def render(self, index: int, row: PreferenceRow) -> RenderedRow:
        """Render the three texts of row number `index`.

        Raises:
            DataError: no EOS token, a template that refuses the row, or a special token under the
                mode "error"; the caller puts the place in front.
        """
        if row.is_conversational:
            if ensure_chat_template(self.tokenizer):
                self._report.notes.append(
                    "the tokenizer has no chat template: the plain one of fastdpo is used and will "
                    "be saved with the tokenizer (roles as text, EOS after each assistant turn)"
                )
            names = {key for turn in (*row.chosen, *row.rejected) for key in turn} & set(_THOUGHTS)
            self._variables.note_unread_fields(row, names, self._report.notes)
            rendered = self._render_messages(index, row)
        else:
            rendered = self._render_strings(index, row)
        check_is_text(rendered.texts)
        return rendered

    def encode(self, rows: list[RenderedRow]) -> list[tuple[Ids, Ids, Ids]]:
        """Return the ids of each row's three texts; rows of a kind are tokenized in one call."""
        kinds: dict[tuple[bool, str | None], list[int]] = {}
        for index, row in enumerate(rows):
            kinds.setdefault((row.conversational, row.sentinel), []).append(index)
        encoded: dict[int, tuple[Ids, Ids, Ids]] = {}
        for (conversational, sentinel), indices in kinds.items():
            texts = [text for index in indices for text in rows[index].texts]
            distinct = [*dict.fromkeys(texts)]  # lists repeat their prompts and completions
            special = not conversational
            with explaining_panics():
                if sentinel is None:
                    found = _encode(self.tokenizer, distinct, add_special_tokens=special)
                else:
                    found = self._special_tokens.encode(
                        distinct, sentinel, add_special_tokens=special
                    )
            by_text = dict(zip(distinct, found, strict=True))
            ids = [by_text[text] for text in texts]
            if not conversational:
                ids = [
                    self._bos_and_eos_once(text_ids, text, ends=nth % 3 > 0)
                    for nth, (text_ids, text) in enumerate(zip(ids, texts, strict=True))
                ]
            for nth, index in enumerate(indices):
                prompt, chosen, rejected = ids[3 * nth : 3 * nth + 3]
                encoded[index] = (prompt, chosen, rejected)
        return [encoded[index] for index in range(len(rows))]

    def masks(self, row: RenderedRow) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Which ids of prompt + chosen and prompt + rejected are scored, bool; None: all.

        A token is scored where it ends inside a scored span.

        Raises:
            DataError: the tokenizer does not tell where its tokens lie.
        """
        chosen, rejected = (
            None if spans is None else self._mask(text, spans, row.sentinel)
            for text, spans in zip(row.texts[1:], row.spans, strict=True)
        )
        return chosen, rejected

    def prompt_turns(self, row: RenderedRow) -> PromptTurns | None:
        """Where the turns of a row's prompt lie, in tokens; None where that cannot be told."""
        if row.prompt is None or not self.tokenizer.is_fast:
            return None
        messages, tools, variables = row.prompt
        try:
            with self._bounded():
                found = find_turns(
                    messages,
                    row.texts[0],
                    lambda turns: self._apply_template(turns, tools, variables, True),
                )
        except DataError:  # the template has an objection to other words
            return None
        if found is None:
            return None
        ends = self._token_ends(row.texts[0], row.sentinel)
        tokens = [bisect_right(ends, place) for place in found.places()]
        return PromptTurns((tokens[0], tokens[1]), tokens[2], tuple(tokens[3:]))

    def _mask(self, text: str, spans: list[Span], sentinel: str | None) -> np.ndarray:
        ends = np.array(self._token_ends(text, sentinel))
        scored = np.zeros(len(ends), dtype=np.bool_)
        for start, end in spans:
            scored |= (ends > start) & (ends <= end)
        return scored

    def _token_ends(self, text: str, sentinel: str | None) -> list[int]:
        if sentinel is not None:
            return self._special_tokens.token_ends(text, sentinel)
        if not self.tokenizer.is_fast:
            raise DataError(
                f"a completion has several turns, and {type(self.tokenizer).__name__} is not a "
                "fast tokenizer, which is needed to tell which of its tokens the assistant writes; "
                "pass --score_turns all to score every token, as TRL does"
            )
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [end for _, end in encoded["offset_mapping"]]

    def without_eos(self, text: str) -> str:
        """Return `text` without the EOS that it may end with, repeated or before a line break."""
        while self._eos and (ended := text.rstrip()).endswith(self._eos):
            text = ended.removesuffix(self._eos)
        return text

    def without_bos(self, text: str) -> str:
        """Return `text` without the BOS that it may begin with."""
        return text.removeprefix(self._bos) if self._bos else text

    def _render_strings(self, index: int, row: PreferenceRow) -> RenderedRow:
        eos = self._eos
        if eos is None:
            raise DataError(
                "the completions are strings, which end with the EOS token, and the tokenizer has "
                "none; set tokenizer.eos_token to the token that ends a text"
            )
        # A BOS in front and an EOS behind are what the user wrote as such, under every mode.
        bos = self._bos or ""
        head = bos if str(row.prompt).startswith(bos) else ""
        prompt = str(row.prompt)[len(head) :]
        parts = [prompt, *(self.without_eos(str(text)) for text in (row.chosen, row.rejected))]
        if self.is_instruct:
            self._counts["ready-made"] += 1
            self._counts["bare"] += self._ready_made.is_bare(str(row.prompt), parts)
        sentinel = self._sentinel_for("allow", parts)
        if sentinel is not None:
            parts = self._special_tokens.escape(parts, sentinel)
        prompt, chosen, rejected = (head + parts[0], parts[1] + eos, parts[2] + eos)
        return RenderedRow(index, (prompt, prompt + chosen, prompt + rejected), False, sentinel)

    def _render_messages(self, index: int, row: PreferenceRow) -> RenderedRow:
        variables = self._variables.taken_from(row, self._report.notes)
        content: Any = [row.prompt, row.chosen, row.rejected, row.tools, variables]
        sentinel = self._sentinel_for("literal", content)
        if sentinel is not None:
            content = self._special_tokens.escape(content, sentinel)
        prompt, chosen, rejected, tools, variables = content

        def render(messages: Messages, add_generation_prompt: bool = False) -> str:
            return self._apply_template(messages, tools, variables, add_generation_prompt)

        ends = []
        with self._bounded():
            if self._abilities is None:
                self._abilities = TemplateAbilities(
                    self.tokenizer.chat_template,
                    lambda turns: self._apply_template(turns, None, {}),
                )
            prompt, chosen, rejected = map(self._abilities.adapt, (prompt, chosen, rejected))
            start = render(prompt, add_generation_prompt=True)
            for side in (chosen, rejected):
                text = render(prompt + side)
                self._abilities.check(prompt + side, text, render)
                ends.append(self._one_eos_at_the_end(text))
        texts = (start, ends[0], ends[1])
        if (length := max(map(len, texts))) > MOST_LETTERS:
            raise DataError(
                f"the chat template makes a text of {length:,} letters of this row, more than "
                f"{MOST_LETTERS:,}; set another tokenizer.chat_template, or correct the row"
            )
        several = any(map(has_several_turns, (chosen, rejected)))
        self._report.rows_of_turns += several
        if not several or self._options.score_turns == "all":
            return RenderedRow(index, texts, True, sentinel, prompt=(prompt, tools, variables))
        with self._bounded():
            of_chosen, of_rejected = (
                self._assistant_turns.spans(prompt, side, text, render, tools, variables)
                for side, text in zip((chosen, rejected), ends, strict=True)
            )
        spans = (of_chosen, of_rejected)
        return RenderedRow(index, texts, True, sentinel, spans, (prompt, tools, variables))

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        """Bound what the template, which is foreign code, may take for one row."""
        try:
            with cpu_seconds(MOST_SECONDS), more_memory(MOST_BYTES):
                yield
        except (TooSlowError, MemoryError) as error:
            raise DataError(
                f"the chat template takes more than {MOST_SECONDS:g} s of computing or "
                f"{MOST_BYTES / 2**20:g} MiB for this row ({str(error) or 'out of memory'}); set "
                "another tokenizer.chat_template, or correct the row"
            ) from error

    def _one_eos_at_the_end(self, text: str) -> str:
        """Remove the EOS that follows another one at the end, white space aside."""
        start = self.without_eos(text)
        if not self._eos or text[len(start) :].count(self._eos) < 2:
            return text
        end = text[len(start) :]
        first = end.index(self._eos) + len(self._eos)
        return start + end[: end.index(self._eos, first)]

    def _apply_template(
        self,
        messages: Messages,
        tools: list[Any] | None,
        variables: dict[str, Any],
        add_generation_prompt: bool = False,
    ) -> str:
        try:
            dated = self._dated_template(tools)
            given: dict[str, Any] = {} if dated is None else {"chat_template": dated}
            # As text: with tokenize=True the return type depends on the transformers version.
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **given,
                **variables,
            )
        except (TooSlowError, MemoryError):
            raise
        except Exception as error:  # a template is foreign code and may raise anything
            roles = [message["role"] for message in messages]
            raise DataError(
                f"the chat template refuses a conversation with the roles {roles} "
                f"({type(error).__name__}: {error}); correct the row, or set another "
                "tokenizer.chat_template"
            ) from error
        assert isinstance(text, str), f"a rendered template is text, not {type(text).__name__}"
        return text

    def _dated_template(self, tools: list[Any] | None) -> str | None:
        """The tokenizer's template with this run's date in it; None if it asks for none."""
        template = self.tokenizer.get_chat_template(tools=tools)
        if template not in self._dated:
            dated = None
            if asks_for_date(template):
                dated = with_date(template, self.day)
                self._report.template_date = self.day
                self._report.notes.append(
                    f"the chat template writes the date: every row gets {self.day} "
                    "(--template_date)"
                )
            self._dated[template] = dated
        return self._dated[template]

    def _sentinel_for(self, default_mode: str, content: Any) -> str | None:
        """Count a row that spells special tokens; return what breaks them, None to let them be."""
        spelled = self._special_tokens.find(content)
        if spelled is None:
            return None
        mode = self._options.special_tokens_in_content or default_mode
        if mode == "error":
            raise DataError(
                f"the content spells the special token {spelled!r}; remove it, or pass "
                "special_tokens_in_content='literal' (plain text) or 'allow' (the special token)"
            )
        self._report.special_token_rows += 1
        self._report.special_token_mode = joined_mode(self._report.special_token_mode, mode)
        return self._special_tokens.unused_char(content) if mode == "literal" else None

    def _bos_and_eos_once(self, ids: Ids, text: str, *, ends: bool) -> Ids:
        """Settle what the tokenizer adds to a text: one BOS, and EOS as the text has it.

        Args:
            ids: of the text.
            text: as it was encoded.
            ends: the text ends with one EOS, which a tokenizer may have taken for the one it adds.
        """
        if self._adds_bos and ids[:2] == [self._bos_id, self._bos_id]:
            ids = ids[1:]
        written = 0
        while self._eos and text.endswith(self._eos):
            text, written = text.removesuffix(self._eos), written + 1
        found = next((n for n, each in enumerate(reversed(ids)) if each != self._eos_id), len(ids))
        if found > written:
            ids = ids[: len(ids) - found + written]
        return [*ids, self._eos_id] if ends and not found else ids

    def _check_is_token(self, name: str, text: str | None, token: int | None) -> None:
        """Refuse a BOS or EOS whose text is spelled out in pieces wherever it stands."""
        if text is None:
            return
        ids = _encode(self.tokenizer, [text], add_special_tokens=False)[0]
        if ids != [token]:
            raise DataError(
                f"tokenizer.{name} is {text!r}, which is no token of this tokenizer: it is spelled "
                f"in {len(ids)} pieces, and its id would be {token}; set it to a token that the "
                "tokenizer has, or add it (tokenizer.add_special_tokens) and resize the model's "
                "embeddings"
            )


def _encode(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str], *, add_special_tokens: bool
) -> list[Ids]:
    return tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
