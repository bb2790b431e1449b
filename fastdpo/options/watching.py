"""The options of looking at a run while it goes on, and of ending it early."""

from dataclasses import dataclass

from fastdpo.options.checks import Options, option, whole


@dataclass
class WatchingOptions(Options):
    """The options of completions during a run, and of stopping early."""

    _argument_group_name = "Watching the run"

    log_completions: int = option(
        0,
        "Complete the first held-out prompts with policy and reference after every so many "
        "evaluations, print them and add them to completions.jsonl; 0 never does.",
        check=whole(0, "1 shows them after each, 0 never"),
    )
    early_stopping_patience: int | None = option(
        None,
        "End the run after so many evaluations in a row that did not improve the held-out loss, or "
        "what --metric_for_best_model names. Unset: never.",
        check=whole(1, "3 is usual, leave it out to never stop early"),
    )
