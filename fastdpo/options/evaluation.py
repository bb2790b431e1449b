"""What an evaluation compares, and what it shows."""

from dataclasses import dataclass

from fastdpo.options.checks import check_number, check_whole, option


@dataclass
class EvaluationOptions:
    """What is compared, and what is shown of it."""

    _argument_group_name = "Evaluation"

    adapter: str | None = option(
        None, "Folder of the trained adapter; the reference is the model without it."
    )
    reference: str | None = option(
        None, "The model that a fully trained --model started from, to compare with."
    )
    beta: float = option(0.1, "Reward per nat of log-ratio, as in training.")
    max_length: int | None = option(1024, "Most tokens of prompt + completion, as in training.")
    num_completions: int = option(3, "Prompts that both models complete, for you to read.")
    max_new_tokens: int = option(64, "Most tokens of such a completion.")
    output_file: str = option("evaluation.json", "JSON file that the figures are written to.")

    def __post_init__(self) -> None:
        check_number("beta", self.beta, above=0, remedy="Pass the beta of the training run.")
        if self.max_length is not None:
            check_whole("max_length", self.max_length, 8, "1024 is usual, none lifts the limit")
        check_whole("num_completions", self.num_completions, 0, "0 writes none")
        check_whole("max_new_tokens", self.max_new_tokens, 1, "64 is usual")
