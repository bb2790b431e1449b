"""A transformers.Trainer whose checkpoints are whole, hold no pickle and know their run."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from fastdpo import checkpoint as checkpoints
from fastdpo import files
from fastdpo.config import DPOConfig

logger = logging.getLogger(__name__)

TRAINING_ARGUMENTS = "training_args.json"


class ResumableTrainer(Trainer):
    """Everything of `Trainer` that writes to disk, written as `fastdpo.checkpoint` has it.

    Attributes:
        policy: the model that is trained and saved.
        tokenizer: saved beside it.
        user_args: the options as the user gave them, saved beside it too.
    """

    policy: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    user_args: DPOConfig
    _saving_into: Path | None = None

    def run_description(self) -> dict[str, Any]:
        """What a resumed run must share with the one that was stopped; JSON-ready."""
        raise NotImplementedError

    def checkpoint_to_resume(self, asked: str | bool | None) -> Path | None:
        """The folder to go on from: the one asked for, or for True the newest that verifies.

        Raises:
            CheckpointError: there is none, it is damaged, or it belongs to another run.
        """
        if not asked:
            return None
        if asked is True:
            folder = checkpoints.newest_verified(Path(str(self.args.output_dir)))
        else:
            folder = Path(asked)
        checkpoints.require_same_run(checkpoints.verify(folder), self.run_description())
        logger.info("Resuming from %s", folder)
        return folder

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_into) if self._saving_into else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Fill a folder under a temporary name, seal it, give it its name, then rotate.

        Trainer itself rotates before it returns, which would delete the last whole checkpoint
        before the new one has its manifest; in the temporary folder it finds nothing to rotate.
        """
        output_dir = Path(super()._get_output_dir(trial))
        final = output_dir / f"checkpoint-{self.state.global_step}"
        self._saving_into = files.temporary_name(final)
        temporary = self._saving_into / final.name
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == str(temporary):
                self.state.best_model_checkpoint = str(final)
                self.state.save_to_json(str(temporary / "trainer_state.json"))
            checkpoints.seal(temporary, self.run_description())
            checkpoints.commit(temporary, final)
        finally:
            shutil.rmtree(self._saving_into, ignore_errors=True)
            self._saving_into = None
        best = self.state.best_model_checkpoint
        checkpoints.rotate(output_dir, self.args.save_total_limit, Path(best) if best else None)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Model or adapter, tokenizer with chat template, and the options as JSON."""
        folder = Path(str(self.args.output_dir) if output_dir is None else output_dir)
        self.policy.save_pretrained(str(folder), state_dict=state_dict)
        self.tokenizer.save_pretrained(str(folder))
        files.write_text(folder / TRAINING_ARGUMENTS, self.user_args.to_json_string() + "\n")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.optimizer is not None, "training has begun"
        assert self.lr_scheduler is not None, "training has begun"
        state = self.lr_scheduler.state_dict()
        checkpoints.save_optimizer(Path(output_dir), self.optimizer, state, self.policy)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.optimizer is not None, "training is about to begin"
            assert self.lr_scheduler is not None, "training is about to begin"
            state = checkpoints.load_optimizer(Path(checkpoint), self.optimizer, self.policy)
            self.lr_scheduler.load_state_dict(state)

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None:
            files.write_json(Path(output_dir) / "scaler.json", self.accelerator.scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            state = json.loads((Path(checkpoint) / "scaler.json").read_text())
            self.accelerator.scaler.load_state_dict(state)

    def _save_rng_state(self, output_dir: str) -> None:
        checkpoints.save_rng_state(Path(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_rng_state(Path(checkpoint))
