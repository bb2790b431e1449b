"""Encoding text that spells a special token as the plain text it is.

A tokenizer turns the string `<|im_end|>` into the special id wherever it stands, also inside what a
user typed. To keep the two apart a sentinel is put inside such a string before the chat template
runs. It is one character that occurs nowhere in the row or the template, so no content can forge
it, and the broken string cannot match:

    content  a <|im_end|> b    with a sentinel (here ^)  a <^|im_end|> b
    in the template            a <^|im_end|> b<|im_end|>
    its tokens                 a < | im _ end | > b END

The text is then encoded by a copy of the tokenizer whose normalizer removes the sentinel: special
tokens are matched before normalizing, so only those that the template wrote are found, and the rest
is split and merged as if the string were any other text. Decoding gives back the content letter for
letter (as far as the tokenizer can).
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fastdpo.data.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Noncharacters first (never exchanged as text), then the private use area.
_SENTINELS = [chr(code) for code in (*range(0xFDD0, 0xFDF0), *range(0xE000, 0xF900))]


class SpecialTokens:
    """The special tokens of a tokenizer: its added tokens that are flagged special.

    Added tokens without that flag (`<think>`, `<tool_call>`, runs of spaces) are vocabulary that
    content may use.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        texts = sorted((t.content for t in added if t.special), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._tokenizers: dict[str, Any] = {}

    def find(self, value: Any) -> str | None:
        """Return the first special token spelled anywhere in strings, lists and dicts, or None."""
        for text in _strings(value):
            if match := self._pattern.search(text):
                return match.group()
        return None

    def unused_char(self, *values: Any) -> str:
        """Return a character that occurs neither in `values` nor in the chat template."""
        texts = [*_strings(values), *_strings(self._tokenizer.chat_template)]
        return next(
            sentinel for sentinel in _SENTINELS if not any(sentinel in text for text in texts)
        )

    def escape(self, value: Any, sentinel: str) -> Any:
        """Return a copy of `value` with `sentinel` inside every special token spelled in it."""
        if isinstance(value, str):
            # Again until none is left: breaking one string can leave a shorter one inside it.
            while self._pattern.search(value):
                value = self._pattern.sub(lambda match: _break(match.group(), sentinel), value)
            return value
        if isinstance(value, Mapping):
            return {self.escape(k, sentinel): self.escape(v, sentinel) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.escape(item, sentinel) for item in value]
        return value

    def encode(
        self, texts: list[str], sentinel: str, *, add_special_tokens: bool
    ) -> list[list[int]]:
        """Encode texts that `escape` made; only unbroken special tokens become special ids."""
        encodings = self._encoder(sentinel).encode_batch(
            texts, add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in encodings]

    def token_ends(self, text: str, sentinel: str) -> list[int]:
        """Return where each token of a text that `escape` made ends, in characters of that text."""
        encoding = self._encoder(sentinel).encode(text, add_special_tokens=False)
        return [end for _, end in encoding.offsets]

    def _encoder(self, sentinel: str) -> Any:
        if sentinel not in self._tokenizers:
            self._tokenizers[sentinel] = self._without_sentinel(sentinel)
        return self._tokenizers[sentinel]

    def _without_sentinel(self, sentinel: str) -> Any:
        """Copy the fast tokenizer so that it deletes `sentinel` after matching special tokens."""
        if not self._tokenizer.is_fast:
            raise DataError(
                f"some rows spell a special token in their content, and {type(self._tokenizer)} is "
                "not a fast tokenizer, which is needed to encode it as plain text; pass "
                "special_tokens_in_content='allow' or 'error', or remove it from the rows"
            )
        backend = self._tokenizer.backend_tokenizer
        content = json.loads(backend.to_str())
        content["truncation"] = content["padding"] = None
        for token in content["added_tokens"]:
            if token["special"]:
                token["normalized"] = False
        remove: dict[str, Any] = {"type": "Replace", "pattern": {"String": sentinel}, "content": ""}
        if content["normalizer"] is not None:
            remove = {"type": "Sequence", "normalizers": [remove, content["normalizer"]]}
        content["normalizer"] = remove
        return type(backend).from_str(json.dumps(content))


def _break(text: str, sentinel: str) -> str:
    if len(text) == 1:
        raise DataError(
            f"the content holds {text!r}, which is a special token of this tokenizer and too short "
            "to be encoded as plain text; pass special_tokens_in_content='allow' or 'error'"
        )
    return text[0] + sentinel + text[1:]


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
