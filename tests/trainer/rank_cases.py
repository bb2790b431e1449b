"""What the ranks of test_ranks.py do: the cases of one group, one after another."""

import importlib
import json
import os
import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from fastdpo.cli.parser import command
from fastdpo.modeling import scoring
from fastdpo.modeling.loading import load_model
from fastdpo.modeling.scoring import score_pairs
from fastdpo.ref_cache import compute
from fastdpo.system import ranks
from fastdpo.trainer import update as update_room
from fastdpo.trainer.checkpoint import require_same_on_ranks
from tests.tiny_trainer import HELD_OUT, ROWS, TOKENIZER, tiny_base, tiny_trainer


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        name: in the messages.
        tuning: lora, qlora or full.
        options: of the trainer.
        updates: how many to train.
    """

    name: str
    tuning: str
    options: dict = field(default_factory=dict)
    updates: int = 20


@dataclass(eq=False)
class Outcome:
    """What one rank has at the end of a case."""

    gradient: dict  # of one update of 7 pairs, before training
    result: object  # of that update
    without: list  # trained parameters without a gradient
    weights: dict
    logs: list
    traffic: ranks.Traffic  # of one update


LISTS = [
    {"prompt": row["prompt"], "chosen": better, "rejected": worse}
    for row, other in zip(ROWS[::2], ROWS[1::2], strict=False)
    for better, worse in (
        (row["chosen"], row["rejected"]),
        (row["chosen"], other["rejected"]),
        (row["rejected"], other["rejected"]),
    )
]
"""Three pairs of three completions of each prompt."""

AOT, FULL = {"loss_type": "aot"}, {"learning_rate": 1e-4}
CASES = (
    Case("lora, sigmoid", "lora"),
    Case("lora, aot", "lora", AOT),
    Case("qlora, aot", "qlora", AOT),
    Case("qlora, sigmoid", "qlora"),
    Case("full, sigmoid", "full", FULL),
    Case("full, aot", "full", AOT | FULL),
    Case("split completions", "lora", {"most_group_tokens": 0}, 0),
    Case("a rank without a pair", "lora", {"most_group_tokens": 0, "rows": ROWS[:1]}, 0),
    Case("lists of three pairs", "lora", {"rows": LISTS}, 0),
    Case("weighed tokens, reference of the moment", "lora",
         {"ld_alpha": 0.3, "use_weighting": True, "ref_cache": "off"}, 0),
)  # fmt: skip


def save_inputs(folder):
    """Write what the commands read: the tiny model with its tokenizer, and pairs."""
    tiny_base().save_pretrained(folder / "my-model")
    TOKENIZER.save_pretrained(folder / "my-model")
    for name, rows in (("pairs", ROWS), ("held_out", HELD_OUT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def trainer_of(case, inputs, folder, **options):
    options = {**case.options, **options}
    split = options.pop("most_group_tokens", None)
    model = tiny_base()
    if case.tuning == "qlora":
        model = load_model(str(inputs / "my-model"), dtype=torch.float32, load_in_4bit=True)
    trainer = tiny_trainer(
        model,
        folder / "out",
        tuning="full" if case.tuning == "full" else "lora",
        max_steps=case.updates or -1,
        **{
            "held_out": None,
            "micro_batch_tokens": 256,
            "ref_cache": str(folder / "reference"),
            "first_margin": "warn",
        }
        | options,
    )
    trainer.layout.most_group_tokens = split
    return trainer


def run_cases(cases, inputs, folder):
    """Outcome by the case's name; the numbers of updates and pairs are uneven on purpose."""
    found = {}
    for case in cases:
        trainer = trainer_of(case, inputs, folder / case.name)
        result, traffic = one_update(trainer)
        trained = {n: p for n, p in trainer.policy.named_parameters() if p.requires_grad}
        gradient = {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
        trainer.policy.zero_grad()
        if case.updates:
            trainer.train()
        found[case.name] = Outcome(
            gradient,
            result,
            sorted(trained.keys() - gradient.keys()),
            {name: parameter.detach().clone() for name, parameter in trained.items()},
            trainer.state.log_history,
            traffic,
        )
    return found


def one_update(trainer, count=7):
    """The result of an update of the first pairs, whose gradient stays, and its traffic."""
    trainer.on_before_train()
    move(trainer.policy)
    trainer.policy.train()
    before = vars(ranks.traffic).copy()
    groups = [trainer.train_groups[i] for i in range(min(count, len(trainer.train_groups)))]
    result = trainer.update.run(groups, ("entropy", "mean_logits", "is_top1"))
    return result, ranks.Traffic(**{n: v - before[n] for n, v in vars(ranks.traffic).items()})


def move(policy):
    """Make the policy another model than its reference, so that every pair has its own margin."""
    moved = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=moved)


def run_out_of_memory(inputs, folder):
    """Memory runs out at a forward of the last rank: the update's loss, and the layout then."""
    found = []
    for loss_type, at in (("sigmoid", 1), ("aot", 1), ("aot", 2)):
        case = Case("", "lora", {"loss_type": loss_type})
        trainer = trainer_of(case, inputs, folder / f"{loss_type}{at}", micro_batch_tokens=4096)
        calls, real = [], update_room.packed_logprobs

        def failing(*args, calls=calls, real=real, at=at, **options):
            calls.append(0)
            if ranks.index() == ranks.count() - 1 and len(calls) == at:
                raise RuntimeError("CUDA out of memory")
            return real(*args, **options)

        update_room.packed_logprobs = failing
        try:
            result, _ = one_update(trainer)
        finally:
            update_room.packed_logprobs = real
        found.append((float(result.loss), trainer.layout.micro_batch_tokens))
    return found


def fill_a_store(inputs, folder):
    """The log-probs of all pairs, how many groups this rank scored for it, and what is in it."""
    scored, real = [], compute.score_groups

    def counting(model, groups, **options):
        scored.append(len(groups))
        return real(model, groups, **options)

    compute.score_groups = counting
    trainer = trainer_of(Case("", "lora"), inputs, folder, held_out=HELD_OUT)
    trainer.compute_references()
    compute.score_groups = real
    logps = np.concatenate([trainer.train_groups.ref_logps, trainer.eval_groups.ref_logps])
    metrics = {n: v for n, v in trainer.evaluate().items() if "second" not in n}
    metrics.pop("eval_runtime")
    scores = score_pairs(trainer.policy, trainer.eval_groups, outputs=("entropy",))
    return logps, sum(scored), metrics, scores


def talk(inputs, folder):
    """Every function of `ranks`, with arguments that differ by rank."""
    rank = ranks.index()
    weights = torch.full((3,), float(rank))
    ranks.sent_by_first([weights])
    numbers = [torch.full((size,), 1.0 + rank) for size in (5, 70, 0, 3)]
    real, ranks.BUCKET_BYTES = ranks.BUCKET_BYTES, 64
    ranks.TensorSum(numbers).run()
    ranks.BUCKET_BYTES = real

    def refuse():
        raise FileNotFoundError(2, "No such file", "absent")

    found = {
        "first": ranks.first_does(lambda: rank),
        "gathered": ranks.gathered([rank] * rank),
        "highest": ranks.highest(10 - rank),
        "total": ranks.total(rank + 1),
        "joined": ranks.joined(torch.full((rank, 2), float(rank))).tolist(),
        "sent": weights.tolist(),
        "summed": [each.tolist() for each in numbers],
        "after": ranks.after_first(lambda: rank),
        "errors": [],
    }
    for work in (
        lambda: ranks.first_does(refuse),
        lambda: ranks.agreed(_out_of_memory_on_last),
        lambda: require_same_on_ranks({"seed": 1, "data": {"rows": rank}}),
    ):
        try:
            work()
        except (OSError, RuntimeError, ValueError) as error:
            found["errors"].append(repr(error))
    return found


def _out_of_memory_on_last():
    if ranks.index() == ranks.count() - 1:
        raise RuntimeError("CUDA out of memory")


def all_of(parts, inputs, folder):
    """The results of several functions of (inputs, folder), by name: one group does them all."""
    torch.set_num_threads(1)
    return {name: work(inputs, folder / name, *rest) for name, (work, *rest) in parts.items()}


def train_cases(inputs, folder, cases):
    return run_cases(cases, inputs, folder)


class AtEvaluation(TrainerCallback):
    """Sends a signal to one rank within the first evaluation."""

    def __init__(self, rank, number):
        self.rank, self.number = rank, number

    def on_train_begin(self, args, state, control, **_):
        real = scoring.score_groups

        def score_groups(*args, **options):
            for each in real(*args, **options):
                os.kill(os.getpid(), self.number)
                yield each

        if ranks.index() == self.rank:
            scoring.score_groups = score_groups


class AtUpdate(TrainerCallback):
    """Sends a signal to one rank at the end of an update."""

    def __init__(self, rank, update, number):
        self.rank, self.update, self.number = rank, update, number

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.update and ranks.index() == self.rank:
            os.kill(os.getpid(), self.number)


def run_command(words, folder, callback=None):
    """The exit code of `python -m` with these words, in a folder."""
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.argv = words
    if callback is not None:
        DEFAULT_CALLBACKS.append(callback)
    try:
        return command(importlib.import_module(words[0]).main)
    except SystemExit as stop:
        return stop.code
