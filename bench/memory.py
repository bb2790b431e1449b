"""Peak memory of one update against the length of a pair, and the longest pair that fits a card.

The peak is above what the built trainer holds; each figure comes from a process of its own. For the
longest pair a trainer is given one pair an update, each longer than the one before, under a bound
of its memory, until it fails: on CUDA the card's size, weights and all, on the CPU so much above
the built trainer.

Before that come updates of 7B and 8B models by QLoRA on cards of given sizes, at the lengths that
are aimed at: ours as its memory plan says, with the plan's prediction beside it, and TRL.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench.contest import contest, solo
from bench.harness import MEASURED, OUT_OF_MEMORY, Recorder
from bench.step import CONTENDERS, TRAINER
from fastdpo.modeling.activations import ACTIVATIONS
from fastdpo.planner.terms import CONTEXT_BYTES

UPDATES = 2
"""The first brings the optimizer's state, the second is like all others."""

LADDER_START_TOKENS = {"cpu": 64, "cuda": 1024}
LADDER_STEP = 1.19
"""Each pair of the ladder is so much longer: four steps double it; a quick ladder only doubles."""


QLORA = "bench.qlora:contend"

AIMS = (
    ("llama-3.1-8b", 8, 2048),
    ("llama-2-7b", 8, 4096),
    ("llama-3.1-8b", 24, 40960),
    ("llama-3.1-8b", 12, 8192),
    ("llama-2-7b", 6, 1024),
    ("llama-3.1-8b", 16, 16384),
)
"""Model, card in GiB, and L of the pair 2 x L that should fit it; the most telling first."""

TRL_AT = {("llama-3.1-8b", 24): 4096}
"""Where TRL, beside being asked for the same, is asked for less, to have a figure at all."""

TOY = {
    "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 8,
}  # fmt: skip


def aim(recorder: Recorder, case: Mapping[str, Any], *, with_trl: bool) -> None:
    """One pair of 2 x L on one card, a few updates: ours with its plan, then TRL."""
    result = solo(QLORA, case, turns=UPDATES)
    if "predicted_mib" in result.facts:
        made = result.facts["plan"]
        note = f"T {made['micro_batch_tokens']}, {made['optimizer']}, " + ", ".join(
            f"{made['activation_plan'].count(what)} {what}" for what in ACTIVATIONS
        )
        recorder.add(case, "plan", "peak_mib", [result.facts["predicted_mib"]], note=note)
    if len(result.turns) == UPDATES:
        recorder.add(case, "fastdpo planned", "peak_mib", result.column("peak_mib"))
        recorder.add(case, "fastdpo planned", "update_s", result.column("wall_s")[1:])
    else:
        outcome, note = result.outcome, result.note
        recorder.add(case, "fastdpo planned", "peak_mib", outcome=outcome, note=note)
    lengths = [case["row_tokens"], *([TRL_AT[key]] if (key := _aim_of(case)) in TRL_AT else [])]
    for seq_lens in lengths if with_trl else []:
        requested = {**case, "row_tokens": seq_lens}
        run = {"pairs": 1, "accumulation": 1, "tuning": "lora", "checkpointing": True}
        run |= {"library": "trl", "updates": UPDATES + 1, "rows": UPDATES + 1}
        run |= {"load_in_4bit": True, "pair_tokens": 2 * seq_lens}
        run |= {"card_gib": case["card_gib"] - CONTEXT_BYTES / 2**30}
        result = solo(TRAINER, {**requested, **run}, turns=UPDATES)
        if len(result.turns) == UPDATES:
            # Ours is the whole card's, weights and all; a trainer's is above what it began with.
            metric = "peak_reserved_mib" if "peak_reserved_mib" in result.turns[-1] else "peak_mib"
            recorder.add(requested, "trl 4-bit", metric, [result.turns[-1][metric]])
            recorder.add(requested, "trl 4-bit", "update_s", result.column("wall_s")[1:])
        else:
            recorder.add(
                requested, "trl 4-bit", "peak_mib", outcome=result.outcome, note=result.note
            )


def _aim_of(case: Mapping[str, Any]) -> tuple[str, int]:
    return case["model"], case["card_gib"]


def aims(recorder: Recorder, chosen: Sequence[tuple[str, int, int]] = AIMS) -> None:
    """Every aim on this card; on the CPU a toy, so that all of it is run."""
    if not torch.cuda.is_available():
        case = {"model": "llama-2-7b", "row_tokens": 100, "card_gib": 1, "dtype": "float32"}
        aim(recorder, {**case, "device": "cpu", "config": TOY}, with_trl=False)
        return
    memory = torch.cuda.get_device_properties(0).total_memory
    for model, card_gib, seq_lens in chosen:
        if card_gib * 2**30 <= memory * 1.02:
            case = {"model": model, "row_tokens": seq_lens, "card_gib": card_gib}
            aim(recorder, {**case, "dtype": "bfloat16", "device": "cuda"}, with_trl=True)


def peak(recorder: Recorder, case: Mapping[str, Any], contenders: tuple[str, ...]) -> None:
    """Peak memory at one length, each contender in a fresh process."""
    contenders = tuple(name for name in contenders if not recorder.has(case, name, "peak_mib"))
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
        if recorder.has(case, name, "longest_pair_tokens"):
            continue
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
    """The aims, the longest pair by card, then peaks against length; the most telling first."""
    aims(recorder)
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
