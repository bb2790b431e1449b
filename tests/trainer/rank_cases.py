"""What the ranks of test_ranks.py do: the cases of one group, one after another."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastdpo.modeling.loading import load_model
from fastdpo.system import ranks
from tests.tiny_trainer import ROWS, TOKENIZER, tiny_base, tiny_trainer


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


CASES = (
    Case("lora, sigmoid", "lora"),
    Case("lora, aot", "lora", {"loss_type": "aot"}),
    Case("qlora, sigmoid", "qlora"),
    Case("qlora, aot", "qlora", {"loss_type": "aot"}),
    Case("full, sigmoid", "full", {"learning_rate": 1e-4}),
    Case("full, aot", "full", {"loss_type": "aot", "learning_rate": 1e-4}),
    Case("split completions", "lora", {"most_group_tokens": 0}, 0),
    Case("weighed tokens, reference of the moment", "lora",
         {"ld_alpha": 0.3, "use_weighting": True, "ref_cache": "off"}, 0),
    Case("merged prompts", "lora", {"merge_prompts": True, "rows": ROWS[:4] * 9}, 0),
)  # fmt: skip


def save_base(folder):
    """Write the tiny model and its tokenizer, for the cases in 4 bits and for commands."""
    tiny_base().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)


def trainer_of(case, base, folder, **options):
    options = {**case.options, **options}
    split = options.pop("most_group_tokens", None)
    torch.manual_seed(ranks.index())  # a script that seeds nothing: the first rank's weights count
    model = tiny_base()
    if case.tuning == "qlora":
        model = load_model(str(base), dtype=torch.float32, load_in_4bit=True)
    trainer = tiny_trainer(
        model,
        Path(folder) / "out",
        tuning="full" if case.tuning == "full" else "lora",
        max_steps=case.updates or -1,
        held_out=None,
        **{"micro_batch_tokens": 256, "ref_cache": str(Path(folder) / "reference")} | options,
    )
    trainer.layout.most_group_tokens = split
    return trainer


def run_cases(cases, base, folder):
    """Outcome by the case's name; the numbers of updates and pairs are uneven on purpose."""
    torch.set_num_threads(1)
    found = {}
    for case in cases:
        trainer = trainer_of(case, base, Path(folder) / case.name)
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
    trainer.policy.train()
    before = vars(ranks.traffic).copy()
    result = trainer.update.run(
        [trainer.train_groups[i] for i in range(count)], ("entropy", "mean_logits", "is_top1")
    )
    traffic = ranks.Traffic(**{n: v - before[n] for n, v in vars(ranks.traffic).items()})
    return result, traffic


def fail_in_memory(base, folder):
    """Memory runs out at the first micro-batch of the last rank: what all ranks then have."""
    from fastdpo.trainer import update as update_room

    trainer = trainer_of(CASES[0], base, folder, micro_batch_tokens=4096)
    real, calls = update_room.packed_logprobs, []

    def failing(*args, **kwargs):
        calls.append(0)
        if ranks.index() == ranks.count() - 1 and len(calls) == 1:
            raise RuntimeError("CUDA out of memory")
        return real(*args, **kwargs)

    update_room.packed_logprobs = failing
    result, _ = one_update(trainer)
    return result.loss, trainer.layout.micro_batch_tokens


def die(number):
    os.kill(os.getpid(), number)
