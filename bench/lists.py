"""All pairs of k rated completions: each completion once, against once for every pair that has it.

Contenders do the same update and the same reference pass of the same pairs, and differ in what they
take for the work: "fastdpo" the distinct completions of each list; "pair by pair" every pair with
both of its completions; "prompts shared" these too, laid out beside one prompt. `completion_tokens`
are the inputs of one forward that lie behind the prompts.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bench.contest import Turns, contest
from bench.harness import MEASURED, SEED, Recorder
from bench.measuring import Stopwatch

CONTENDERS = ("fastdpo", "pair by pair", "prompts shared")
WARM_UP, ROUNDS = 1, 7
METRICS = (
    "update_s", "update_cpu_s", "reference_s",
    "update_completion_tokens", "reference_completion_tokens",
)  # fmt: skip


def rated_rows(case: Mapping[str, Any], vocabulary: int) -> list[dict[str, str]]:
    """All pairs of the rated completions of each of `lists` prompts, of random words."""
    draw = np.random.default_rng(SEED)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in draw.integers(3, vocabulary, count))

    rows = []
    for _ in range(case["lists"]):
        prompt = words(case["prompt_tokens"])
        completions = [f" {words(case['each_tokens'])}" for _ in range(case["completions"])]
        rows += [
            {"prompt": prompt, "chosen": better, "rejected": worse}
            for better, worse in combinations(completions, 2)
        ]
    return rows


def contend(case: Mapping[str, Any], turns: Turns) -> None:
    """An update of all pairs a turn, and the pass over them without gradients."""
    from bench.models import random_llama, word_tokenizer
    from fastdpo import DPOConfig, DPOTrainer
    from fastdpo.modeling import scoring
    from fastdpo.modeling.adapters import lora_config
    from fastdpo.trainer import update as updating

    device = case["device"]
    model = random_llama(case["model"], dtype=getattr(torch, case["dtype"]), device=device)
    rows = rated_rows(case, model.config.vocab_size)
    with TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model,
            args=DPOConfig(
                output_dir=folder, ref_cache=f"{folder}/reference", max_length=None,
                use_cpu=device == "cpu", bf16=device == "cuda", save_strategy="no",
                disable_tqdm=True, report_to="none",
                micro_batch_tokens=case["micro_batch_tokens"],
                per_device_train_batch_size=len(rows),
            ),
            train_dataset=rows,
            processing_class=word_tokenizer(model.config.vocab_size),
            peft_config=lora_config(16, 32, 0.0, None),
        )  # fmt: skip
        draw = torch.Generator(device).manual_seed(SEED)
        for name, parameter in trainer.policy.named_parameters():
            if "lora_B" in name:  # else the first gradient is one of this half alone
                parameter.data.normal_(0, 0.02, generator=draw)
        trainer.on_before_train()
        trainer.policy.train()
        groups = list(trainer.train_groups or [])
        one_by_one = _gradient(trainer, [[group] for group in groups])
        if case["contender"] != "fastdpo":
            for room in (updating, scoring):
                room.distinct_items = _items_of(case["contender"])
        whole = _gradient(trainer, [groups])
        error = float((whole - one_by_one).norm() / one_by_one.norm())
        computed: list[int] = []
        for room in (updating, scoring):
            _count_completion_tokens(room, computed, prompt=len(groups[0].prompt_ids))
        turns.ready({"gradient_relative": error})
        watch = Stopwatch(torch.device(device))
        # What the pass leaves out by itself: pairs whose completions all lie in earlier ones.
        first = [g for i, g in enumerate(groups) if _has_news(g, groups[:i])]
        for _ in turns:
            computed.clear()
            taken = watch.measure(lambda: trainer.update.run(groups))
            trainer.policy.zero_grad()
            figures = {"update_s": taken["wall_s"], "update_cpu_s": taken["cpu_s"]}
            figures["update_completion_tokens"] = sum(computed)
            computed.clear()
            taken = watch.measure(
                lambda: list(scoring.score_groups(trainer.policy, first, trainer.layout))
            )
            figures["reference_s"] = taken["wall_s"]
            figures["reference_completion_tokens"] = sum(computed)
            turns.answer(figures)


def _items_of(contender: str) -> Any:
    """What `distinct_items` would be if it did not look for completions that pairs share."""
    from fastdpo.batching import lists_of
    from fastdpo.modeling.layout import WorkItem

    def items(groups: Sequence[Any]) -> tuple[list[Any], list[tuple[int, ...]]]:
        lists = lists_of(groups).tolist()
        names = lists if contender == "prompts shared" else range(len(groups))
        held = [(2 * index, 2 * index + 1) for index in range(len(groups))]
        parts = zip(groups, names, held, strict=True)
        return [WorkItem(group, name, its) for group, name, its in parts], held

    return items


def _gradient(trainer: Any, updates: Sequence[Sequence[Any]]) -> torch.Tensor:
    """The mean gradient of some updates, flat, float64."""
    total = torch.zeros((), dtype=torch.float64)
    for groups in updates:
        trainer.update.run(groups)
        parts = [p.grad.flatten() for p in trainer.policy.parameters() if p.grad is not None]
        total = total + torch.cat(parts).double().cpu() / len(updates)
        trainer.policy.zero_grad()
    return total


def _count_completion_tokens(room: Any, computed: list[int], *, prompt: int) -> None:
    real = room.packed_logprobs

    def counted(model: Any, micro_batch: Any, *others: Any, **named: Any) -> Any:
        prompts = sum(bool(segment.suffix_tokens) for segment in micro_batch.segments)
        computed.append(micro_batch.num_tokens - prompt * prompts)
        return real(model, micro_batch, *others, **named)

    room.packed_logprobs = counted


def _has_news(group: Any, before: Sequence[Any]) -> bool:
    known = {digest for each in before for digest in each.digests()}
    return not known.issuperset(group.digests())


def main(recorder: Recorder, *, quick: bool) -> None:
    """Of 4 and of 7 completions."""
    common: dict[str, Any] = {"prompt_tokens": 128, "each_tokens": 96, "micro_batch_tokens": 2048}
    if torch.cuda.is_available():
        common |= {"model": "1b", "dtype": "bfloat16", "device": "cuda"}
    else:
        common |= {"model": "tiny" if quick else "small", "dtype": "float32", "device": "cpu"}
        common |= {"threads": 1}
    for completions, lists in ((4, 2), (7, 1)):
        case = {**common, "completions": completions, "lists": lists}
        case["pairs"] = lists * completions * (completions - 1) // 2
        functions = dict.fromkeys(CONTENDERS, "bench.lists:contend")
        given = {name: {**case, "contender": name} for name in CONTENDERS}
        alone = case["device"] == "cuda"
        rounds = 3 if quick else ROUNDS
        for name, result in contest(functions, given, warm_up=WARM_UP, rounds=rounds, alone=alone):
            if result.outcome != MEASURED:
                recorder.add(case, name, "update_s", outcome=result.outcome, note=result.note)
                continue
            recorder.add(case, name, "gradient_relative", [result.facts["gradient_relative"]])
            for metric in METRICS:
                recorder.add(case, name, metric, result.column(metric))


if __name__ == "__main__":
    from bench.command import run

    run("lists")
