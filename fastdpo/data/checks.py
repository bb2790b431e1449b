"""Warnings about a prepared set of pairs: copies, a length bias, many over-long rows."""

from collections.abc import Callable

import numpy as np

from fastdpo.data.pairs import OVER_LONG_PROMPT, PairDataset
from fastdpo.data.row_keys import KEY_BYTES

BIAS_SHARE = 0.8
OVER_LONG_SHARE = 0.05
_BIAS_FROM_PAIRS = 50


def check_pairs(pairs: PairDataset, where: Callable[[int], str]) -> list[str]:
    """Describe a prepared set in plain sentences: its mean lengths, and a warning for each oddity.

    Args:
        pairs: at least one, with their report.
        where: gives the place of a row, as in "pairs.jsonl:17", for examples.
    """
    return [
        *_copies(pairs, where),
        *_lengths(pairs),
        *_scored(pairs),
        *_over_long(pairs),
    ]


def _copies(pairs: PairDataset, where: Callable[[int], str]) -> list[str]:
    """Return a warning if some pairs have exactly the tokens of an earlier pair."""
    both = np.ascontiguousarray(pairs.keys).view(f"S{2 * KEY_BYTES}")[:, 0]
    _, firsts, counts = np.unique(both, return_index=True, return_counts=True)
    copies = len(pairs) - len(counts)
    if not copies:
        return []
    times = int(counts.max())
    first = int(firsts[counts == times].min())
    place = where(pairs[first].row).removeprefix(pairs.report.source).strip()
    place = f"line {place[1:]}" if place.startswith(":") else place
    return [
        f"warning: {copies:,} pairs are copies of earlier ones (that of {place} is there "
        f"{times:,} times) and count as often"
    ]


def _lengths(pairs: PairDataset) -> list[str]:
    """Return the mean lengths in tokens, and a warning where chosen is nearly always longer."""
    lengths = pairs.lengths
    means = ", ".join(f"{name} {tokens.mean():.0f}" for name, tokens in lengths._asdict().items())
    longest = int((lengths.prompt + np.maximum(lengths.chosen, lengths.rejected)).max())
    lines = [f"mean tokens: {means}; longest prompt with completion {longest:,}"]
    chosen, rejected = pairs.scored_tokens.T
    for name, longer in (("longer", chosen > rejected), ("shorter", chosen < rejected)):
        if longer.mean() > BIAS_SHARE and len(pairs) >= _BIAS_FROM_PAIRS:
            lines.append(
                f"warning: chosen is the {name} completion in {longer.mean():.0%} of the pairs, so "
                f"the policy may learn to be {'long' if name == 'longer' else 'brief'}; watch "
                "lengths/*, or try --loss_type sigmoid_norm"
            )
    return lines


def _scored(pairs: PairDataset) -> list[str]:
    """Return the share of completion tokens that is scored, where completions have many turns."""
    rows = pairs.report.rows_of_turns
    if not rows:
        return []
    share = pairs.scored_tokens.sum() / sum(tokens.sum() for tokens in pairs.lengths[1:])
    turns = f"{rows:,} rows have completions of several turns"
    if not pairs.masks:
        return [f"{turns}; 100% of the completion tokens are scored, whoever wrote them"]
    return [f"{turns}; {share:.1%} of the completion tokens are scored, those of the assistant"]


def _over_long(pairs: PairDataset) -> list[str]:
    dropped = pairs.report.dropped.get(OVER_LONG_PROMPT)
    if dropped is None or dropped.count <= OVER_LONG_SHARE * pairs.report.rows_read:
        return []
    share = dropped.count / pairs.report.rows_read
    return [
        f"warning: {share:.0%} of the rows are lost to max_length; raise it, or pass "
        "max_prompt_length or truncation_mode keep_completion to cut their prompts instead"
    ]
