"""Ready-made text: whether it is text at all, and whether an instruct model would know it."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastdpo.data.errors import DataError
from fastdpo.data.special_tokens import SpecialTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "qprobex"


class ReadyMadeText:
    """Tells ready-made rows that hold nothing of what the model's chat template would write.

    An instruct model given a bare question as ready-made text answers out of its format, which is
    rarely meant, and no error.

    Args:
        tokenizer: without a chat template there is nothing to look for.
        special_tokens: the tokenizer's.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", special_tokens: SpecialTokens):
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self._mark: str | None = None

    def is_bare(self, prompt: str, parts: list[str]) -> bool:
        """True where a row has nothing of it; `parts` are its texts without the BOS and EOS."""
        if self._mark is None:
            self._mark = self._what_follows_a_question()
        marked = bool(self._mark) and self._mark in prompt
        return not marked and self._special_tokens.find(parts) is None

    def _what_follows_a_question(self) -> str:
        """Return what the template writes between a question and its answer, "" where unknown."""
        turns = [{"role": "user", "content": _PROBE}]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # a template is foreign code and may raise anything
            return ""
        return str(text).rpartition(_PROBE)[2].strip()


def bare_text(rows: int, bare: int) -> list[str]:
    """The warning, if every row of ready-made text was bare."""
    if not rows or bare < rows:
        return []
    return [
        "warning: the tokenizer has a chat template, and the rows are ready-made text without "
        "any of its special tokens, so the model is trained out of its format; if prompts are "
        "questions, pass --columns question=prompt, which renders them by the template "
        '(columns={"question": "prompt"} from Python)'
    ]


def check_is_text(texts: Iterable[str]) -> None:
    """Refuse half of a surrogate pair, which a Python string may hold and no tokenizer takes.

    Raises:
        DataError: it names the character.
    """
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise DataError(
                f"a text holds \\u{code:04x}, half of a surrogate pair, which is no character; "
                "write the character itself, or remove it"
            ) from error
