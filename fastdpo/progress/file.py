"""Every logged figure in `metrics.jsonl` in the output folder, whatever trackers are used."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastdpo.system import files

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class MetricsFile(TrainerCallback):
    """One JSON object a log, with `step`; a resumed run goes on where its checkpoint was."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Keep the lines up to the checkpoint; those after it will come again."""
        path = _path(args)
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= state.global_step > 0]
            files.write_text(path, "".join(line + "\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """One line, in one write: a killed run leaves whole lines, but for the last."""
        line = json.dumps({"step": state.global_step, **(logs or {})}, default=str) + "\n"
        try:
            files.append_text(_path(args), line)
        except OSError as error:  # a run is worth more than its log
            logger.warning("The log line of update %s is lost: %s", state.global_step, error)


def _path(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir)) / METRICS_FILE


def _step_of(line: str) -> float:
    """The step of a line; of one that was cut, none that is kept."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
