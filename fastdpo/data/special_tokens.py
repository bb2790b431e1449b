"""Text that spells a control token: found, and encoded as the plain text it is.

A tokenizer turns the string `<|im_end|>` into the control id wherever it stands, also inside what
a user typed. To keep the two apart a mark is put inside such a string before the chat template
runs. The mark is one character which occurs nowhere in the row or the template, so no content can
forge it, and the broken string can't match. The text is then encoded by a copy of the tokenizer
whose normalizer removes the mark: control tokens are matched before normalizing, so only those the
template wrote are found, and the rest is split and merged as if the string were any other text.
Decoding gives back the content letter for letter (as far as the tokenizer can).
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fastdpo.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Noncharacters first (never exchanged as text), then the private use area.
_MARKS = [chr(code) for code in (*range(0xFDD0, 0xFDF0), *range(0xE000, 0xF900))]


class SpecialTokens:
    """The control tokens of a tokenizer: its added tokens that are flagged special.

    Added tokens without that flag (`<think>`, `<tool_call>`, runs of spaces) are vocabulary that
    content may use.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        texts = sorted((t.content for t in added if t.special), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._marked_tokenizers: dict[str, Any] = {}

    def find(self, value: Any) -> str | None:
        """The first control token spelled in a string or anywhere inside lists and dicts."""
        for text in _strings(value):
            if match := self._pattern.search(text):
                return match.group()
        return None

    def unused_char(self, *values: Any) -> str:
        """A character that occurs neither in `values` nor in the chat template."""
        texts = [*_strings(values), *_strings(self._tokenizer.chat_template)]
        return next(mark for mark in _MARKS if not any(mark in text for text in texts))

    def escape(self, value: Any, mark: str) -> Any:
        """A copy of `value` with `mark` inside every control token that is spelled in it."""
        if isinstance(value, str):
            # Again until none is left: breaking one string can leave a shorter one inside it.
            while self._pattern.search(value):
                value = self._pattern.sub(lambda match: _break(match.group(), mark), value)
            return value
        if isinstance(value, Mapping):
            return {self.escape(k, mark): self.escape(v, mark) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.escape(item, mark) for item in value]
        return value

    def encode(self, texts: list[str], mark: str, *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of texts shielded with `mark`; unbroken control tokens become control ids."""
        if mark not in self._marked_tokenizers:
            self._marked_tokenizers[mark] = self._with_mark_removed(mark)
        marked = self._marked_tokenizers[mark]
        encodings = marked.encode_batch(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def _with_mark_removed(self, mark: str) -> Any:
        """A copy of the fast tokenizer that deletes `mark` after it has matched control tokens."""
        if not self._tokenizer.is_fast:
            raise DataError(
                f"some rows spell a control token in their content, and {type(self._tokenizer)} is "
                "not a fast tokenizer, which is needed to encode it as plain text; pass "
                "special_tokens_in_content='allow' or 'error', or remove it from the rows"
            )
        backend = self._tokenizer.backend_tokenizer
        content = json.loads(backend.to_str())
        content["truncation"] = content["padding"] = None
        for token in content["added_tokens"]:
            if token["special"]:
                token["normalized"] = False
        remove: dict[str, Any] = {"type": "Replace", "pattern": {"String": mark}, "content": ""}
        if content["normalizer"] is not None:
            remove = {"type": "Sequence", "normalizers": [remove, content["normalizer"]]}
        content["normalizer"] = remove
        return type(backend).from_str(json.dumps(content))


def _break(text: str, mark: str) -> str:
    if len(text) == 1:
        raise DataError(
            f"the content holds {text!r}, which is a control token of this tokenizer and too short "
            "to be encoded as plain text; pass special_tokens_in_content='allow' or 'error'"
        )
    return text[0] + mark + text[1:]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
