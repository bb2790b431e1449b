"""`python -m fastdpo.train`: align a model with preference pairs; without arguments, a demo."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdpo.cli.outputs import require_new_folder
from fastdpo.cli.parser import Parsed, command, parse
from fastdpo.demo.run import demonstrate
from fastdpo.options import DataOptions, ModelOptions, presets
from fastdpo.options.checks import Options, option
from fastdpo.system import ranks
from fastdpo.system.console import print_line, table
from fastdpo.trainer.from_options import (
    make_trainer,
    resume_of,
    run,
    without_output,
)

if TYPE_CHECKING:
    from fastdpo.trainer import DPOTrainer


@dataclass
class TrainOptions(Options):
    """The options that `python -m fastdpo.train` has besides those of training."""

    _argument_group_name = "This command"

    dry_run: bool = option(
        False,
        "Read, check and tokenise everything, print the options, the layout, on a CUDA GPU the "
        "memory plan, and three pairs, and stop before the first update.",
    )


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
    ranks.first_does(lambda: require_new_folder(parsed, Path(str(parsed.training.output_dir))))
    if parsed.group(TrainOptions).dry_run:
        with without_output(parsed.training) as config:
            trainer = make_trainer(parsed.model, parsed.data, config)
            show(trainer, parsed)
            trainer.check_start(
                Path(str(parsed.training.output_dir)),
                resume_of(parsed.training.resume_from_checkpoint),
            )
    else:
        run(parsed.model, parsed.data, parsed.training)


def show(trainer: "DPOTrainer", parsed: Parsed) -> None:
    """Print what a run with these options would do: the options, the layout, and three pairs.

    The options are those that the user gave and those that the command sets, as they stand now.
    """
    from fastdpo.data import legend, show_pairs
    from fastdpo.planner.terms import binary_size

    groups = trainer.train_groups
    assert groups is not None, "the command reads one"
    shown = parsed.explicit | set(presets(dict.fromkeys(parsed.explicit))) - {"dry_run"}
    training = vars(trainer.user_args) | {"output_dir": parsed.training.output_dir}
    for options in (asdict(parsed.model), asdict(parsed.data), training):
        for name in sorted(shown & set(options)):
            if options[name] is not None:
                print_line(f"--{name} {_written(options[name])}")
    if trainer.plan is not None:
        terms = {**trainer.plan.terms, "all": trainer.plan.peak_bytes}
        rows = [(name, binary_size(size)) for name, size in terms.items() if size]
        print_line("\n" + table(("planned memory, highest moment", "bytes"), rows))
    updates = len(trainer.sets.sampler())
    print_line(
        f"\n{len(groups):,} pairs, {trainer.pairs_per_update} an update: {updates:,} updates an "
        f"epoch, in micro-batches of at most {trainer.layout.micro_batch_tokens:,} tokens.\n"
    )
    print_line(legend(), colored=True)
    print_line()
    print_line(show_pairs(groups.pairs, trainer.tokenizer), colored=True)


def _written(value: Any) -> str:
    """Return a value as the command line takes it."""
    if isinstance(value, list | tuple):
        return " ".join(map(_written, value)) or "none"
    return str(value.value if isinstance(value, Enum) else value)


if __name__ == "__main__":
    sys.exit(command(main))
