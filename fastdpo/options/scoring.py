"""Where the scored rows go, and how their new columns are called."""

from dataclasses import dataclass
from pathlib import PurePath

from fastdpo.options.checks import option

SCORE_ENDINGS = (".jsonl", ".parquet")


@dataclass
class ScoringOptions:
    """Where the scored rows go, and how their new columns are called."""

    _argument_group_name = "Scores"

    output_file: str = option(
        "scores.jsonl", "File of the rows with their figures; ends in .jsonl or .parquet."
    )
    column_prefix: str = option(
        "",
        "Put before the names of the new columns, so that a second model's figures fit beside "
        "the first's.",
    )

    def __post_init__(self) -> None:
        if PurePath(self.output_file).suffix.lower() not in SCORE_ENDINGS:
            raise ValueError(
                f"--output_file is {self.output_file!r}; its ending says the format, and it must "
                f"be one of {', '.join(SCORE_ENDINGS)}."
            )
