"""A Trainer whose step is one update of B pairs: computed, checked, and its metrics kept."""

import logging
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import IntervalStrategy

from fastdpo.batching import PromptGroup
from fastdpo.losses import LossFunction, needs_reference
from fastdpo.modeling.base_weights import entries_on_host
from fastdpo.modeling.head import unwrap_model
from fastdpo.modeling.layout import ExecutionLayout
from fastdpo.modeling.logprobs import METRIC_OUTPUTS
from fastdpo.planner import Plan, compare
from fastdpo.ref_cache import RefLogpsProvider
from fastdpo.system import ranks
from fastdpo.trainer.first_margin import check_first_margin, drops_out, is_exact
from fastdpo.trainer.metrics import TrainingMetrics, UpdateResult, num_input_tokens
from fastdpo.trainer.nonfinite import nonfinite_reason, require_finite_step, require_gradient
from fastdpo.trainer.optimizers import (
    show_averaged_weights,
    show_training_weights,
)
from fastdpo.trainer.resumable import ResumableTrainer
from fastdpo.trainer.update import Update

logger = logging.getLogger(__name__)


class UpdateTrainer(ResumableTrainer):
    """A resumable Trainer that takes one step for each update.

    Attributes:
        update: computes the gradient of an update.
        reference: the provider of the reference log-probs.
        layout: T and everything else that lays work out on the device, for updates, the reference
            pass and evaluations alike; lowered where memory runs out.
        plan: the memory plan, or None where there is none.
        record: the metrics of the updates since the last log line.
        loss_function: a loss in place of the built ones, or None.
    """

    update: Update
    reference: RefLogpsProvider
    layout: ExecutionLayout
    plan: Plan | None
    record: TrainingMetrics
    loss_function: LossFunction | None

    @property
    def first_update_margin(self) -> float | None:
        """Largest absolute margin of the first update, nats; None before it.

        It is 0, or rounding, unless policy and reference differ from the start.
        """
        return self.record.first_update_margin

    @property
    def needs_reference(self) -> bool:
        """True where the loss looks at reference log-probs."""
        return needs_reference(self.user_args, self.loss_function)

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference where it is a model of its own; None where it is the policy's adapter off.

        The model before its first update is not kept either: its log-probs are stored by then.
        """
        model = self.reference.reference.model
        return None if model is self.policy else model

    @property
    def aux_loss_enabled(self) -> bool:
        """True where the routers' load-balancing loss of a mixture of experts is added."""
        return self.update.aux_loss_coef != 0.0

    def autocast(self) -> AbstractContextManager[Any]:
        """A context of mixed precision for backbone and head; accelerate wraps model.forward."""
        return self.accelerator.autocast()

    # The step

    def _probe_memory(self, groups: list[PromptGroup]) -> None:
        """Run the update that takes the most memory, so that a lack of it shows at once."""
        torch.cuda.reset_peak_memory_stats()
        self.update.probe_memory(groups)
        measured = torch.cuda.max_memory_allocated()
        assert self.plan is not None, "only planned runs are probed"
        logger.info("The fullest micro-batch fits. %s", compare(self.plan, measured))

    def training_step(  # pyrefly: ignore[bad-override]
        self, model: nn.Module, inputs: list[PromptGroup], num_items_in_batch: Any = None
    ) -> Tensor:
        """Add up the gradient of one update of B pairs, micro-batch by micro-batch.

        Returns:
            () float64: the mean loss of the pairs, detached.

        Raises:
            FloatingPointError: loss or gradient is not finite; the weights are as before, or made
                it so since the update before.
            ValueError: policy and reference differ where they are one, or the gradient of the first
                update is 0 and nothing would ever be trained; the weights are as before.
        """
        self.record.start()
        if self.first_update_margin is None:
            self._require_same_update(inputs)
        self._follow_policy()
        if not model.training:  # of all modules since `on_before_train`, unless a callback did it
            model.train()
        show_training_weights(self.optimizer)
        result = self.update.run(inputs, METRIC_OUTPUTS if self._logs_this_update() else ())
        # In fp16 the scaler looks at the gradient, and skips by itself.
        unscaled = self.accelerator.scaler is None
        if wrong := nonfinite_reason(
            self.update.parameters, result, inputs, check_gradient=unscaled
        ):
            require_finite_step(self.policy, self.state.global_step)
            self._skip_update(f"update {self.state.global_step + 1}: the {wrong}")
            return result.loss.new_zeros(())
        self._check_first_margin(inputs, result)
        if self.state.global_step == 0:
            require_gradient(self.policy)
        self.record.add(inputs, result, self.user_args.beta)
        if self.state.global_step == 0 and self.needs_reference:
            logger.info("Largest margin of the first update: %s nats", self.first_update_margin)
        return result.loss

    def _require_same_update(self, groups: list[PromptGroup]) -> None:
        """Refuse a loader of the user's own that gives each rank other pairs."""
        first, *others = ranks.gathered([[group.row for group in groups]])
        for rank, rows in enumerate(others, 1):
            if rows != first:
                raise ValueError(
                    f"rank {rank} was given other pairs for the first update than rank 0: every "
                    "rank takes the whole update, and its pairs are dealt out here. A "
                    "get_train_dataloader of your own must not split its batches over processes, "
                    "as accelerator.prepare does."
                )

    def _check_first_margin(self, groups: list[PromptGroup], result: UpdateResult) -> None:
        """Look at the first update of a run whose policy and reference are one at its start."""
        reference = self.reference.reference
        is_first = self.first_update_margin is None and self.resumed_from is None
        if not (is_first and self.needs_reference and reference.is_start):
            return
        if drops_out(self.policy, adapter_is_zero=reference.adapter is None):
            return
        exact = is_exact(self.reference.compute_dtype, unwrap_model(self.policy).device)
        check_first_margin(groups, result, exact=exact, action=self.user_args.first_margin)

    def _follow_policy(self) -> None:
        """Move the reference of TR-DPO a step towards the policy, if its turn has come."""
        args, done = self.user_args, self.state.global_step
        if args.sync_ref_model and done and done % args.ref_model_sync_steps == 0:
            show_averaged_weights(self.optimizer)
            self.reference.reference.update_ema(self.policy, args.ref_model_mixup_alpha)

    def _skip_update(self, wrong: str) -> None:
        """Leave the weights as they are in an update with a non-finite loss or gradient."""
        for parameter in self.update.parameters:
            parameter.grad = None
        if self.user_args.nonfinite == "stop":
            raise FloatingPointError(
                f"{wrong}; no weight has changed in this update. Lower the learning rate, train in "
                "bfloat16 or float32, or pass --nonfinite skip to go on without such updates."
            )
        if self.accelerator.scaler is not None:  # which skips what it finds, and must find some
            first = next(p for p in self.update.parameters if p.requires_grad)
            first.grad = torch.full_like(first, torch.inf)
        self.record.skipped_updates += 1
        logger.warning("Skipped: %s; no weight has changed.", wrong)

    # Metrics

    def _logs_this_update(self) -> bool:
        """True before an update that a log follows: costly metrics are computed then."""
        if self.args.logging_strategy != IntervalStrategy.STEPS:
            return self.args.logging_strategy == IntervalStrategy.EPOCH
        step = self.state.global_step + 1
        if step == self.state.max_steps or (step == 1 and self.args.logging_first_step):
            return True
        return step % max(1, int(self.state.logging_steps)) == 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; training logs, the run's last too, get the metrics of the updates before them."""
        if "loss" in logs:
            logs |= self.record.flush()
        elif "train_runtime" in logs and self.record.holds_updates:
            logs |= {name: mean for name, mean in self.record.flush().items() if name != "loss"}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: list[PromptGroup]) -> int:  # pyrefly: ignore[bad-override]
        """6 FLOPs per parameter and token, as transformers counts them: the prompt twice."""
        return 6 * num_input_tokens(inputs) * self._num_parameters

    @cached_property
    def _num_parameters(self) -> int:
        """Entries of the policy's weights, embeddings left out: a walk over all modules."""
        resident = unwrap_model(self.policy).num_parameters(exclude_embeddings=True)
        return resident + entries_on_host(self.policy)

    def _track_num_input_tokens(self, inputs: list[PromptGroup]) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            self.state.num_input_tokens_seen += num_input_tokens(inputs)
