"""Callbacks that look at held-out pairs: completions of fixed prompts, and an early end."""

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from fastdpo.evaluation.evaluate_pairs import generate_completions
from fastdpo.system import files, ranks
from fastdpo.system.console import print_line
from fastdpo.trainer.callbacks import drop_later_lines, output_path

if TYPE_CHECKING:
    from fastdpo.trainer.dpo_trainer import DPOTrainer

logger = logging.getLogger(__name__)

COMPLETIONS_FILE = "completions.jsonl"
PROMPTS = 3
MAX_NEW_TOKENS = 64


class EarlyEnd(TrainerCallback):
    """Ends a run after so many evaluations in a row that improved nothing.

    It counts in the log history, so that a resumed run counts on; transformers' own callback of
    this purpose begins to count again.

    Args:
        patience: evaluations without improvement.
        metric: the logged name of what is to improve; see `greater_is_better`.
    """

    def __init__(self, patience: int, metric: str) -> None:
        self.patience, self.metric = patience, metric

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the values of all evaluations so far."""
        values = [line[self.metric] for line in state.log_history if self.metric in line]
        waited = evaluations_since_best(values, greater_is_better=bool(args.greater_is_better))
        if values and waited >= self.patience and not control.should_training_stop:
            logger.info(
                "Ending early after update %s: %s has not improved in %s evaluations (best %.4f).",
                state.global_step, self.metric, waited, values[-1 - waited],
            )  # fmt: skip
            control.should_training_stop = True


def evaluations_since_best(values: Sequence[float], *, greater_is_better: bool) -> int:
    """How many of the last values came after the best one, whose first place counts."""
    if not values:
        return 0
    best = max(values) if greater_is_better else min(values)
    return len(values) - 1 - list(values).index(best)


class CompletionLog(TrainerCallback):
    """Shows what policy and reference write after fixed held-out prompts, and keeps it in a file.

    Each line of `completions.jsonl` has `step`, `prompt`, `reference` and `policy`. The reference
    of a run that trains all weights exists before the first update only, so it writes then, and
    the lines of step 0 keep it for a resumed run.

    Args:
        trainer: whose models write.
        every: evaluations from one showing to the next.
    """

    def __init__(self, trainer: "DPOTrainer", every: int) -> None:
        self.trainer, self.every = trainer, every
        self._references: list[str] = []
        self._evaluated: list[int] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let a reference write that the first update would change; drop what is done again."""
        path = output_path(args, COMPLETIONS_FILE)
        ranks.first_does(lambda: drop_later_lines(path, state.global_step))
        self._references, self._evaluated = [], []
        if self._frozen:
            return
        if state.global_step == 0:
            self._references = self._write(reference=True)
            self._keep(path, 0, self._references)
        elif path.exists():
            lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            self._references = [line["reference"] for line in lines if line["step"] == 0]

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write after every so many updates with an evaluation, however many sets it has."""
        step = state.global_step
        if step in self._evaluated:
            return
        self._evaluated.append(step)
        if len(self._evaluated) % self.every:
            return
        if self._frozen and (not self._references or self.trainer.user_args.sync_ref_model):
            self._references = self._write(reference=True)
        for line in self._keep(
            output_path(args, COMPLETIONS_FILE), step, self._write(reference=False)
        ):
            print_line(
                f"after update {step}, prompt {line['prompt']!r}\n"
                f"  reference: {line['reference']!r}\n  policy:    {line['policy']!r}"
            )

    @property
    def _frozen(self) -> bool:
        """True where the reference can write at any time."""
        return self.trainer.reference.reference.is_frozen

    def _prompts(self) -> list[np.ndarray]:
        """The first prompts of the first evaluation set, as token ids."""
        groups = next(iter(self.trainer.sets.eval_by_name.values()))
        return [groups[i].prompt_ids for i in range(min(PROMPTS, len(groups)))]

    def _write(self, *, reference: bool) -> list[str]:
        """Let the policy or the reference complete each prompt."""
        trainer, source = self.trainer, self.trainer.reference.reference
        model: Any = source.model if reference else trainer.policy
        active = source.active() if reference else nullcontext()
        with active, trainer.autocast():
            return ranks.first_does(
                lambda: generate_completions(
                    model, trainer.tokenizer, self._prompts(), max_new_tokens=MAX_NEW_TOKENS
                )
            )

    def _keep(self, path: Path, step: int, policies: Sequence[str]) -> list[dict[str, Any]]:
        """Add a line for each prompt to the file, and return them."""
        decode = self.trainer.tokenizer.decode
        references = self._references or [None] * len(policies)
        lines = [
            {"step": step, "prompt": str(decode(prompt)), "reference": written, "policy": policy}
            for prompt, written, policy in zip(self._prompts(), references, policies, strict=True)
        ]
        if not ranks.is_first():
            return lines
        try:
            files.append_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:  # a run is worth more than its completions
            logger.warning("The completions of update %s are lost: %s", step, error)
        return lines


def watching_callbacks(trainer: "DPOTrainer") -> list[TrainerCallback]:
    """The callbacks that the options ask for.

    Raises:
        ValueError: an option needs evaluations, and there will be none.
    """
    args, found = trainer.user_args, []
    asked = {"--early_stopping_patience": args.early_stopping_patience is not None}
    asked["--log_completions"] = bool(args.log_completions)
    for name in (name for name, given in asked.items() if given):
        if args.eval_strategy == IntervalStrategy.NO or not trainer.sets.eval_by_name:
            raise ValueError(
                f"{name} looks at evaluations, and there are none: pass --eval_dataset and "
                "--eval_strategy steps or epoch, or leave it out."
            )
    if args.early_stopping_patience is not None:
        found.append(EarlyEnd(args.early_stopping_patience, _metric(trainer)))
    if args.log_completions:
        found.append(CompletionLog(trainer, args.log_completions))
    return found


def _metric(trainer: "DPOTrainer") -> str:
    """The logged name of the metric that is to improve: by default the first set's loss."""
    name = trainer.args.metric_for_best_model
    if name is not None:
        return name if name.startswith("eval_") else f"eval_{name}"
    sets = trainer.sets.eval
    return f"eval_{next(iter(sets))}_loss" if isinstance(sets, dict) else "eval_loss"
