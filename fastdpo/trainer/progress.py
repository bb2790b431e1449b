"""The run as people watch it: a line for each log, aligned, with the time that is left."""

import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from fastdpo.system import ranks
from fastdpo.system.console import duration, print_line

SHOWN = (
    ("loss", "loss", "7.4f"),
    ("rewards/margins", "reward margin", "7.3f"),
    ("rewards/accuracies", "accuracy", "5.3f"),
    ("logratios/chosen_per_token", "chosen/token", "+8.4f"),
    ("logratios/rejected_per_token", "rejected/token", "+8.4f"),
    ("grad_norm", "grad norm", "6.2f"),
    ("learning_rate", "lr", "8.2e"),
    ("perf/tokens_per_second", "tokens/s", "6.0f"),
    ("memory/peak_gib", "GiB", "5.2f"),
)
"""Logged name, label on the screen, and format of a fixed width; the history has all metrics."""


class TimeLeft:
    """Estimates the seconds until a run ends, from its updates and evaluations so far.

    Both have means of their own: an evaluation does not make the updates look slow, and what was
    done before a resumed run began counts for nothing.
    """

    def __init__(self) -> None:
        self.updates = self.evaluations = 0
        self.update_s = self.evaluation_s = 0.0

    def add_update(self, seconds: float) -> None:
        """Count an update."""
        self.updates += 1
        self.update_s += seconds

    def add_evaluation(self, seconds: float) -> None:
        """Count an evaluation of all sets."""
        self.evaluations += 1
        self.evaluation_s += seconds

    def seconds(self, updates: int, evaluations: int) -> float | None:
        """The seconds that so many updates and evaluations will take; None before any update."""
        if not self.updates:
            return None
        evaluation_s = self.evaluation_s / self.evaluations if self.evaluations else 0.0
        return updates * self.update_s / self.updates + evaluations * evaluation_s


class ProgressLines(TrainerCallback):
    """A line for each training or evaluation log; on a terminal a bar over the updates below.

    Args:
        shows_bar: False with --disable_tqdm. What is no terminal never gets a bar.
    """

    def __init__(self, *, shows_bar: bool = True) -> None:
        self.shows_bar = shows_bar
        self.bar: tqdm | None = None
        self.time_left = TimeLeft()
        self._began_s = self._ended_s = 0.0
        self._evaluation_s = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, at the update that a resumed run begins with."""
        self.time_left, self._evaluation_s = TimeLeft(), 0.0
        if self.shows_bar:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="Training",
                leave=False,
                # None: where there is no terminal.
                disable=None if ranks.is_first() else True,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note when the update begins, and that an evaluation before it has ended."""
        if self._evaluation_s:
            self.time_left.add_evaluation(self._evaluation_s)
            self._evaluation_s = 0.0
        self._began_s = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the update, and advance the bar to it."""
        self._ended_s = time.monotonic()
        self.time_left.add_update(self._ended_s - self._began_s)
        if self.bar is not None:
            self.bar.set_postfix_str(self._left(args, state), refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note how long the evaluations after an update have taken so far."""
        self._evaluation_s = time.monotonic() - self._ended_s

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the line of a log above the bar."""
        line = log_line(state.global_step, state.max_steps, logs or {})
        if not line:
            return
        if left := self._left(args, state):
            line += f"  {left}"
        if self.bar is not None and not self.bar.disable:
            self.bar.write(line)
        else:
            print_line(line)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _left(self, args: TrainingArguments, state: TrainerState) -> str:
        """How long the rest of the run will take; empty at its end and before an update."""
        updates = state.max_steps - state.global_step
        seconds = self.time_left.seconds(updates, evaluations_left(args, state))
        return f"{duration(seconds)} left" if seconds is not None and updates > 0 else ""


def evaluations_left(args: TrainingArguments, state: TrainerState) -> int:
    """How many evaluations are to come, the one after the present update not among them."""
    if args.eval_strategy == IntervalStrategy.STEPS and state.eval_steps:
        every = max(1, int(state.eval_steps))
        return state.max_steps // every - state.global_step // every
    if args.eval_strategy == IntervalStrategy.EPOCH and state.global_step:
        done = state.epoch or 0.0
        return max(0, round(done * state.max_steps / state.global_step) - int(done))
    return 0


def log_line(step: int, steps: int, logs: dict[str, float]) -> str:
    """A log as a line for the screen; empty unless it is a log of training or of evaluation.

    Lines of one run have their columns at the same places.
    """
    prefix = next((name.removesuffix("loss") for name in logs if name.endswith("loss")), None)
    if prefix is None or prefix == "train_":
        return ""
    metrics = [
        f"{label} {logs[prefix + name]:{form}}"
        for name, label, form in SHOWN
        if prefix + name in logs
    ]
    name = prefix.rstrip("_") or "update"
    return "  ".join([f"{name:6} {step:{len(str(steps))}}/{steps}", *metrics])
