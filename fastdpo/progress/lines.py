"""One bar over the updates, and one readable line for each log."""

from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastdpo.system.console import progress_bar

SHOWN = (
    ("loss", "loss", ".4f"),
    ("rewards/accuracies", "accuracy", ".3f"),
    ("rewards/margins", "margin", ".3f"),
    ("grad_norm", "grad norm", ".2f"),
    ("learning_rate", "lr", ".2e"),
    ("perf/pairs_per_second", "pairs/s", ".1f"),
    ("memory/peak_gib", "GiB", ".2f"),
)
"""Logged name, what the screen calls it, and its format; everything else is in the log history."""


class ProgressLines(TrainerCallback):
    """A bar over the updates, and above it a line for each training or evaluation log."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Open the bar, where a resumed run left it."""
        self.bar = progress_bar(state.max_steps, "Training", "update")
        self.bar.update(state.global_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """One update further."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """One line."""
        line = log_line(state.global_step, state.max_steps, logs or {})
        if line and self.bar is not None:
            self.bar.write(line)
        elif line:
            tqdm.write(line)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def log_line(step: int, steps: int, logs: dict[str, float]) -> str:
    """One log as a line; empty for logs that are neither of training nor of evaluation."""
    prefix = next((name.removesuffix("loss") for name in logs if name.endswith("loss")), None)
    if prefix is None or prefix == "train_":
        return ""
    figures = [
        f"{label} {logs[prefix + name]:{form}}"
        for name, label, form in SHOWN
        if prefix + name in logs
    ]
    return "  ".join([f"{prefix.rstrip('_') or 'update'} {step}/{steps}", *figures])
