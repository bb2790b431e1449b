"""What an evaluation shows."""

from dataclasses import dataclass

from fastdpo.options.checks import check_whole, option


@dataclass
class EvaluationOptions:
    """What an evaluation shows."""

    _argument_group_name = "Evaluation"

    num_completions: int = option(3, "Prompts that both models complete, for you to read.")
    max_new_tokens: int = option(64, "Most tokens of such a completion.")
    output_file: str = option("evaluation.json", "JSON file that the figures are written to.")

    def __post_init__(self) -> None:
        check_whole("num_completions", self.num_completions, 0, "0 writes none")
        check_whole("max_new_tokens", self.max_new_tokens, 1, "64 is usual")
