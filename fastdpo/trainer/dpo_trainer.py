"""`DPOTrainer`: Direct Preference Optimization over packed pairs, in transformers' Trainer."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import (
    BitsAndBytesConfig,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)
from transformers.trainer_utils import EvalLoopOutput

from fastdpo.batching import PairGroups
from fastdpo.config import DPOConfig
from fastdpo.losses import LossFunction
from fastdpo.modeling.head import get_lm_head, unwrap_model
from fastdpo.modeling.layout import ExecutionLayout
from fastdpo.modeling.loading import load_tokenizer
from fastdpo.modeling.moe import aux_loss_coef
from fastdpo.modeling.packing import choose_packing
from fastdpo.modeling.positions import warn_of_positions
from fastdpo.modeling.trainable import check_trainable
from fastdpo.options import LossOptions
from fastdpo.ref_cache import describe_request
from fastdpo.system import files, ranks
from fastdpo.system.start_up import start_up
from fastdpo.trainer.arguments import check_arguments, refuse_arguments
from fastdpo.trainer.callbacks import CurveNotes, MetricsFile, StartUpTimes
from fastdpo.trainer.curves import CURVES_FILE, draw_curves
from fastdpo.trainer.datasets import PreferenceDatasets
from fastdpo.trainer.eval_metrics import compute_eval_metrics
from fastdpo.trainer.layout import choose_layout, plan_memory, worst_case_batch
from fastdpo.trainer.metrics import TrainingMetrics
from fastdpo.trainer.model_card import TAGS, TrainedModel, model_card
from fastdpo.trainer.optimizers import (
    OPTIMIZER_OPTIONS,
    check_evaluates,
    check_own_optimizer,
    follows_metric,
    refuse_optimizer,
    show_averaged_weights,
)
from fastdpo.trainer.overrides import has_own, refuse_overrides
from fastdpo.trainer.prepare import (
    one_update_per_step,
    prepare_policy,
    prepare_reference,
    reference_provider,
    share_model,
)
from fastdpo.trainer.progress import ProgressLines
from fastdpo.trainer.requirements import require_all
from fastdpo.trainer.update import Update
from fastdpo.trainer.update_trainer import UpdateTrainer
from fastdpo.trainer.watching import watching_callbacks

logger = logging.getLogger(__name__)


class DPOTrainer(UpdateTrainer):
    """Align a causal LM with preference pairs by Direct Preference Optimization.

    The policy is the model with its adapter on, or the model all of whose weights are trained. The
    reference is the model with its adapter off; a frozen copy of the adapter, where training
    continues a trained one; or the model before the first update, where all weights are trained.
    An update is `per_device_train_batch_size * gradient_accumulation_steps` pairs, packed into
    micro-batches of at most `micro_batch_tokens` tokens. Its gradient does not depend on how the
    pairs are packed.

    Args:
        model: a causal LM, a PeftModel on one, or a folder or hub id.
        ref_model: another reference than the above: a model, its folder or hub id, or the folder
            of an adapter. Rarely needed.
        args: the run's options, which stay unchanged; `DPOConfig()` by default.
        data_collator: must be None; pairs are packed, not padded.
        train_dataset: rows as TRL takes them (a `datasets.Dataset`, a list of dicts, a pandas
            frame) or a `PairDataset`.
        eval_dataset: rows as for `train_dataset`, or a dict of such data sets by name.
        processing_class: the tokenizer; by default the one in the folder of `model`.
        compute_metrics: gives further metrics of an evaluation by name, from an `EvalPrediction`
            of its n pairs: there are no logits, so `predictions` are `(logps, ref_logps)`, two
            (n, 2) float64 arrays of chosen and rejected in nats, as the loss takes them, and
            `label_ids` (n,) are zeros, the place of the chosen completion.
        callbacks: further callbacks, as transformers' Trainer takes them.
        optimizers: an optimizer and its scheduler, as transformers' Trainer takes them.
        quantization_config: how to quantize a model that is given by name.
        peft_config: train an adapter of this kind instead of all weights.
        loss_function: a loss of your own in place of `loss_type`; see `fastdpo.losses.PairLogps`.

    Attributes:
        policy: the model that is trained.
        reference: the provider of the reference log-probs.
        layout: T and everything else that lays work out on the device, for updates, the reference
            pass and evaluations alike; lowered where memory runs out.

    Raises:
        DataError: rows cannot be used; the message says where they are.
        ModelError: the model or tokenizer cannot be loaded.
        TypeError, ValueError: an argument or a combination cannot work; the message names it.

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
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        loss_function: LossFunction | None = None,
    ) -> None:
        start_up.trainer_began()
        refuse_overrides(self)
        refuse_arguments(data_collator=data_collator)
        check_arguments(
            model=model,
            ref_model=ref_model,
            args=args,
            processing_class=processing_class,
            peft_config=peft_config,
            optimizers=optimizers,
            loss_function=loss_function,
            compute_metrics=compute_metrics,
        )
        args = DPOConfig() if args is None else args
        own_optimizer, own_schedule = (each is not None for each in optimizers)
        refuse_optimizer(optimizers[0] if own_optimizer else args.optim)
        check_evaluates(optimizers[1], args)
        require_all(args, own_optimizer=own_optimizer, own_schedule=own_schedule)
        name = model if isinstance(model, str | os.PathLike) else unwrap_model(model).name_or_path
        tokenizer = processing_class
        if tokenizer is None:
            tokenizer = load_tokenizer(str(name), **args.tokenizer_options)
        with start_up.part("model"):
            policy = prepare_policy(model, args, peft_config, quantization_config)
        if train_dataset is not None:
            check_trainable(policy)
        if optimizers[0] is not None:
            check_own_optimizer(optimizers[0], policy)
        self.user_args, self.policy, self.tokenizer = args, policy, tokenizer
        self.loss_function = loss_function
        self.trains_adapter = isinstance(policy, PeftModel)
        self.record = TrainingMetrics()
        vocabulary = get_lm_head(policy).weight.shape[0]
        with start_up.part("data"):
            self.sets = PreferenceDatasets(args, tokenizer, vocabulary, train_dataset, eval_dataset)
        warn_of_positions(policy, self.sets.longest_tokens)
        self.command: Sequence[str] = ()
        self.dataset_name: str | None = None
        super().__init__(
            model=policy,
            args=one_update_per_step(args, self.trains_adapter),
            train_dataset=self.train_groups,
            eval_dataset=self.eval_groups,  # pyrefly: ignore[bad-argument-type]
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,  # pyrefly: ignore[bad-argument-type]
        )
        share_model(self.accelerator, policy)
        unwrap_model(policy).add_model_tags(list(TAGS))
        if follows_metric(optimizers[1]) and self.args.metric_for_best_model is None:
            self.args.metric_for_best_model, self.args.greater_is_better = "loss", False
        with_bar = self.pop_callback(ProgressCallback) is not None  # notebooks keep their own
        if with_bar or self.pop_callback(PrinterCallback) is not None:
            self.add_callback(ProgressLines(shows_bar=with_bar))
        for callback in watching_callbacks(self):
            self.add_callback(callback)
        self.add_callback(CurveNotes())
        self.add_callback(StartUpTimes())
        self.add_callback(MetricsFile())
        self.mode = choose_packing(
            policy, packing=args.packing, shared_prefix=args.shared_prefix, attention=args.attention
        )
        logger.info("%s", self.mode.describe())
        reference = prepare_reference(policy, ref_model, args)  # before the plan: it takes memory
        share = -(-self.pairs_per_update // ranks.count())
        self.plan = plan_memory(policy, args, self.train_groups, self.mode, share)
        # The ranks deal an update out by its layout, which has to be one.
        self.layout = ranks.first_does(
            lambda: choose_layout(policy, args, self.train_groups, self.mode, self.plan)
        )
        self.layout.apply(policy)
        self.layout.apply_to_reference(reference.model)
        self.reference = reference_provider(
            policy,
            reference,
            args,
            self.layout,
            self.mode,
            precision=self.accelerator.mixed_precision,
            needed=self.needs_reference,
        )
        self.update = Update(
            policy,
            self.reference.reference,
            args,
            layout=self.layout,
            mode=self.mode,
            backward=self.accelerator.backward,
            autocast=self.autocast,
            loss_function=loss_function,
            aux_loss_coef=aux_loss_coef(unwrap_model(policy), args.router_aux_loss_coef),
        )

    # Data

    @property
    def train_groups(self) -> PairGroups | None:
        """The training pairs, or None."""
        return self.sets.train

    @property
    def eval_groups(self) -> PairGroups | dict[str, PairGroups] | None:
        """The evaluation pairs, those of each set by name where there are several, or None."""
        return self.sets.eval

    def get_train_dataloader(self) -> DataLoader:
        """A loader of batches of B groups, one batch for each update."""
        return self.sets.train_loader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """A loader of one evaluation set's groups; `evaluation_loop` packs them itself."""
        return self.sets.eval_loader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """A loader of a test set's groups, the same as of an evaluation set."""
        return self.get_eval_dataloader(test_dataset)

    @property
    def pairs_per_update(self) -> int:
        """B, from the user's batch size and accumulation steps."""
        return self.sets.pairs_per_update

    # The reference

    def compute_references(self) -> None:
        """Compute and store the reference log-probs of all data sets, without training."""
        if self.train_groups is not None:
            self._add_reference(self.train_groups, "train")
        for name, groups in self.sets.eval_by_name.items():
            self._add_reference(groups, name)

    def _add_reference(
        self, groups: PairGroups, name: str, indices: list[int] | None = None
    ) -> None:
        """Set the reference log-probs of a data set's groups, or of some, stored or computed."""
        model_name = unwrap_model(self.policy).name_or_path
        requested = describe_request(groups, self.user_args, self.tokenizer, str(model_name))
        if indices is not None:
            requested["pairs"] = len(indices)
            logger.info(
                "The run ends after %s of %s pairs of %s: the reference of those alone is needed",
                f"{len(indices):,}",
                f"{len(groups):,}",
                name,
            )
        with start_up.part("reference"), self.autocast():
            self.reference.attach(groups, name, requested, indices)

    def _ref_logps(self, groups: PairGroups, name: str) -> np.ndarray:
        """Reference log-probs of a data set, (n, 2) float64; 0 where the loss looks at none."""
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
        """Compute the references that the store keeps or the first update would change."""
        refuse_overrides(self)  # a method may have been set on the object meanwhile
        if self.needs_reference:
            if self.train_groups is not None and self.reference.folder is not None:
                own_loader = has_own(self, "get_train_dataloader", DPOTrainer)
                used = None if own_loader else self.sets.pairs_trained_on()
                self._add_reference(self.train_groups, "train", used)
            if not self.reference.reference.is_frozen:
                for name, groups in self.sets.eval_by_name.items():
                    self._add_reference(groups, name)
        self.reference.on_train_begin()
        self.policy.train()  # a loaded base is in eval mode below its PeftModel
        if self.plan is not None and self.train_groups is not None:
            fullest = worst_case_batch(self.train_groups, self.mode, self.layout)
            with start_up.part("rehearsal"), ranks.alone():  # each rank probes its own GPU
                self._probe_memory(fullest)
        self.layout.agree()

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Compute TRL's metrics over a set of pairs, every pair weighing the same."""
        groups, args = dataloader.dataset, self.user_args
        assert isinstance(groups, PairGroups), "get_eval_dataloader makes them"
        show_averaged_weights(self.optimizer)
        ref_logps = self._ref_logps(groups, metric_key_prefix)
        with self.autocast():
            metrics = compute_eval_metrics(
                self.policy,
                groups,
                ref_logps,
                args,
                layout=self.layout,
                mode=self.mode,
                loss_function=self.loss_function,
                compute_metrics=self.compute_metrics,
                description=None if args.disable_tqdm else description,
            )
        metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in metrics.items()}
        return EvalLoopOutput(np.empty(0), None, metrics, num_samples=len(groups))

    # The model card

    def create_model_card(  # pyrefly: ignore[bad-override]
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> None:
        """Write the model card, README.md, into output_dir; the arguments are TRL's."""
        path = Path(str(self.args.output_dir)) / "README.md"
        facts = TrainedModel.of(
            self,
            name=model_name,
            dataset=dataset_name,
            tags=[tags] if isinstance(tags, str) else tags or (),
            has_curves=path.with_name(CURVES_FILE).is_file(),
        )
        files.write_text(path, model_card(facts))

    def _write_model(self, folder: Path, state_dict: Any) -> None:
        super()._write_model(folder, state_dict)
        is_checkpoint = self._saving_into is not None
        drawn = not is_checkpoint and draw_curves(self.state.log_history, folder / CURVES_FILE)
        facts = TrainedModel.of(self, has_curves=drawn)
        files.write_text(folder / "README.md", model_card(facts))  # not PEFT's

    # Resuming

    def resume_signature(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the one that was stopped."""
        args = self.user_args
        values = args.to_dict()  # enumerations by their values
        return {
            "pairs_per_update": self.pairs_per_update,
            "seed": args.seed,
            "data_seed": args.data_seed,
            "data": None if self.train_groups is None else self.train_groups.content_hash,
            "template_date": self.sets.template_date,
            "sampling": self.sets.sampling,
            "trains_adapter": self.trains_adapter,
            "loss": {entry.name: getattr(args, entry.name) for entry in fields(LossOptions)},
            "optimizer": {name: values[name] for name in OPTIMIZER_OPTIONS},
            "reference": self.reference.reference.description,
        }

    def adopt_run(self, saved: Mapping[str, Any]) -> None:
        """Give the chat template the date of the run that wrote the checkpoint."""
        now, then = self.sets.template_date, saved.get("template_date")
        if now is None or now == then or self.user_args.template_date is not None:
            return
        if then is None:
            logger.warning(
                "The chat template writes the date, and the checkpoint does not say which: pass "
                "--template_date with the day on which its run began."
            )
            return
        logger.info("The chat template is given %s, the day on which the run began.", then)
        self.sets.tokenize_again(then)
        self.train_dataset = self.train_groups  # pyrefly: ignore
        self.eval_dataset = self.eval_groups  # pyrefly: ignore

    def layout_state(self) -> dict[str, Any]:
        """The layout of the updates, with which a resumed run repeats them to the bit."""
        return {"layout": self.layout.as_json(), "tokens_seen": self.record.tokens_seen}

    def extra_state(self) -> dict[str, Tensor]:
        """The tensors of the moving reference of TR-DPO."""
        return self.reference.reference.tensors() if self.user_args.sync_ref_model else {}

    def load_layout_state(self, state: Mapping[str, Any]) -> None:
        """Lay updates out as the run that wrote the checkpoint did, unless the user says how."""
        if not state:
            return
        self.record.tokens_seen = state["tokens_seen"]
        saved = ExecutionLayout.from_json(state["layout"])
        if self.user_args.micro_batch_tokens is not None:
            saved.micro_batch_tokens = self.user_args.micro_batch_tokens
        if self.user_args.kernels != "auto":
            saved.kernels = self.user_args.kernels
        if self.user_args.base_weights != "auto":
            saved.base_buffers = self.layout.base_buffers
        if saved != self.layout:
            logger.info("Laid out as the run that wrote the checkpoint: %s", saved)
        self.layout.assign(saved)
        self.layout.apply(self.policy)
        self.layout.apply_to_reference(self.reference.reference.model)
