"""The boundary between two updates: it seeds the generators and stops the run after a signal."""

import dataclasses
import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from fastdpo.system import ranks
from fastdpo.trainer.nonfinite import require_finite_step

if TYPE_CHECKING:
    from fastdpo.trainer.resumable import ResumableTrainer

logger = logging.getLogger(__name__)


def update_seed(seed: int, update: int, rank: int = 0) -> int:
    """The seed of torch's generators in one update on one rank; all are counted from 0."""
    name = f"update {update} of {seed}" + (f" on rank {rank}" if rank else "")
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclasses.dataclass(eq=False)
class UpdateBoundary(TrainerCallback):
    """Seeds the generators before each update, checks the first, stops the run after a signal."""

    trainer: "ResumableTrainer"
    resumed_from: Path | None
    is_first: bool = True

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look for the best checkpoint beside this one; train nothing after the last update."""
        if self.resumed_from is not None and state.best_global_step:
            best = self.resumed_from.with_name(f"checkpoint-{state.best_global_step}")
            if best.is_dir():
                state.best_model_checkpoint = str(best)
        if state.global_step >= state.max_steps:
            logger.info(
                "All %s updates were done before: nothing is left to train", state.max_steps
            )
            control.should_training_stop = True

    def on_step_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Seed torch's generators by the update's number, so that a resumed run draws the same."""
        torch.manual_seed(update_seed(args.seed, state.global_step, ranks.index()))

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Try after the first update whether a checkpoint can be written; stop after a signal."""
        if self.is_first:
            self.trainer.require_savable()
            self.is_first = False
        self._stop_if_requested(control)

    def on_train_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse to end with a weight that is not finite."""
        require_finite_step(self.trainer.policy, state.global_step)

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop after a signal: transformers asks once more at an epoch's end."""
        self._stop_if_requested(control)

    def _stop_if_requested(self, control: TrainerControl) -> None:
        """After a signal, have `_maybe_log_save_evaluate`, which comes next, save only."""
        assert self.trainer._stop is not None, "inside train()"
        if self.trainer._stop.agree() is not None:
            control.should_evaluate, control.should_save = False, True
