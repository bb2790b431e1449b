"""Showing a few prepared pairs: which text is prompt, chosen and rejected, and what was cut."""

import os
import sys
from typing import TYPE_CHECKING

import numpy as np

from fastdpo.data.pairs import Pair, PairDataset
from fastdpo.system.console import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_LETTERS = 800
_COLORS = {"prompt": "36", "chosen": "32", "rejected": "31", "cut": "7", "shared": "2"}


def show_pairs(
    pairs: PairDataset,
    tokenizer: "PreTrainedTokenizerBase",
    n: int = 3,
    color: bool | None = None,
) -> str:
    """Render pairs as the model sees them, special tokens included.

    Args:
        pairs: at least one.
        tokenizer: that made them.
        n: how many, spread evenly over the set.
        color: use ANSI colors; None: where standard output is a terminal and NO_COLOR is unset.

    Returns:
        Lines: the prompt once, then both completions; `[cut]` where tokens were lost to a length
        limit, `||` where the completions part. The middle of long texts is left out.
    """
    shown = np.unique(np.linspace(0, len(pairs) - 1, max(1, min(n, len(pairs)))).astype(int))
    show = _Shown(tokenizer, _uses_color(color))
    return "\n\n".join(
        f"pair {index + 1:,} of {len(pairs):,} (row {pairs[index].row})\n{show.pair(pairs[index])}"
        for index in shown.tolist()
    )


def legend(color: bool | None = None) -> str:
    """One line on the marks of `show_pairs`, and on its colors where it uses them.

    Args:
        color: as `show_pairs` takes it.
    """
    show = _Shown(None, _uses_color(color))
    names = ", ".join(show._paint(name, name) for name in ("prompt", "chosen", "rejected"))
    common = show._paint("what both begin with", "shared")
    return (
        f"In each pair: {names}; || ends {common}; {show._paint('[cut]', 'cut')} stands where "
        "tokens were lost to a length limit."
    )


def _uses_color(color: bool | None) -> bool:
    """Resolve None: colors on a terminal where NO_COLOR is unset."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ if color is None else color


class _Shown:
    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None", color: bool):
        self._tokenizer = tokenizer
        self._color = color

    def pair(self, pair: Pair) -> str:
        chosen, rejected = pair.completions
        shorter = min(len(chosen), len(rejected))
        differ = np.flatnonzero(chosen[:shorter] != rejected[:shorter])
        shared = int(differ[0]) if len(differ) else shorter
        lines = [self._line("prompt", pair.prompt_ids, 0, pair.cut[0])]
        names = ("chosen", "rejected")
        for name, ids, scored, cut in zip(
            names, pair.completions, pair.scored_tokens, pair.cut[1:], strict=True
        ):
            lines.append(self._line(name, ids, shared, cut, scored))
        return "\n".join(lines)

    def _line(
        self, name: str, ids: np.ndarray, shared: int, cut: bool, scored: int | None = None
    ) -> str:
        """Return a part's name and length, then its text, indented."""
        text = self._paint(self._text(ids[shared:]), name)
        if shared:
            text = f"{self._paint(self._text(ids[:shared]), f'{name} shared')}||{text}"
        if cut:
            mark = self._paint("[cut]", "cut")
            text = f"{mark} {text}" if name == "prompt" else f"{text} {mark}"
        of_them = "" if scored in (None, len(ids)) else f", {scored:,} of them scored"
        label = self._paint(f"{name}, {len(ids):,} tokens{of_them}:", name)
        return f"  {label}\n    " + text.replace("\n", "\n    ")

    def _text(self, ids: np.ndarray) -> str:
        assert self._tokenizer is not None, "there are pairs to show"
        text = self._tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
        text = printable(str(text))
        if len(text) <= MOST_LETTERS:
            return text
        half = MOST_LETTERS // 2
        return f"{text[:half]}[... {len(text) - 2 * half:,} letters ...]{text[-half:]}"

    def _paint(self, text: str, kinds: str) -> str:
        if not self._color:
            return text
        codes = ";".join(_COLORS[kind] for kind in kinds.split())
        return f"\033[{codes}m{text}\033[0m"
