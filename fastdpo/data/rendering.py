"""Rendering a preference row as the three texts whose tokens make its pair."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdpo.data.chat_template import ensure_chat_template
from fastdpo.data.errors import DataError
from fastdpo.data.normalize import Messages, PreferenceRow
from fastdpo.data.pairs import PreparationReport
from fastdpo.data.special_tokens import SpecialTokens
from fastdpo.data.turns import AssistantTurns, Span, has_several_turns
from fastdpo.options import TokenizationOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]


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
    """

    row: int
    texts: tuple[str, str, str]
    conversational: bool
    sentinel: str | None
    spans: tuple[list[Span] | None, list[Span] | None] = (None, None)


class Renderer:
    """Renders rows as texts and encodes these, with one BOS and one EOS each.

    Args:
        tokenizer: gets the plain chat template if it has none and a conversational row comes.
        options: `special_tokens_in_content` says what becomes of special tokens in the content,
            `score_turns` which turns of a completion are scored.
        report: where control-token rows and the plain template are put down.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        options: TokenizationOptions,
        report: PreparationReport,
    ):
        self.tokenizer = tokenizer
        self._options = options
        self._report = report
        self._looked_for: set[str] = set()
        self._special_tokens = SpecialTokens(tokenizer)
        self._assistant_turns = AssistantTurns(tokenizer)
        self._bos, self._eos = tokenizer.bos_token, tokenizer.eos_token  # slow to look up
        self._bos_id, self._eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        probe = _encode(tokenizer, ["a"], add_special_tokens=True)[0]
        self._adds_bos = bool(probe) and probe[0] == self._bos_id
        self._adds_eos = bool(probe) and probe[-1] == self._eos_id

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
            self._note_unused("tools" if row.tools else None, *row.chat_template_kwargs)
            return self._render_messages(index, row)
        return self._render_strings(index, row)

    def encode(self, rows: list[RenderedRow]) -> list[tuple[Ids, Ids, Ids]]:
        """Return the ids of each row's three texts; rows of a kind are tokenized in one call."""
        kinds: dict[tuple[bool, str | None], list[int]] = {}
        for index, row in enumerate(rows):
            kinds.setdefault((row.conversational, row.sentinel), []).append(index)
        encoded: dict[int, tuple[Ids, Ids, Ids]] = {}
        for (conversational, sentinel), indices in kinds.items():
            texts = [text for index in indices for text in rows[index].texts]
            special = not conversational
            if sentinel is None:
                ids = _encode(self.tokenizer, texts, add_special_tokens=special)
            else:
                ids = self._special_tokens.encode(texts, sentinel, add_special_tokens=special)
            if not conversational:
                ids = [self._bos_and_eos_once(text_ids) for text_ids in ids]
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
        """Return `text` without the EOS that it may end with."""
        return text.removesuffix(self._eos) if self._eos else text

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
        sentinel = self._sentinel_for("allow", parts)
        if sentinel is not None:
            parts = self._special_tokens.escape(parts, sentinel)
        prompt, chosen, rejected = (head + parts[0], parts[1] + eos, parts[2] + eos)
        return RenderedRow(index, (prompt, prompt + chosen, prompt + rejected), False, sentinel)

    def _render_messages(self, index: int, row: PreferenceRow) -> RenderedRow:
        content: Any = [row.prompt, row.chosen, row.rejected, row.tools, row.chat_template_kwargs]
        sentinel = self._sentinel_for("literal", content)
        if sentinel is not None:
            content = self._special_tokens.escape(content, sentinel)
        prompt, chosen, rejected, tools, variables = content
        texts = (
            self._apply_template(prompt, tools, variables, add_generation_prompt=True),
            self._apply_template(prompt + chosen, tools, variables),
            self._apply_template(prompt + rejected, tools, variables),
        )
        self._report.rows_of_turns += any(map(has_several_turns, (chosen, rejected)))
        if self._options.score_turns == "all":
            return RenderedRow(index, texts, True, sentinel)

        def render(messages: Messages, add_generation_prompt: bool) -> str:
            return self._apply_template(messages, tools, variables, add_generation_prompt)

        of_chosen, of_rejected = (
            self._assistant_turns.spans(prompt, completion, text, render, tools, variables)
            for completion, text in zip((chosen, rejected), texts[1:], strict=True)
        )
        return RenderedRow(index, texts, True, sentinel, (of_chosen, of_rejected))

    def _apply_template(
        self,
        messages: Messages,
        tools: list[Any] | None,
        variables: dict[str, Any],
        add_generation_prompt: bool = False,
    ) -> str:
        try:
            # As text: with tokenize=True the return type depends on the transformers version.
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except Exception as error:  # a template is foreign code and may raise anything
            roles = [message["role"] for message in messages]
            raise DataError(
                f"the chat template refuses a conversation with the roles {roles} "
                f"({type(error).__name__}: {error}); correct the row, or set another "
                "tokenizer.chat_template"
            ) from error
        assert isinstance(text, str), f"a rendered template is text, not {type(text).__name__}"
        return text

    def _note_unused(self, *names: str | None) -> None:
        """Note, once for each variable, that the template never looks at it."""
        template = self.tokenizer.chat_template
        for name in names:
            if name is None or name in self._looked_for or not isinstance(template, str):
                continue
            self._looked_for.add(name)
            if not re.search(rf"\b{re.escape(name)}\b", template):
                self._report.notes.append(
                    f"warning: the chat template does not use {name!r}, which rows give it"
                )

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
        known = self._report.special_token_mode
        self._report.special_token_mode = mode if known in ("", mode) else "literal or allow"
        return self._special_tokens.unused_char(content) if mode == "literal" else None

    def _bos_and_eos_once(self, ids: Ids) -> Ids:
        """Remove the BOS or EOS that the tokenizer added to a text that already had it."""
        if self._adds_eos and ids[-1:] == [self._eos_id]:
            ids = ids[:-1]
        if self._adds_bos and ids[:2] == [self._bos_id, self._bos_id]:
            ids = ids[1:]
        return ids


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
