"""Peak memory of one update against the length of a pair, and the longest pair that fits a card.

The peak is above what the built trainer holds; each figure comes from a process of its own. For the
longest pair a trainer is given one pair an update, each longer than the one before, under a bound
of its memory, until it fails: on CUDA the card's size, weights and all, on the CPU so much above
the built trainer.
"""

from collections.abc import Mapping
from typing import Any

import torch

from bench.contest import contest, solo
from bench.harness import MEASURED, OUT_OF_MEMORY, Recorder
from bench.step import CONTENDERS, TRAINER

UPDATES = 2
"""The first brings the optimizer's state, the second is like all others."""

LADDER_START_TOKENS = {"cpu": 64, "cuda": 1024}
LADDER_STEP = 1.19
"""Each pair of the ladder is so much longer: four steps double it; a quick ladder only doubles."""


def peak(recorder: Recorder, case: Mapping[str, Any], contenders: tuple[str, ...]) -> None:
    """Peak memory at one length, each contender in a fresh process."""
    run = {"updates": UPDATES + 1, "rows": (UPDATES + 1) * case["pairs"]}
    results = contest(
        dict.fromkeys(contenders, TRAINER),
        {name: {**case, **run, **CONTENDERS[name]} for name in contenders},
        warm_up=0,
        rounds=UPDATES,
        alone=case["device"] == "cuda",
    )
    for name, result in results:
        if result.outcome != MEASURED:
            recorder.add(case, name, "peak_mib", outcome=result.outcome, note=result.note)
            continue
        for metric in ("peak_mib", "peak_reserved_mib"):
            if metric in result.turns[-1]:
                recorder.add(case, name, metric, [result.turns[-1][metric]])


def longest(
    recorder: Recorder,
    case: Mapping[str, Any],
    contenders: tuple[str, ...],
    *,
    most_tokens: int,
    step: float,
) -> None:
    """The longest pair, prompt and both completions, that one update of one pair can take."""
    ladder = [LADDER_START_TOKENS[case["device"]]]
    while ladder[-1] < most_tokens:
        ladder.append(int(ladder[-1] * step) // 4 * 4)
    run = {"pairs": 1, "rows": len(ladder), "updates": len(ladder), "ladder_tokens": ladder}
    for name in contenders:
        settings = CONTENDERS[name] | {"accumulation": 1}
        result = solo(TRAINER, {**case, **run, **settings}, turns=len(ladder))
        survived = len(result.turns)
        if survived == 0:
            recorder.add(
                case, name, "longest_pair_tokens", outcome=result.outcome, note=result.note
            )
            continue
        ended = (
            result.note if result.outcome == OUT_OF_MEMORY else f"ended otherwise: {result.note}"
        )
        if survived == len(ladder):
            ended = "the whole ladder fits: a lower bound"
        tokens = ladder[survived - 1]
        recorder.add(case, name, "longest_pair_tokens", [tokens], note=ended[:120])


def main(recorder: Recorder, *, quick: bool) -> None:
    """The longest pair by card, then peaks against length; the most telling first."""
    common: dict[str, Any] = {"tuning": "lora", "checkpointing": True}
    contenders, pairs = ("fastdpo", "trl", "trl accumulation 4"), 4
    if torch.cuda.is_available():
        common |= {"model": "1b", "dtype": "bfloat16", "device": "cuda"}
        lengths, cards_gib, most_tokens = (4096, 1024, 16384), (24, 8, 48, 12, 80, 16), 100_000
    else:
        common |= {"model": "small", "dtype": "float32", "device": "cpu", "threads": 1}
        lengths, cards_gib, most_tokens = (256, 512, 1024, 2048), (0.3, 0.6, 1.2), 16_000
    step = LADDER_STEP
    if quick:  # TRL with one pair at a time, the most frugal there is
        contenders, pairs = ("fastdpo", "trl accumulation 2"), 2
        lengths, cards_gib, most_tokens, step = (256, 1024), (0.3,), 2048, 2.0
    for card_gib in cards_gib:
        case = {**common, "card_gib": card_gib}
        longest(recorder, case, ("fastdpo", "trl"), most_tokens=most_tokens, step=step)
    for tokens in lengths:
        peak(recorder, {**common, "pairs": pairs, "pair_tokens": tokens}, contenders)


if __name__ == "__main__":
    from bench.command import run

    run("memory")
