"""The options of turning rows into token ids: lengths, special tokens, useless rows."""

import os
from dataclasses import dataclass
from datetime import date
from typing import Any

from fastdpo.options.checks import Options, option, whole

TRUNCATION_MODES = ("keep_completion", "keep_start")
SPECIAL_TOKEN_MODES = ("literal", "allow", "error")
SCORED_TURNS = ("assistant", "all")


def _iso_day(name: str, value: Any) -> None:
    try:
        day = date.fromisoformat(value)
    except (TypeError, ValueError):
        day = None
    if day is None or day.isoformat() != value:
        raise ValueError(
            f"--{name} is {value!r}; it must be a day as 2025-06-30. Leave it out for today."
        )


@dataclass
class TokenizationOptions(Options):
    """The options of turning rows into token ids."""

    _argument_group_name = "Rows to tokens"

    max_length: int | None = option(
        1024,
        "Most tokens of prompt + completion; longer ones are truncated. none: no limit.",
        check=whole(2, "1024 is usual, none lifts the limit"),
    )
    max_prompt_length: int | None = option(
        None,
        "Most tokens of the prompt; the left of a longer one is cut first. Unset: no limit.",
        check=whole(1, "512 is usual"),
    )
    max_completion_length: int | None = option(
        None,
        "Most tokens of a completion; the end of a longer one is cut. Unset: no limit.",
        check=whole(1, "512 is usual"),
    )
    truncation_mode: str = option(
        "keep_completion",
        "What an over-long pair keeps: keep_completion cuts the prompt first (its oldest turns, or "
        "its left), down to a quarter of max_length; keep_start keeps the first tokens of prompt + "
        "completion as TRL does, which eats the completion.",
        choices=list(TRUNCATION_MODES),
    )
    special_tokens_in_content: str | None = option(
        None,
        "Special tokens written inside the data: literal encodes them as plain text, allow as "
        "tokens, error refuses the row. Unset: literal in conversations, allow in ready strings.",
        choices=list(SPECIAL_TOKEN_MODES),
    )
    template_date: str | None = option(
        None,
        "The day that a chat template is given which writes the date, as 2025-06-30. Unset: today, "
        "for the whole run; a resumed run keeps its own.",
        check=_iso_day,
    )
    score_turns: str = option(
        "all",
        "Which turns of a completion of several are scored: assistant leaves out tool results and "
        "user turns, all scores them too as TRL does. The commands' default is assistant, "
        "DPOConfig's all.",
        choices=list(SCORED_TURNS),
    )
    strict_data: bool = option(
        False,
        "Stop at a useless row (empty, identical ...) instead of dropping it.",
    )
    dataset_num_proc: int | None = option(
        None,
        "Processes that turn rows into tokens, which large sets alone start; pairs, report and "
        "errors do not depend on it. Unset: all cores but one.",
        check=whole(1, "1 does it in this process"),
    )
    data_cache: str | None = option(
        None,
        "Folder of the prepared pairs, which a later run of the same rows, tokenizer, template and "
        "lengths reads, or off. Unset: in data/, beside the stored reference log-probs.",
    )

    def __post_init__(self) -> None:
        if self.data_cache is not None:
            self.data_cache = os.fspath(self.data_cache)
            if not self.data_cache.strip():
                raise ValueError("--data_cache is empty; give a folder, off, or leave it out.")
        if self.truncation_mode == "keep_end":
            raise ValueError(
                "--truncation_mode is 'keep_end', which cuts each side of a pair at another place "
                "of the prompt, so that they answer different texts; use keep_completion, which "
                "cuts the left of the prompt once for both, or keep_start."
            )
        super().__post_init__()
        longest, prompt = self.max_length, self.max_prompt_length
        if longest is not None and prompt is not None and prompt >= longest:
            raise ValueError(
                f"--max_prompt_length is {prompt} and leaves no room for a completion in "
                f"--max_length {longest}; lower the one or raise the other."
            )
