"""`DPOTrainer`: one readable update over packed pairs, on the shoulders of transformers.Trainer."""

import copy
import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy, TrainOutput

from fastdpo.batching import (
    Group,
    MicroBatch,
    PairGroups,
    default_micro_batch_tokens,
    pack_update,
)
from fastdpo.config import DPOConfig
from fastdpo.data import PairDataset, prepare_pairs, rows_from
from fastdpo.data.order import UpdateSampler
from fastdpo.losses import LOSSES
from fastdpo.metrics import MetricSums, Throughput
from fastdpo.modeling.adapters import adapters_off, add_adapter, fuse, require_reference
from fastdpo.modeling.attention import packed_attention
from fastdpo.modeling.head import causal_lm_of, head_of
from fastdpo.modeling.loading import (
    disable_dropout,
    eval_mode,
    load_tokenizer,
    resolve_dtype,
)
from fastdpo.modeling.logprobs import METRIC_OUTPUTS, packed_logprobs
from fastdpo.modeling.scoring import score_pairs
from fastdpo.options import reference_folder
from fastdpo.progress import ProgressLines
from fastdpo.reference import ReferenceSource, asked_for, load_identified
from fastdpo.resumable import ResumableTrainer

logger = logging.getLogger(__name__)


class DPOTrainer(ResumableTrainer):
    """Align a causal LM with preference pairs by Direct Preference Optimization.

    The policy is the model with its adapter on (or all of its weights), the reference the same
    model with the adapter off (or as it was before the first update). An update is
    `per_device_train_batch_size * gradient_accumulation_steps` pairs, laid into packed
    micro-batches of at most `micro_batch_tokens` tokens; it does not depend on how they fall.

    Args:
        model: a causal LM, a PeftModel on one, or a folder or hub id.
        ref_model: must be None; the reference needs no second model.
        args: the run's options; `DPOConfig()` by default. Not changed.
        data_collator: must be None; pairs are packed, not padded.
        train_dataset: rows as TRL takes them (a `datasets.Dataset`, a list of dicts, a pandas
            frame) or a `PairDataset`.
        eval_dataset: likewise, or a dict of them by name.
        processing_class: the tokenizer; by default the one that lies beside `model`.
        compute_metrics: must be None; the figures are computed from log-probs alone.
        callbacks: as in transformers.
        optimizers: as in transformers.
        peft_config: train an adapter of this kind instead of all weights.

    Attributes:
        first_update_margin: largest absolute margin of the first update, nats: 0 or rounding,
            unless the adapter was not new; None before it.

    Raises:
        DataError: rows that cannot be used, with their place.
        ModelError: the model or tokenizer cannot be had.
        TypeError, ValueError: an argument or a combination that cannot work, by name.

    Source: arXiv:2305.18290.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel | PeftModel,
        ref_model: None = None,
        args: DPOConfig | None = None,
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ) -> None:
        _refuse(ref_model=ref_model, data_collator=data_collator, compute_metrics=compute_metrics)
        args = DPOConfig() if args is None else args
        name = model if isinstance(model, str | os.PathLike) else causal_lm_of(model).name_or_path
        tokenizer = load_tokenizer(str(name)) if processing_class is None else processing_class
        policy = self._policy(model, args, peft_config)
        self.trains_adapter = isinstance(policy, PeftModel)
        if not self.trains_adapter and args.ref_cache == "off":
            raise ValueError(
                "--ref_cache is off and all weights are trained: the reference is gone after the "
                "first update. Leave --ref_cache out, or train an adapter (--lora, --qlora)."
            )
        self.user_args, self.policy, self.tokenizer = args, policy, tokenizer
        self._vocabulary_size = head_of(policy).weight.shape[0]
        self._train_sums, self._throughput = MetricSums(), Throughput()
        self._tokens_seen = 0
        self.first_update_margin: float | None = None
        self.train_groups = self._groups(train_dataset, "train")
        self.eval_groups = self._eval_groups(eval_dataset)
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
        self.micro_batch_tokens = args.micro_batch_tokens or default_micro_batch_tokens(
            causal_lm_of(policy).device
        )
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}
        self.reference = ReferenceSource(
            policy,
            reference_folder(args.ref_cache),
            compute_dtype=mixed.get(self.accelerator.mixed_precision, causal_lm_of(policy).dtype),
            micro_batch_tokens=self.micro_batch_tokens,
            shared_prefix=self.shares_prefix,
            keep_token_logps=args.ref_token_logps == "on",
            strict_versions=args.ref_versions == "strict",
            spot_check_pairs=args.ref_spot_check,
        )

    # The policy and its data

    @staticmethod
    def _policy(
        model: str | os.PathLike[str] | PreTrainedModel | PeftModel,
        args: DPOConfig,
        peft_config: PeftConfig | None,
    ) -> PreTrainedModel | PeftModel:
        if isinstance(model, str | os.PathLike):
            model = load_identified(
                str(model), dtype=resolve_dtype("auto"), options=args.from_pretrained_options
            )
        elif args.model_init_kwargs:
            raise ValueError(
                "model_init_kwargs are for a model given by name; this one is loaded already. Pass "
                "them to from_pretrained."
            )
        if args.disable_dropout:
            disable_dropout(model)
        if peft_config is None:
            fuse(model)
        else:
            set_seed(args.seed)  # the adapter's first weights belong to the run's seed
            model = add_adapter(model, peft_config)
        require_reference(model)
        return model

    def _groups(self, dataset: Any, name: str) -> PairGroups | None:
        """Rows to groups; a dataset that is prepared already stays as it is."""
        if dataset is None or isinstance(dataset, PairGroups):
            return dataset
        if not isinstance(dataset, PairDataset):
            args = self.user_args
            dataset = prepare_pairs(
                rows_from(dataset, f"{name} dataset"),
                self.tokenizer,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                special_tokens_in_content=args.special_tokens_in_content,
                strict_data=args.strict_data,
                vocabulary_size=self._vocabulary_size,
                progress=not args.disable_tqdm,
            )
            logger.info("%s", dataset.report.describe())
        return PairGroups(dataset)

    def _eval_groups(self, dataset: Any) -> PairGroups | dict[str, PairGroups] | None:
        if not isinstance(dataset, dict):
            return self._groups(dataset, "eval")
        prepared = {name: self._groups(part, name) for name, part in dataset.items()}
        return {name: groups for name, groups in prepared.items() if groups is not None}

    def get_train_dataloader(self) -> DataLoader:
        """Batches of B groups, one batch an update."""
        if self.train_groups is None:
            raise ValueError("there is no train_dataset: pass one to DPOTrainer.")
        args = self.user_args
        sampler = UpdateSampler(
            len(self.train_groups),
            self.pairs_per_update,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.train_sampling_strategy != "sequential",
            drop_last=args.dataloader_drop_last,
        )
        loader = DataLoader(
            self.train_groups, batch_sampler=sampler, collate_fn=list, generator=torch.Generator()
        )
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """All groups of one evaluation set; `evaluation_loop` packs them itself."""
        if isinstance(eval_dataset, str):
            eval_dataset = dict(self._eval_sets())[eval_dataset]
        groups = self._groups(self.eval_groups if eval_dataset is None else eval_dataset, "eval")
        if groups is None:
            raise ValueError("there is no eval_dataset: pass one to DPOTrainer or evaluate().")
        return DataLoader(groups, batch_size=self.pairs_per_update, collate_fn=list)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As for an evaluation set."""
        return self.get_eval_dataloader(test_dataset)

    def _eval_sets(self) -> list[tuple[str, PairGroups]]:
        if isinstance(self.eval_groups, dict):
            return list(self.eval_groups.items())
        return [] if self.eval_groups is None else [("eval", self.eval_groups)]

    @property
    def pairs_per_update(self) -> int:
        """B, as the user's options make it."""
        args = self.user_args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps

    @property
    def shares_prefix(self) -> bool:
        """Whether the tokens that a pair's rows share are computed once."""
        return self.user_args.shared_prefix != "off"

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision around backbone and head; accelerate wraps only model.forward."""
        return self.accelerator.autocast()

    def _add_reference(self, groups: PairGroups, name: str) -> None:
        model_name = causal_lm_of(self.policy).name_or_path
        asked = asked_for(groups, self.user_args, self.tokenizer, str(model_name))
        with self.autocast():
            self.reference.fill(groups, name, asked)

    def compute_references(self) -> None:
        """Fill the reference store for the training and evaluation sets, without training."""
        sets = [] if self.train_groups is None else [("train", self.train_groups)]
        for name, groups in sets + self._eval_sets():
            self._add_reference(groups, name)

    # Training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, or go on from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest one in output_dir
                that verifies.
            trial: as in transformers.
            ignore_keys_for_eval: not used.

        Raises:
            CheckpointError: the checkpoint is damaged or belongs to another run.
            FloatingPointError: the loss is not finite; the weights are as before that update.
        """
        folder = self.checkpoint_to_resume(resume_from_checkpoint)
        if self.train_groups is not None and self.reference.folder is not None:
            self._add_reference(self.train_groups, "train")
        if not self.trains_adapter:
            for name, groups in self._eval_sets():
                self._add_reference(groups, name)
        self.reference.begin_training()
        return super().train(None if folder is None else str(folder), trial, ignore_keys_for_eval)

    def training_step(  # pyrefly: ignore[bad-override]
        self, model: nn.Module, inputs: list[Group], num_items_in_batch: Any = None
    ) -> Tensor:
        """The gradient of one update of B pairs, micro-batch by micro-batch.

        Returns:
            () float64: the mean loss of the pairs, detached.
        """
        self._throughput.start()
        model.train()
        if callable(train := getattr(self.optimizer, "train", None)):
            train()  # schedule-free optimizers
        micro_batches = [
            micro_batch.to(self.args.device)
            for micro_batch in pack_update(
                inputs, self.micro_batch_tokens, shared_prefix=self.shares_prefix
            )
        ]
        with packed_attention(causal_lm_of(self.policy).config):
            references = [m.ref_logps for m in micro_batches if m.ref_logps is not None]
            parts = [
                self._backward(micro_batch, reference, len(inputs))
                for micro_batch, reference in zip(
                    micro_batches, references or self._references_now(micro_batches), strict=True
                )
            ]
        loss = torch.stack([part for part, _ in parts]).sum()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of update {self.state.global_step + 1} is {loss.item()}; no weight has "
                "changed in this update. Lower the learning rate, or train in bfloat16 or float32."
            )
        if self.state.global_step == 0:
            self.first_update_margin = float(torch.cat([m for _, m in parts]).abs().max())
            logger.info("Largest margin of the first update: %s nats", self.first_update_margin)
        self._count(inputs, micro_batches)
        return loss

    def _backward(
        self, micro_batch: MicroBatch, ref_logps: Tensor, pairs: int
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of one micro-batch; its part of the mean loss, () and its margins."""
        args = self.user_args
        outputs = METRIC_OUTPUTS if self._logs_this_update() else ()
        with self.autocast():
            found = packed_logprobs(self.policy, micro_batch, outputs)
        logps, reference = found.logps.view(-1, 2), ref_logps.view(-1, 2)
        logratios = logps - reference
        loss = self._pair_losses(logratios).sum() / pairs
        self.accelerator.backward(loss)
        self._train_sums.add_rewards(logps, reference, args.beta)
        if outputs:
            self._train_sums.add_tokens(micro_batch.completion_tokens, **found.extras)
        return loss.detach(), (logratios[:, 0] - logratios[:, 1]).detach()

    def _pair_losses(self, logratios: Tensor) -> Tensor:
        """(B, 2) log-ratios of chosen and rejected to (B,) losses."""
        args = self.user_args
        return LOSSES[args.loss_type[0]](logratios[:, 0], logratios[:, 1], beta=args.beta)

    def _references_now(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Reference log-probs of the very micro-batches that are about to be trained on."""
        with adapters_off(self.policy), eval_mode(self.policy), torch.no_grad(), self.autocast():
            return [packed_logprobs(self.policy, m).logps for m in micro_batches]

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """TRL's figures over a set of pairs, every pair weighing the same."""
        groups, args = dataloader.dataset, self.user_args
        assert isinstance(groups, PairGroups), "get_eval_dataloader makes them"
        self._add_reference(groups, metric_key_prefix)
        with self.autocast():
            scored = score_pairs(
                self.policy,
                groups,
                micro_batch_tokens=self.micro_batch_tokens,
                shared_prefix=self.shares_prefix,
                outputs=METRIC_OUTPUTS,
                description=None if args.disable_tqdm else description,
            )
        assert groups.ref_logps is not None, "filled in above"
        logps, reference = torch.from_numpy(scored.logps), torch.from_numpy(groups.ref_logps)
        logratios = logps - reference
        sums = MetricSums()
        sums.add("loss", self._pair_losses(logratios))
        sums.add_rewards(logps, reference, args.beta)
        sums.add_tokens(torch.from_numpy(scored.tokens.reshape(-1)), **scored.extras)
        metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in sums.averages().items()}
        return EvalLoopOutput(np.empty(0), None, metrics, num_samples=len(groups))

    # Figures

    def _logs_this_update(self) -> bool:
        """Whether a log line follows this update: the costly figures are computed only then."""
        if self.args.logging_strategy != IntervalStrategy.STEPS:
            return self.args.logging_strategy == IntervalStrategy.EPOCH
        step = self.state.global_step + 1
        first = step == 1 and self.args.logging_first_step
        return first or step % max(1, int(self.state.logging_steps)) == 0

    def _count(self, groups: Sequence[Group], micro_batches: Sequence[MicroBatch]) -> None:
        both_rows = [2 * len(g.prompt_ids) + sum(map(len, g.completions)) for g in groups]
        self._tokens_seen += sum(both_rows)
        self._throughput.add(len(groups), sum(m.real_tokens for m in micro_batches))
        if self.args.include_num_input_tokens_seen != "no":
            self.state.num_input_tokens_seen += sum(both_rows)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures of the updates since the last training log to a training log."""
        if "loss" in logs:
            logs |= self._train_sums.averages() | self._throughput.figures()
            logs["num_tokens"] = self._tokens_seen
            if torch.cuda.is_available():
                logs["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            self._train_sums.clear()
            self._throughput = Throughput()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: list[Group]) -> int:  # pyrefly: ignore[bad-override]
        """6 FLOPs per parameter and token of both rows, as transformers counts them."""
        tokens = sum(2 * len(g.prompt_ids) + sum(map(len, g.completions)) for g in inputs)
        return 6 * tokens * causal_lm_of(self.policy).num_parameters(exclude_embeddings=True)

    def _track_num_input_tokens(self, inputs: list[Group]) -> None:
        """Counted in `_count`."""

    def run_description(self) -> dict[str, Any]:
        """What a resumed run must share with the one that was stopped."""
        args = self.user_args
        return {
            "pairs_per_update": self.pairs_per_update,
            "seed": args.seed,
            "data_seed": args.data_seed,
            "data": None if self.train_groups is None else self.train_groups.content_hash,
            "sampling": str(args.train_sampling_strategy),
            "trains_adapter": self.trains_adapter,
            "beta": args.beta,
            "loss_type": list(args.loss_type),
        }


def _one_update_per_step(args: DPOConfig, trains_adapter: bool) -> DPOConfig:
    """A copy of the arguments for Trainer, whose step is our update: it must not accumulate again.

    Adapters train without autocast: the frozen base has its dtype, the adapters theirs (fp32).
    """
    own = copy.copy(args)
    own.per_device_train_batch_size *= own.gradient_accumulation_steps
    own.gradient_accumulation_steps = 1
    if trains_adapter:
        own.bf16 = own.fp16 = False
        own.mixed_precision = "no"  # what transformers 5.23 reads, settled in __post_init__
    return own


def _refuse(**arguments: Any) -> None:
    """Arguments that TRL has and that make no sense here, by name."""
    reasons = {
        "ref_model": "the reference is the model itself with its adapter off, or its own log-probs "
        "from before the first update",
        "data_collator": "pairs are packed without padding",
        "compute_metrics": "no logits are ever built; every figure of TRL is logged already",
    }
    for name, value in arguments.items():
        if value is not None:
            raise TypeError(f"DPOTrainer takes no {name}: {reasons[name]}. Leave it out.")
