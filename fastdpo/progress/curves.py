"""One plain sentence when a curve needs explaining, each once a run."""

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

Logs = Mapping[str, float]

LOGS_LOOKED_AT = 4
"""A trend is what this many training logs in a row show."""

EARLY_SHARE = 0.1
NO_LOSS = 0.02


def loss_gone_early(logs: Sequence[Logs], share_done: float) -> str | None:
    """The pairs differ by something trivial."""
    last = logs[-1]
    if share_done > EARLY_SHARE or last["loss"] > NO_LOSS or last["rewards/accuracies"] < 0.99:
        return None
    return (
        f"the loss is {last['loss']:.3f} after {share_done:.0%} of the run: something trivial "
        "tells chosen from rejected, such as a template, an end marker or the length. --dry_run "
        "shows a few pairs."
    )


def displacement(logs: Sequence[Logs], share_done: float) -> str | None:
    """Chosen completions become less likely too."""
    recent = logs[-LOGS_LOOKED_AT:]
    chosen = [each["rewards/chosen"] for each in recent]
    margins = [each["rewards/margins"] for each in recent]
    falling = all(later < earlier for earlier, later in pairwise(chosen))
    if len(recent) < LOGS_LOOKED_AT or not falling or chosen[-1] >= 0 or margins[-1] <= 0:
        return None
    return (
        f"both rewards fall (chosen {chosen[-1]:+.2f}): the policy makes the chosen completions "
        "less likely too, only the rejected ones more so. This likelihood displacement is common "
        "and does no harm while the answers read well; against it help --loss_type sigmoid sft, "
        "--loss_type apo_zero, a lower learning rate or a higher --beta."
    )


def below_chance(logs: Sequence[Logs], share_done: float) -> str | None:
    """More pairs are ordered the wrong way than the right one."""
    recent = [each["rewards/accuracies"] for each in logs[-LOGS_LOOKED_AT:]]
    if len(recent) < LOGS_LOOKED_AT or share_done < EARLY_SHARE or max(recent) >= 0.5:
        return None
    return (
        f"the preference accuracy has stayed below 0.5 (now {recent[-1]:.2f}): are chosen and "
        "rejected exchanged in the data, or is the learning rate too high?"
    )


NOTES = (loss_gone_early, displacement, below_chance)


class CurveNotes(TrainerCallback):
    """Looks at the training logs and says what a curve may mean."""

    def __init__(self) -> None:
        self.logs: list[Logs] = []
        self.said: set[str] = set()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Whatever is new to say."""
        if logs is None or "loss" not in logs or "rewards/margins" not in logs:
            return
        self.logs.append(dict(logs))
        for note in NOTES:
            text = note(self.logs, state.global_step / max(1, state.max_steps))
            if text is not None and note.__name__ not in self.said:
                self.said.add(note.__name__)
                logger.info("Note, update %s: %s", state.global_step, text)
