"""A transformers.Trainer that can be stopped, killed and resumed at any update, to the same bits.

Its checkpoints are complete or absent, hold no pickle, and describe the run that wrote them. The
random numbers of an update depend on the seed and the update's number alone, so nothing that
happens between two updates can change the second.
"""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from transformers.trainer_utils import SaveStrategy, TrainOutput

from fastdpo.config import DPOConfig
from fastdpo.modeling.adapters import BASE_IN_4BIT, TRAINING_ARGUMENTS
from fastdpo.modeling.dropout import configured_dropout
from fastdpo.modeling.head import unwrap_model
from fastdpo.options import reference_folder
from fastdpo.ref_cache import HASH_CACHE_FILE, reference_identity
from fastdpo.system import files, ranks, results, signals
from fastdpo.trainer import checkpoint as checkpoints
from fastdpo.trainer.boundary import UpdateBoundary
from fastdpo.trainer.nonfinite import require_finite_weights
from fastdpo.trainer.optimizers import following_options, show_averaged_weights

logger = logging.getLogger(__name__)

TOKENIZER_BYTES = 2**25
"""Upper bound of everything in a checkpoint that is not a tensor of model or optimizer."""


class ResumableTrainer(Trainer):
    """A Trainer that writes and reads its checkpoints through `fastdpo.trainer.checkpoint`.

    Attributes:
        policy: the model that is trained and saved.
        tokenizer: saved beside the model.
        user_args: the options as the user gave them, saved beside the model too.
        resumed_from: the checkpoint that the run in hand goes on from, or None.
    """

    policy: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    user_args: DPOConfig
    resumed_from: Path | None = None
    _saving_into: Path | None = None
    _saved_update: int | None = None
    _stop: signals.Stop | None = None
    _run: Mapping[str, Any] = {}

    # What a run is

    def resume_signature(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the one that was stopped; JSON-ready."""
        raise NotImplementedError

    def _describe_run(self) -> dict[str, Any]:
        """`resume_signature` and the identity of the base weights before the first update."""
        store = reference_folder(self.user_args.ref_cache)
        hash_cache = None if store is None else store / HASH_CACHE_FILE
        identity = ranks.after_first(  # which leaves the hash in the cache
            lambda: reference_identity(self.policy, torch.float32, hash_cache)
        )
        base = {name: identity[name] for name in ("weights", "config")}
        run = {**self.resume_signature(), "base": base}
        checkpoints.require_same_on_ranks(run)
        return run

    def layout_state(self) -> dict[str, Any]:
        """The layout of this run's work, which a resumed run has to take over; JSON-ready."""
        return {}

    def load_layout_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `layout_state` returned when the checkpoint was written."""

    def adopt_run(self, saved: Mapping[str, Any]) -> None:
        """Become the run of a checkpoint in what differs only since time has passed.

        Args:
            saved: the `resume_signature` of the run that wrote the checkpoint.
        """

    def extra_state(self) -> dict[str, torch.Tensor]:
        """Tensors that training changes and that neither the policy nor the optimizer holds."""
        return {}

    def on_before_train(self) -> None:
        """Prepare everything that the first update needs; a signal may stop the run in here."""

    # Training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, or continue from a checkpoint.

        SIGTERM and Ctrl-C end the run after the current update, with a checkpoint; a second one
        ends it at once.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest one in output_dir
                that verifies.
            trial: as in transformers.
            ignore_keys_for_eval: not used.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another run; output_dir cannot
                take one, holds an earlier run's or the model itself, or another process is training
                into it.
            FloatingPointError: an update is not finite, or a weight after it; nothing of that
                update was saved.
            OSError: the last checkpoint cannot be written.
            SystemExit: 143, after SIGTERM and a checkpoint.
            KeyboardInterrupt: after Ctrl-C and a checkpoint.
        """
        output_dir = Path(str(self.args.output_dir))
        checkpoints.require_other_folder(output_dir, unwrap_model(self.policy).name_or_path)
        claimed = ranks.held_by_first(checkpoints.claimed(output_dir))
        with claimed, signals.graceful_shutdown() as self._stop:
            self._run = self._describe_run()
            self.resumed_from = folder = self.checkpoint_to_resume(resume_from_checkpoint)
            self._require_place(output_dir, starts_anew=folder is None)
            self.on_before_train()
            self._stop.agree()
            self._stop.raise_if_requested()
            self._saved_update = None
            boundary = UpdateBoundary(self, folder)
            self.add_callback(boundary)
            try:
                resume = None if folder is None else str(folder)
                output = super().train(resume, trial, ignore_keys_for_eval)
                show_averaged_weights(self.optimizer)
                self._save_if_stopped_late(trial)
            finally:
                self.remove_callback(boundary)
                if self._stop.signal is not None and self._saved_update == self.state.global_step:
                    logger.info(
                        "Stopped after update %s of %s, and checkpoint-%s holds all of it; the "
                        "same command with --resume_from_checkpoint true goes on",
                        self.state.global_step,
                        self.state.max_steps,
                        self._saved_update,
                    )
            self._stop.raise_if_requested()
            return output

    def check_start(self, output_dir: Path, resume_from_checkpoint: str | bool | None) -> None:
        """Refuse what `train` would refuse of an output folder and a checkpoint; for a dry run.

        Args:
            output_dir: the folder that the run would write into; nothing stays in it.
            resume_from_checkpoint: as `train` takes it.

        Raises:
            CheckpointError: as `train`.
        """
        checkpoints.require_other_folder(output_dir, unwrap_model(self.policy).name_or_path)
        with ranks.held_by_first(checkpoints.claimed(output_dir)):
            if resume_from_checkpoint:
                self._run = self._describe_run()
                self.checkpoint_to_resume(resume_from_checkpoint, output_dir)
            self._require_place(output_dir, starts_anew=not resume_from_checkpoint)

    def _require_place(self, output_dir: Path, *, starts_anew: bool) -> None:
        """Refuse a folder that holds another run's checkpoints, or has no room for one."""
        if self.args.save_strategy == SaveStrategy.NO:
            return

        def check() -> None:
            if starts_anew:
                checkpoints.require_unused(output_dir)
            checkpoints.require_room(output_dir, self._checkpoint_bytes())

        ranks.first_does(check)

    def checkpoint_to_resume(
        self, requested: str | bool | None, output_dir: Path | None = None
    ) -> Path | None:
        """The checkpoint folder to resume from; for True, the newest one that verifies.

        Args:
            requested: a checkpoint folder, or True.
            output_dir: where True looks; None is the run's own.

        Raises:
            CheckpointError: there is none, it is damaged, or it belongs to another run.
        """
        if not requested:
            return None

        def find() -> tuple[Path, checkpoints.Manifest]:
            if requested is True:
                folder = checkpoints.newest_verified(output_dir or Path(str(self.args.output_dir)))
            else:
                folder = Path(requested)
                if not folder.is_dir():
                    raise checkpoints.CheckpointError(
                        f"nothing to resume from: there is no folder {folder}. Name a checkpoint-* "
                        "folder, or pass true for the newest whole one in --output_dir."
                    )
            return folder, checkpoints.verify(folder)

        folder, manifest = ranks.first_does(find)
        self.adopt_run(manifest.run)
        self._run = {**self._run, **self.resume_signature()}
        allowed = self.user_args.allow_config_change or []
        for line in checkpoints.require_same_run(manifest.run, self._run, allowed):
            logger.warning("Resuming although this differs (--allow_config_change): %s", line)
        self.load_layout_state(manifest.plan)
        logger.info("Resuming from %s", folder)
        return folder

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The next update's pairs; none where the run resumed from its last update."""
        if self.control.should_training_stop:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Evaluate; a signal interrupts it, because the update before it has to be saved."""
        assert self._stop is not None, "inside train()"
        with self._stop.interruptible():
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: torch.Tensor | float | None,
        model: nn.Module,
        trial: Any,
        *others: Any,
        **named: Any,
    ) -> None:
        """Log, save and evaluate; a signal in here ends the run after this update, saved once."""
        assert self._stop is not None, "inside train()"
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *others, **named)
        except (SystemExit, KeyboardInterrupt):
            if self._stop.signals > 1:
                raise
            logger.info("The evaluation was cut short")
        if self._stop.agree() is not None:
            self.control.should_training_stop = True
            self._save_checkpoint(model, trial)

    def _save_if_stopped_late(self, trial: Any) -> None:
        """Save a checkpoint after a signal that came when the last update was already done.

        Weights that were taken from the best checkpoint are in that one.
        """
        assert self._stop is not None, "inside train()"
        if self._stop.agree() is not None and not self.args.load_best_model_at_end:
            self._save_checkpoint(self.policy, trial)

    # Writing

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._saving_into) if self._saving_into else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint; if the disk is full or failing, training continues without it.

        Raises:
            OSError: it cannot be written, and the run ends here.
        """
        assert self._stop is not None, "inside train()"
        stops = self._stop.signal is not None
        if stops and self._saved_update == self.state.global_step:
            return
        try:
            best = ranks.first_does(lambda: self._write_checkpoint(model, trial))
        except OSError as error:
            if stops or self.state.global_step >= self.state.max_steps:
                raise
            free = "unknown"
            with suppress(OSError):
                free = f"{files.free_bytes(Path(str(self.args.output_dir))) / 2**20:,.0f} MiB"
            logger.error(
                "The checkpoint of update %s could not be written (%s). It takes about %s MiB, "
                "free: %s. Training goes on, older checkpoints are as they were, and the next save "
                "tries again: make room.",
                self.state.global_step,
                error,
                f"{self._checkpoint_bytes() / 2**20:,.0f}",
                free,
            )
        else:
            self._saved_update = self.state.global_step
            self.state.best_model_checkpoint = best

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> str | None:
        """Write a folder under a temporary name and its manifest, rename it, then rotate.

        Trainer itself rotates before it returns, which would delete the last whole checkpoint
        before the new one has its manifest; in the temporary folder it finds nothing to rotate.

        Returns:
            The best checkpoint so far, None without one.
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
            checkpoints.write_manifest(temporary, self._run, self.layout_state())
            checkpoints.publish(temporary, final)
        finally:
            files.remove_if_possible(self._saving_into)
            self._saving_into = None
        best = self.state.best_model_checkpoint
        checkpoints.rotate(
            output_dir, self.args.save_total_limit, final, Path(best) if best else None
        )
        return best

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write model or adapter, tokenizer with chat template, and the options as JSON.

        Outside a checkpoint, which becomes visible as a whole anyway, the folder is held and the
        files get their names only when all are written, the config last: the result of an earlier
        run is never mixed with this one. SIGTERM and Ctrl-C are obeyed after that.

        Raises:
            FloatingPointError: a weight is not finite; nothing was written.
            CheckpointError: the model was loaded from that folder, or another process holds it.
            OSError: the disk is full or failing.
        """
        show_averaged_weights(self.optimizer)
        folder = Path(str(self.args.output_dir) if output_dir is None else output_dir)
        if self._saving_into is not None:
            self._write_model(folder, state_dict)
            return

        def publish() -> None:
            checkpoints.require_other_folder(folder, unwrap_model(self.policy).name_or_path)
            with checkpoints.claimed(folder):
                results.publish(folder, lambda staged: self._write_model(staged, state_dict))

        with signals.deferred():
            ranks.first_does(publish)

    def _write_model(self, folder: Path, state_dict: Any) -> None:
        require_finite_weights(self.policy, self.state.global_step)
        options: dict[str, Any] = {"state_dict": state_dict}
        if isinstance(self.policy, PeftModel):  # not the frozen copy that is the reference
            options["selected_adapters"] = list(self.policy.active_adapters)
        with configured_dropout(self.policy):
            files.call_writer(
                folder, lambda path: self.policy.save_pretrained(str(path), **options)
            )
        for name in options.get("selected_adapters", ()):
            if (folder / name).is_dir():  # PEFT's place for one that is not called default
                for path in sorted((folder / name).iterdir()):
                    files.replace(path, folder / path.name)
                files.remove(folder / name)
        files.call_writer(folder, lambda path: self.tokenizer.save_pretrained(str(path)))
        values = json.loads(self.user_args.to_json_string())
        values[BASE_IN_4BIT] = bool(getattr(unwrap_model(self.policy), "is_loaded_in_4bit", False))
        files.write_text(folder / TRAINING_ARGUMENTS, json.dumps(values, indent=2) + "\n")

    def _checkpoint_bytes(self) -> int:
        """Bytes of the saved weights, two fp32 moments of the trained ones, and the tokenizer."""
        moving = [p for p in self.policy.parameters() if p.requires_grad]
        saved = moving if isinstance(self.policy, PeftModel) else list(self.policy.parameters())
        moments = 0 if self.args.save_only_model else 8 * sum(p.numel() for p in moving)
        return sum(p.nbytes for p in saved) + moments + TOKENIZER_BYTES

    def _load_best_model(self) -> None:
        show_averaged_weights(self.optimizer)  # whose turn, later, would change what is loaded
        super()._load_best_model()

    def require_savable(self) -> None:
        """Refuse, after the first update, a state that the first checkpoint could not hold."""
        args = self.args
        if args.save_strategy != SaveStrategy.NO and not args.save_only_model:
            assert self.optimizer is not None, "training has begun"
            assert self.lr_scheduler is not None, "training has begun"
            checkpoints.require_savable(self.optimizer, self.lr_scheduler, self.policy)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.optimizer is not None, "training has begun"
        assert self.lr_scheduler is not None, "training has begun"
        checkpoints.save_optimizer(Path(output_dir), self.optimizer, self.lr_scheduler, self.policy)
        checkpoints.save_extra_state(Path(output_dir), self.extra_state())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.optimizer is not None, "training is about to begin"
            assert self.lr_scheduler is not None, "training is about to begin"
            with following_options(self.optimizer, self.lr_scheduler):
                checkpoints.load_optimizer(
                    Path(checkpoint), self.optimizer, self.lr_scheduler, self.policy
                )
            checkpoints.load_extra_state(Path(checkpoint), self.extra_state())

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
