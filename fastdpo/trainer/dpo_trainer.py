"""`DPOTrainer`: one readable update over packed pairs, on the shoulders of transformers.Trainer."""

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
)
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy

from fastdpo.batching import PairGroups, PromptGroup
from fastdpo.config import DPOConfig
from fastdpo.losses import LossFunction, needs_reference
from fastdpo.modeling.head import get_lm_head, unwrap_model
from fastdpo.modeling.loading import load_tokenizer
from fastdpo.modeling.logprobs import METRIC_OUTPUTS
from fastdpo.modeling.moe import aux_loss_coef
from fastdpo.modeling.packing import choose_packing
from fastdpo.modeling.reference_model import ReferenceModel
from fastdpo.options import LossOptions, reference_folder
from fastdpo.planner import compare
from fastdpo.ref_cache import RefLogpsProvider, describe_request
from fastdpo.system import files
from fastdpo.trainer.callbacks import CurveNotes, MetricsFile, ProgressLines
from fastdpo.trainer.datasets import PreferenceDatasets
from fastdpo.trainer.eval_metrics import compute_eval_metrics
from fastdpo.trainer.layout import ExecutionLayout, choose_layout, plan_memory, worst_case_batch
from fastdpo.trainer.metrics import TrainingMetrics, num_input_tokens
from fastdpo.trainer.model_card import TrainedModel, library_versions, model_card
from fastdpo.trainer.prepare import prepare_policy, prepare_reference
from fastdpo.trainer.resumable import ResumableTrainer
from fastdpo.trainer.update import Update, nonfinite_reason

logger = logging.getLogger(__name__)


class DPOTrainer(ResumableTrainer):
    """Align a causal LM with preference pairs by Direct Preference Optimization.

    The policy is the model with its adapter on (or all of its weights). The reference is the model
    with the adapter off, or, where training goes on from a trained adapter, a frozen copy of that;
    of a model whose weights are all trained, it as it was before the first update. An update is
    `per_device_train_batch_size * gradient_accumulation_steps` pairs, laid into packed
    micro-batches of at most `micro_batch_tokens` tokens; it does not depend on how they fall.

    Args:
        model: a causal LM, a PeftModel on one, or a folder or hub id.
        ref_model: another reference than the above: a model, its folder or hub id, or the folder
            of an adapter. Rarely needed.
        args: the run's options; `DPOConfig()` by default. Not changed.
        data_collator: must be None; pairs are packed, not padded.
        train_dataset: rows as TRL takes them (a `datasets.Dataset`, a list of dicts, a pandas
            frame) or a `PairDataset`.
        eval_dataset: likewise, or a dict of them by name.
        processing_class: the tokenizer; by default the one that lies beside `model`.
        compute_metrics: must be None; the metrics are computed from log-probs alone.
        callbacks: as in transformers.
        optimizers: as in transformers.
        quantization_config: for a model given by name.
        peft_config: train an adapter of this kind instead of all weights.
        loss_function: a loss of your own in place of `loss_type`; see `fastdpo.losses.PairLogps`.

    Attributes:
        first_update_margin: largest absolute margin of the first update, nats: 0 or rounding,
            unless policy and reference differ from the start; None before it.

    Raises:
        DataError: rows that cannot be used, with their place.
        ModelError: the model or tokenizer cannot be had.
        TypeError, ValueError: an argument or a combination that cannot work, by name.

    Source: arXiv:2305.18290.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel | PeftModel,
        ref_model: str | os.PathLike[str] | PreTrainedModel | PeftModel | None = None,
        args: DPOConfig | None = None,
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        loss_function: LossFunction | None = None,
    ) -> None:
        _refuse(data_collator=data_collator, compute_metrics=compute_metrics)
        args = DPOConfig() if args is None else args
        name = model if isinstance(model, str | os.PathLike) else unwrap_model(model).name_or_path
        tokenizer = processing_class
        if tokenizer is None:
            tokenizer = load_tokenizer(str(name), **args.tokenizer_options)
        policy = prepare_policy(model, args, peft_config, quantization_config)
        self.user_args, self.policy, self.tokenizer = args, policy, tokenizer
        self.loss_function = loss_function
        self.trains_adapter = isinstance(policy, PeftModel)
        self.record = TrainingMetrics()
        vocabulary = get_lm_head(policy).weight.shape[0]
        self.sets = PreferenceDatasets(args, tokenizer, vocabulary, train_dataset, eval_dataset)
        self.command: Sequence[str] = ()
        self.dataset_name: str | None = None
        super().__init__(
            model=policy,
            args=_one_update_per_step(args, self.trains_adapter),
            train_dataset=self.train_groups,
            eval_dataset=self.eval_groups,  # pyrefly: ignore[bad-argument-type]
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,  # pyrefly: ignore[bad-argument-type]
        )
        if self.pop_callback(ProgressCallback) is not None:  # notebooks keep their own
            self.add_callback(ProgressLines())
        self.add_callback(CurveNotes())
        self.add_callback(MetricsFile())
        self.mode = choose_packing(
            policy, packing=args.packing, shared_prefix=args.shared_prefix, attention=args.attention
        )
        logger.info("%s", self.mode.describe())
        reference = prepare_reference(policy, ref_model, args)  # first: it takes memory too
        self.plan = plan_memory(policy, args, self.train_groups, self.mode, self.pairs_per_update)
        self.layout = choose_layout(policy, args, self.train_groups, self.mode, self.plan)
        self.layout.apply(policy)
        self.layout.apply_to_reference(reference.model)
        self.reference = self._source_of(reference)
        self.update = Update(
            policy,
            self.reference.reference,
            args,
            micro_batch_tokens=self.layout.micro_batch_tokens,
            mode=self.mode,
            merge_prompts=args.merge_prompts and self.mode.shared_prefix,
            backward=self.accelerator.backward,
            autocast=self.autocast,
            loss_function=loss_function,
            aux_loss_coef=aux_loss_coef(unwrap_model(policy).config, args.router_aux_loss_coef),
        )
        self.update.most_group_tokens = self.layout.most_group_tokens

    def _source_of(self, reference: ReferenceModel) -> RefLogpsProvider:
        args = self.user_args
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}
        precision = self.accelerator.mixed_precision
        folder = None if args.sync_ref_model else reference_folder(args.ref_cache)
        if folder is None and not reference.is_frozen and self.needs_reference:
            raise ValueError(
                "--ref_cache is off and all weights are trained: the reference is gone after the "
                "first update. Leave --ref_cache out, or train an adapter (--lora, --qlora)."
            )
        return RefLogpsProvider(
            reference,
            folder,
            compute_dtype=mixed.get(precision, unwrap_model(self.policy).dtype),
            micro_batch_tokens=self.layout.micro_batch_tokens,
            mode=self.mode,
            ld_alpha=args.ld_alpha,
            keep_token_logps=args.ref_token_logps == "on",
            strict_versions=args.ref_versions == "strict",
            spot_check_pairs=args.ref_spot_check,
        )

    # Data

    @property
    def train_groups(self) -> PairGroups | None:
        """The training pairs."""
        return self.sets.train

    @property
    def eval_groups(self) -> PairGroups | dict[str, PairGroups] | None:
        """The evaluation pairs, or those of each set by name."""
        return self.sets.eval

    def get_train_dataloader(self) -> DataLoader:
        """Batches of B groups, one batch an update."""
        return self.accelerator.prepare(self.sets.train_loader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """All groups of one evaluation set; `evaluation_loop` packs them itself."""
        return self.sets.eval_loader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As for an evaluation set."""
        return self.get_eval_dataloader(test_dataset)

    @property
    def pairs_per_update(self) -> int:
        """B, as the user's options make it."""
        return self.sets.pairs_per_update

    @property
    def first_update_margin(self) -> float | None:
        """Largest absolute margin of the first update, nats; None before it."""
        return self.record.first_update_margin

    @property
    def needs_reference(self) -> bool:
        """Whether the loss looks at a reference."""
        return needs_reference(self.user_args, self.loss_function)

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision around backbone and head; accelerate wraps only model.forward."""
        return self.accelerator.autocast()

    # The reference

    def compute_references(self) -> None:
        """Fill the reference store for the training and evaluation sets, without training."""
        if self.train_groups is not None:
            self._add_reference(self.train_groups, "train")
        for name, groups in self.sets.eval_by_name.items():
            self._add_reference(groups, name)

    def _add_reference(self, groups: PairGroups, name: str) -> None:
        model_name = unwrap_model(self.policy).name_or_path
        requested = describe_request(groups, self.user_args, self.tokenizer, str(model_name))
        with self.autocast():
            self.reference.fill(groups, name, requested)

    def _ref_logps(self, groups: PairGroups, name: str) -> np.ndarray:
        """(n, 2) float64: stored, computed, or 0 where the loss looks at no reference."""
        if not self.needs_reference:
            return np.zeros((len(groups), 2))
        if self.user_args.sync_ref_model:  # it has moved since the last time
            with self.autocast():
                return self.reference.logps(groups, name)
        self._add_reference(groups, name)
        assert groups.ref_logps is not None, "filled in above"
        return groups.ref_logps

    # Training

    def on_before_train(self) -> None:
        """All references that the first update would take away, or that the store keeps."""
        if self.needs_reference:
            if self.train_groups is not None and self.reference.folder is not None:
                self._add_reference(self.train_groups, "train")
            if not self.reference.reference.is_frozen:
                for name, groups in self.sets.eval_by_name.items():
                    self._add_reference(groups, name)
        self.reference.on_train_begin()
        if self.plan is not None and self.train_groups is not None:
            self._rehearse(worst_case_batch(self.train_groups, self.mode, self.layout))

    def _rehearse(self, groups: list[PromptGroup]) -> None:
        """Run the update that takes the most memory first: if it is too much, it shows now."""
        torch.cuda.reset_peak_memory_stats()
        self.policy.train()
        self.update.probe_memory(groups)
        measured = torch.cuda.max_memory_allocated()
        assert self.plan is not None, "only planned runs are rehearsed"
        logger.info("The fullest micro-batch fits. %s", compare(self.plan, measured))

    def training_step(  # pyrefly: ignore[bad-override]
        self, model: nn.Module, inputs: list[PromptGroup], num_items_in_batch: Any = None
    ) -> Tensor:
        """The gradient of one update of B pairs, micro-batch by micro-batch.

        Returns:
            () float64: the mean loss of the pairs, detached.

        Raises:
            FloatingPointError: loss or gradient is not finite; the weights are as before.
        """
        self.record.start()
        self._follow_policy()
        model.train()
        if callable(train := getattr(self.optimizer, "train", None)):
            train()  # schedule-free optimizers
        result = self.update.run(inputs, METRIC_OUTPUTS if self._logs_this_update() else ())
        # In fp16 the scaler looks at the gradient, and skips by itself.
        unscaled = self.accelerator.scaler is None
        if wrong := nonfinite_reason(self.policy, result, inputs, check_gradient=unscaled):
            self._skip_update(f"update {self.state.global_step + 1}: the {wrong}")
            return result.loss.new_zeros(())
        self.record.add(inputs, result, self.user_args.beta)
        if self.state.global_step == 0 and self.needs_reference:
            logger.info("Largest margin of the first update: %s nats", self.first_update_margin)
        return result.loss

    def _follow_policy(self) -> None:
        """TR-DPO: after every so many updates the reference takes a step towards the policy."""
        args, done = self.user_args, self.state.global_step
        if args.sync_ref_model and done and done % args.ref_model_sync_steps == 0:
            self.reference.reference.update_ema(self.policy, args.ref_model_mixup_alpha)

    def _skip_update(self, wrong: str) -> None:
        for parameter in self.policy.parameters():
            parameter.grad = None
        if self.user_args.nonfinite == "stop":
            raise FloatingPointError(
                f"{wrong}; no weight has changed in this update. Lower the learning rate, train in "
                "bfloat16 or float32, or pass --nonfinite skip to go on without such updates."
            )
        if self.accelerator.scaler is not None:  # which skips what it finds, and must find some
            first = next(p for p in self.policy.parameters() if p.requires_grad)
            first.grad = torch.full_like(first, torch.inf)
        self.record.skipped_updates += 1
        logger.warning("Skipped: %s; no weight has changed.", wrong)

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """TRL's metrics over a set of pairs, every pair weighing the same."""
        groups, args = dataloader.dataset, self.user_args
        assert isinstance(groups, PairGroups), "get_eval_dataloader makes them"
        ref_logps = self._ref_logps(groups, metric_key_prefix)
        with self.autocast():
            metrics = compute_eval_metrics(
                self.policy,
                groups,
                ref_logps,
                args,
                micro_batch_tokens=self.update.micro_batch_tokens,
                mode=self.mode,
                loss_function=self.loss_function,
                description=None if args.disable_tqdm else description,
            )
        metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in metrics.items()}
        return EvalLoopOutput(np.empty(0), None, metrics, num_samples=len(groups))

    # Metrics

    def _logs_this_update(self) -> bool:
        """Whether a log line follows this update: the costly metrics are computed only then."""
        if self.args.logging_strategy != IntervalStrategy.STEPS:
            return self.args.logging_strategy == IntervalStrategy.EPOCH
        step = self.state.global_step + 1
        first = step == 1 and self.args.logging_first_step
        return first or step % max(1, int(self.state.logging_steps)) == 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the updates since the last training log to a training log."""
        if "loss" in logs:
            logs |= self.record.take()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: list[PromptGroup]) -> int:  # pyrefly: ignore[bad-override]
        """6 FLOPs per parameter and token of both rows, as transformers counts them."""
        parameters = unwrap_model(self.policy).num_parameters(exclude_embeddings=True)
        return 6 * num_input_tokens(inputs) * parameters

    def _track_num_input_tokens(self, inputs: list[PromptGroup]) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            self.state.num_input_tokens_seen += num_input_tokens(inputs)

    # The model card

    def create_model_card(  # pyrefly: ignore[bad-override]
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> None:
        """Write README.md into output_dir; TRL's arguments."""
        path = Path(str(self.args.output_dir)) / "README.md"
        files.write_text(path, self._model_card(model_name, dataset_name, tags))

    def _write_model(self, folder: Path, state_dict: Any) -> None:
        super()._write_model(folder, state_dict)
        files.write_text(folder / "README.md", self._model_card())  # in place of PEFT's

    def _model_card(
        self,
        name: str | None = None,
        dataset: str | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> str:
        evaluations = [line for line in self.state.log_history if "eval_loss" in line]
        return model_card(
            TrainedModel(
                name=name or Path(str(self.args.output_dir)).name,
                base_model=str(unwrap_model(self.policy).name_or_path),
                is_adapter=self.trains_adapter,
                reference=self.reference.reference.description,
                args=self.user_args,
                pairs=0 if self.train_groups is None else len(self.train_groups),
                updates=self.state.global_step,
                dataset=dataset or self.dataset_name,
                evaluation=evaluations[-1] if evaluations else {},
                command=self.command,
                tags=[tags] if isinstance(tags, str) else tags or (),
                versions=library_versions(),
            )
        )

    # Resuming

    def resume_signature(self) -> dict[str, Any]:
        """What a resumed run must share with the one that was stopped."""
        args = self.user_args
        return {
            "pairs_per_update": self.pairs_per_update,
            "seed": args.seed,
            "data_seed": args.data_seed,
            "data": None if self.train_groups is None else self.train_groups.content_hash,
            "sampling": str(args.train_sampling_strategy),
            "trains_adapter": self.trains_adapter,
            "loss": {entry.name: getattr(args, entry.name) for entry in fields(LossOptions)},
            "reference": self.reference.reference.description,
        }

    def layout_state(self) -> dict[str, Any]:
        """How the updates are laid out, which a resumed run repeats to the bit."""
        layout = replace(
            self.layout,
            micro_batch_tokens=self.update.micro_batch_tokens,
            most_group_tokens=self.update.most_group_tokens,
        )
        return {"layout": layout.as_json(), "tokens_seen": self.record.tokens_seen}

    def extra_state(self) -> dict[str, Tensor]:
        """Where the reference of TR-DPO has got to."""
        return self.reference.reference.tensors() if self.user_args.sync_ref_model else {}

    def follow(self, plan: Mapping[str, Any]) -> None:
        """Lay updates out as the run that wrote the checkpoint did, unless the user says how."""
        if not plan:
            return
        self.record.tokens_seen = plan["tokens_seen"]
        saved = ExecutionLayout.from_json(plan["layout"])
        if self.user_args.micro_batch_tokens is not None:
            saved = replace(saved, micro_batch_tokens=self.user_args.micro_batch_tokens)
        if saved != self.layout:
            logger.info("Laid out as the run that wrote the checkpoint: %s", saved)
        self.layout = saved
        self.layout.apply(self.policy)
        self.layout.apply_to_reference(self.reference.reference.model)
        self.update.micro_batch_tokens = saved.micro_batch_tokens
        self.update.most_group_tokens = saved.most_group_tokens


def _one_update_per_step(args: DPOConfig, trains_adapter: bool) -> DPOConfig:
    """A copy of the arguments for Trainer, whose step is our update: it must not accumulate again.

    Adapters train without autocast: the frozen base has its dtype, the adapters theirs (fp32).
    """
    own = copy.copy(args)
    own.per_device_train_batch_size *= own.gradient_accumulation_steps
    own.gradient_accumulation_steps = 1
    own.activation_checkpointing = own.gradient_checkpointing = (
        False  # see ExecutionLayout.activation_plan
    )
    if trains_adapter:
        own.bf16 = own.fp16 = False
        own.mixed_precision = "no"  # what transformers 5.23 reads, settled in __post_init__
    return own


def _refuse(**arguments: Any) -> None:
    """Arguments that TRL has and that make no sense here, by name."""
    reasons = {
        "data_collator": "pairs are packed without padding",
        "compute_metrics": "no logits are ever built; every metric of TRL is logged already",
    }
    for name, value in arguments.items():
        if value is not None:
            raise TypeError(f"DPOTrainer takes no {name}: {reasons[name]}. Leave it out.")
