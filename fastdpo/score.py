"""`python -m fastdpo.score`: every row of a data set with the metrics of policy and reference."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from fastdpo.cli.outputs import new_output_file
from fastdpo.cli.parser import command, parse
from fastdpo.options import (
    TRAINING_OPTIONS,
    ComparisonOptions,
    DataOptions,
    ModelOptions,
    TokenizationOptions,
)
from fastdpo.options.checks import Options, option
from fastdpo.system import ranks
from fastdpo.system.console import print_line

if TYPE_CHECKING:
    from fastdpo.evaluation.scored_rows import ScoredRows

SCORE_ENDINGS = (".jsonl", ".parquet")


@dataclass
class ScoringOptions(Options):
    """The options that say where the scored rows go and how their new columns are called."""

    _argument_group_name = "Scores"

    output_file: str | None = option(
        None,
        "File of the rows with their metrics; ends in .jsonl or .parquet. Unset: scores.jsonl, "
        "with a number behind it if there is one already.",
    )
    column_prefix: str = option(
        "",
        "Put before the names of the new columns, so that a second model's metrics fit beside "
        "the first's.",
    )

    def __post_init__(self) -> None:
        if self.output_file and PurePath(self.output_file).suffix.lower() not in SCORE_ENDINGS:
            raise ValueError(
                f"--output_file is {self.output_file!r}; its ending says the format, and it must "
                f"be one of {', '.join(SCORE_ENDINGS)}."
            )


def main(argv: Sequence[str]) -> None:
    """Parse, score, write the rows and say where they lie."""
    parsed = parse(
        "score",
        [ModelOptions, DataOptions, TokenizationOptions, ComparisonOptions, ScoringOptions],
        argv,
        training=False,
        description="Write a data set's rows with log-probs, rewards and margin of a trained "
        "model beside its reference; row i of the result is row i of the data.",
        refused=TRAINING_OPTIONS,
        shared=True,
    )
    options = parsed.group(ScoringOptions)
    output = new_output_file(parsed, options.output_file, None, "scores.jsonl")
    scored = run(
        parsed.model,
        parsed.data,
        parsed.group(TokenizationOptions),
        parsed.group(ComparisonOptions),
        output,
        prefix=options.column_prefix,
    )
    from fastdpo.evaluation.scored_rows import write_scores

    print_line(scored.describe())
    ranks.first_does(lambda: write_scores(scored, output, prefix=options.column_prefix))
    print_line(f"\nwritten to {output}")
    print_line("The pairs that the policy gets most wrong are those with the smallest margin.")


def run(
    model: ModelOptions,
    data: DataOptions,
    rows: TokenizationOptions,
    compared: ComparisonOptions,
    output: Path,
    *,
    prefix: str = "",
) -> "ScoredRows":
    """Load what the options name and score every pair with both models.

    Args:
        model: options of the model that was trained.
        data: options of the rows.
        rows: how they become token ids.
        compared: which policy and reference.
        output: the file that they will be written to.
        prefix: put before the names of the new columns.

    Raises:
        ValueError: an option is missing, the model or data cannot be loaded, or the rows have no
            room for the metrics.
    """
    from fastdpo.evaluation.load_both import read_pairs, run_policy_and_reference, tokenizer_of
    from fastdpo.evaluation.scored_rows import ScoredRows, check_rows, score_finite

    tokenizer = tokenizer_of(model, compared)
    read, pairs = read_pairs(data, rows, tokenizer)
    check_rows(read, pairs, output, prefix=prefix)
    policy, reference = run_policy_and_reference(
        model,
        compared,
        lambda scorer, side: score_finite(scorer, read, pairs, side),
    )
    return ScoredRows(read, pairs, policy, reference, compared.beta)


if __name__ == "__main__":
    sys.exit(command(main))
