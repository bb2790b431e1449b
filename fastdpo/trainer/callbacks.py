"""Callbacks of a run: `metrics.jsonl`, and notes on its curves."""

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastdpo.system import files, ranks
from fastdpo.system.console import print_line
from fastdpo.system.start_up import start_up

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """Writes every logged metric to `metrics.jsonl` in the output folder, whatever the trackers.

    Each log is one JSON object in a line, with `step`; a resumed run continues at its checkpoint.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Drop the lines after the checkpoint: the resumed run will write them again."""
        if ranks.is_first():
            drop_later_lines(output_path(args, METRICS_FILE), state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line in one write, so that a killed run cuts at most the last line."""
        if not ranks.is_first():
            return
        line = json.dumps({"step": state.global_step, **(logs or {})}, default=str) + "\n"
        try:
            files.append_text(output_path(args, METRICS_FILE), line)
        except OSError as error:  # a run is worth more than its log
            logger.warning("The log line of update %s is lost: %s", state.global_step, error)


class StartUpTimes(TrainerCallback):
    """Prints where the time up to the end of the first update went, with --logging_first_step."""

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Print it once a trainer; a resumed run's first update counts."""
        line = start_up.told()
        if line is not None and args.logging_first_step:
            with tqdm.external_write_mode():  # a bar makes room
                print_line(line)


def output_path(args: TrainingArguments, name: str) -> Path:
    """The path of a file in the run's output folder."""
    return Path(str(args.output_dir)) / name


def drop_later_lines(path: Path, step: int) -> None:
    """Keep the lines of a file of JSON lines up to a step; of one that begins at 0, none."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) <= step > 0]
        files.write_text(path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    """The step of a line; infinity, which is never kept, for a line that was cut."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


Logs = Mapping[str, float]

TREND_LOGS = 4
"""A trend is what this many successive training logs show."""

EARLY_SHARE = 0.1
"""Share of a run's updates that counts as its beginning."""

LOSS_FLOOR = 0.02
"""A training loss at or below it, nats, counts as collapsed."""


def loss_collapsed_early(logs: Sequence[Logs], share_done: float) -> str | None:
    """A note if the loss is gone early: the pairs differ by something trivial."""
    last = logs[-1]
    if share_done > EARLY_SHARE or last["loss"] > LOSS_FLOOR or last["rewards/accuracies"] < 0.99:
        return None
    return (
        f"the loss is {last['loss']:.3f} after {share_done:.0%} of the run: something trivial "
        "tells chosen from rejected, such as a template, an end marker or the length. --dry_run "
        "shows a few pairs."
    )


def displacement(logs: Sequence[Logs], share_done: float) -> str | None:
    """A note if chosen completions become less likely too."""
    recent = logs[-TREND_LOGS:]
    chosen = [each["rewards/chosen"] for each in recent]
    margins = [each["rewards/margins"] for each in recent]
    falling = all(later < earlier for earlier, later in pairwise(chosen))
    if len(recent) < TREND_LOGS or not falling or chosen[-1] >= 0 or margins[-1] <= 0:
        return None
    return (
        f"both rewards fall (chosen {chosen[-1]:+.2f}): the policy makes the chosen completions "
        "less likely too, only the rejected ones more so. This likelihood displacement is common "
        "and does no harm while the answers read well; against it help --loss_type sigmoid sft, "
        "--loss_type apo_zero, a lower learning rate or a higher --beta."
    )


def below_chance(logs: Sequence[Logs], share_done: float) -> str | None:
    """A note if more pairs are ordered the wrong way than the right one."""
    recent = [each["rewards/accuracies"] for each in logs[-TREND_LOGS:]]
    if len(recent) < TREND_LOGS or share_done < EARLY_SHARE or max(recent) >= 0.5:
        return None
    return (
        f"the preference accuracy has stayed below 0.5 (now {recent[-1]:.2f}): are chosen and "
        "rejected exchanged in the data, or is the learning rate too high?"
    )


NOTES = (loss_collapsed_early, displacement, below_chance)


class CurveNotes(TrainerCallback):
    """Logs a note, once each, when the training logs show one of the patterns of `NOTES`."""

    def __init__(self) -> None:
        self.logs: list[Logs] = []
        self.logged_notes: set[str] = set()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log each note that applies for the first time."""
        if logs is None or "loss" not in logs or "rewards/margins" not in logs:
            return
        self.logs.append(dict(logs))
        for note in NOTES:
            text = note(self.logs, state.global_step / max(1, state.max_steps))
            if text is not None and note.__name__ not in self.logged_notes:
                self.logged_notes.add(note.__name__)
                logger.info("Note, update %s: %s", state.global_step, text)
