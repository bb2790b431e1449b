"""`python -m fastdpo.evaluate`: policy and reference side by side on held-out preference pairs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
from fastdpo.options.checks import Options, option, whole
from fastdpo.system import files, ranks
from fastdpo.system.console import print_line

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from fastdpo.evaluation.evaluate_pairs import Evaluation


@dataclass
class EvaluationOptions(Options):
    """The options that say what an evaluation shows."""

    _argument_group_name = "Evaluation"

    num_completions: int = option(
        3, "Prompts that both models complete, for you to read.", check=whole(0, "0 writes none")
    )
    max_new_tokens: int = option(
        64, "Most tokens of such a completion.", check=whole(1, "64 is usual")
    )
    output_file: str | None = option(
        None,
        "JSON file that the metrics are written to. Unset: evaluation.json beside the adapter, or "
        "in the present folder without one, with a number behind it if there is one already.",
    )


def main(argv: Sequence[str]) -> None:
    """Parse, evaluate, print the table and write the JSON file."""
    parsed = parse(
        "evaluate",
        [ModelOptions, DataOptions, TokenizationOptions, ComparisonOptions, EvaluationOptions],
        argv,
        training=False,
        description="Evaluate a trained model on held-out preference pairs, beside its reference.",
        refused=TRAINING_OPTIONS,
        shared=True,
    )
    options = parsed.group(EvaluationOptions)
    rows, compared = parsed.group(TokenizationOptions), parsed.group(ComparisonOptions)
    output = new_output_file(parsed, options.output_file, compared.adapter, "evaluation.json")
    evaluation = run(parsed.model, parsed.data, rows, compared, options)
    print_line(evaluation.describe())
    ranks.first_does(lambda: files.write_json(output, evaluation.as_json()))
    print_line(f"\nwritten to {output}")
    _draw_curves(Path(compared.adapter or parsed.model.model_name_or_path or ""), output)


def _draw_curves(trained: Path, metrics: Path) -> None:
    """Draw the curves of the run that wrote the model beside the metrics, if it left its log."""
    from fastdpo.trainer.curves import draw_curves, read_history

    image = metrics.with_name(f"{metrics.stem}_curves.png")
    if ranks.first_does(lambda: draw_curves(read_history(trained), image)):
        print_line(f"the run's curves: {image}")


def run(
    model: ModelOptions,
    data: DataOptions,
    rows: TokenizationOptions,
    compared: ComparisonOptions,
    options: EvaluationOptions,
) -> "Evaluation":
    """Load what the options name and evaluate it.

    Raises:
        ValueError: an option is missing, or the model or data cannot be loaded.
    """
    from fastdpo.evaluation.evaluate_pairs import Completion, evaluate_scored, generate_completions
    from fastdpo.evaluation.load_both import (
        read_pairs,
        run_policy_and_reference,
        sources_of,
        tokenizer_of,
    )
    from fastdpo.evaluation.scored_rows import score_finite
    from fastdpo.modeling.scoring import ScoredPairs

    tokenizer = tokenizer_of(model, compared)
    read, pairs = read_pairs(data, rows, tokenizer)
    prompts = [pair.prompt_ids for pair in pairs[: options.num_completions]]

    def work(scorer: "PreTrainedModel | PeftModel", side: str) -> tuple[ScoredPairs, list[str]]:
        scored = score_finite(scorer, read, pairs, side)
        texts = ranks.first_does(
            lambda: generate_completions(
                scorer, tokenizer, prompts, max_new_tokens=options.max_new_tokens
            )
        )
        return scored, texts

    (scored, texts), (ref_scored, ref_texts) = run_policy_and_reference(model, compared, work)
    completions = [
        Completion(str(tokenizer.decode(prompt, skip_special_tokens=True)), before, after)
        for prompt, before, after in zip(prompts, ref_texts, texts, strict=True)
    ]
    return evaluate_scored(
        scored,
        ref_scored,
        beta=compared.beta,
        completions=completions,
        sources=sources_of(read, pairs),
    )


if __name__ == "__main__":
    sys.exit(command(main))
