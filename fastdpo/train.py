"""`python -m fastdpo.train`: align a model with preference pairs; without arguments, a demo."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdpo.cli.parser import Parsed, command, parse
from fastdpo.options import (
    DataOptions,
    ModelOptions,
    TrainOptions,
    presets,
)
from fastdpo.system.console import say, table
from fastdpo.trainer.from_options import (
    make_trainer,
    run,
    without_output,
)

if TYPE_CHECKING:
    from fastdpo.evaluation import Evaluation
    from fastdpo.trainer import DPOTrainer


def main(argv: Sequence[str]) -> None:
    """Parse and train; the demo if there is nothing to parse."""
    if not argv:
        demonstrate(Path("fastdpo-demo"))
        return
    parsed = parse(
        "train",
        [ModelOptions, DataOptions, TrainOptions],
        argv,
        training=True,
        description="Align a model with preference pairs by Direct Preference Optimization.",
    )
    if parsed.group(TrainOptions).dry_run:
        with without_output(parsed.training):
            show(make_trainer(parsed.model, parsed.data, parsed.training), parsed)
    else:
        run(parsed.model, parsed.data, parsed.training)


def demonstrate(folder: Path) -> "Evaluation":
    """The embedded default: make a tiny model and pairs in `folder`, align it, show the change."""
    from fastdpo.batching import PairGroups
    from fastdpo.config import DPOConfig
    from fastdpo.demo import make_demo
    from fastdpo.evaluation import Completion, complete, evaluate_scored, score_both
    from fastdpo.modeling.loading import load_tokenizer

    say("No arguments: the demo. It makes a tiny Llama, teaches it a small language, lets it write")
    say("answers, and aligns it with preferences between them. --help shows the options.\n")
    demo = make_demo(folder, report=say)
    model = ModelOptions(model_name_or_path=str(demo.model_dir), lora=True)
    data = DataOptions(dataset_name=str(demo.train_file), eval_dataset=str(demo.dev_file))
    config = DPOConfig(
        str(folder / "adapter"),
        per_device_train_batch_size=32,
        num_train_epochs=2,
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        eval_strategy="epoch",
        save_strategy="no",
        activation_checkpointing=False,
        ref_cache=str(folder / "reference"),
    )
    trainer = run(model, data, config)
    tokenizer = load_tokenizer(str(demo.model_dir))
    prompt = np.array(tokenizer(demo.prompt).input_ids)
    assert isinstance(trainer.eval_groups, PairGroups), "one held-out set"
    policy, reference = score_both(
        trainer.policy, trainer.eval_groups, micro_batch_tokens=trainer.update.micro_batch_tokens
    )
    completion = Completion(
        demo.prompt,
        *complete(trainer.policy, tokenizer, [prompt], max_new_tokens=64, reference=True),
        *complete(trainer.policy, tokenizer, [prompt], max_new_tokens=64),
    )
    evaluation = evaluate_scored(policy, reference, beta=config.beta, completions=[completion])
    say(f"\n{evaluation.describe()}")
    say(
        "\nBefore training policy and reference are one: largest margin of the first update "
        f"{trainer.first_update_margin} nats."
    )
    return evaluation


def show(trainer: "DPOTrainer", parsed: Parsed) -> None:
    """What a run with these options would do: the options, the layout, and three pairs.

    The options are those that the user gave and those that the command sets, as they stand now.
    """
    from fastdpo.data import show_pairs
    from fastdpo.planner.terms import binary_size

    groups = trainer.train_groups
    assert groups is not None, "the command reads one"
    shown = parsed.given | set(presets(dict.fromkeys(parsed.given))) - {"dry_run"}
    for options in (asdict(parsed.model), asdict(parsed.data), vars(trainer.user_args)):
        for name in sorted(shown & set(options)):
            if options[name] is not None:
                say(f"--{name} {_written(options[name])}")
    if trainer.plan is not None:
        terms = {**trainer.plan.terms, "all": trainer.plan.peak_bytes}
        rows = [(name, binary_size(size)) for name, size in terms.items() if size]
        say("\n" + table(("planned memory, highest moment", "bytes"), rows))
    updates = -(-len(groups) // trainer.pairs_per_update)
    say(
        f"\n{len(groups):,} pairs, {trainer.pairs_per_update} an update: {updates:,} updates an "
        f"epoch, in micro-batches of at most {trainer.update.micro_batch_tokens:,} tokens.\n"
    )
    say(show_pairs(groups.pairs, trainer.tokenizer))


def _written(value: Any) -> str:
    """As the command line takes it."""
    if isinstance(value, list | tuple):
        return " ".join(map(_written, value)) or "none"
    return str(value.value if isinstance(value, Enum) else value)


if __name__ == "__main__":
    sys.exit(command(main))
