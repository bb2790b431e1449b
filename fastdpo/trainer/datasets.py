"""The data sets of a run as groups of token ids, and the loaders that hand them out."""

import copy
import logging
import math
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from fastdpo.batching import PairGroups, longest_sequence
from fastdpo.batching.sampler import UpdateSampler
from fastdpo.config import DPOConfig
from fastdpo.data.template_date import today
from fastdpo.system import ranks
from fastdpo.trainer.prepare import tokenize_dataset

logger = logging.getLogger(__name__)


class PreferenceDatasets:
    """The training set and the evaluation sets of one run.

    Args:
        args: the options of the run.
        tokenizer: the policy's tokenizer.
        vocabulary_size: number of tokens that the policy's head scores.
        train_dataset: rows as TRL takes them, a `PairDataset`, or None.
        eval_dataset: rows as for `train_dataset`, or a dict of such data sets by name.

    Attributes:
        train: the training pairs, or None.
        eval: the evaluation pairs, or those of each set by name, or None.
    """

    def __init__(
        self,
        args: DPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary_size: int,
        train_dataset: Any,
        eval_dataset: Any,
    ) -> None:
        self.args = copy.copy(args)
        self.args.template_date = args.template_date or ranks.first_does(today)
        self.tokenizer, self.vocabulary_size = tokenizer, vocabulary_size
        self._given = train_dataset, eval_dataset
        self._tokenize(train_dataset, eval_dataset)
        if self.template_date is None:
            self._given = None, None  # they will not be read again

    def _tokenize(self, train_dataset: Any, eval_dataset: Any) -> None:
        args = self.args
        needed = self.pairs_per_update * args.max_steps if args.max_steps > 0 else None
        self.train = self.tokenized(train_dataset, "train", limit=needed)
        self._require_an_update()
        self._tell_of_lists()
        self.eval: PairGroups | dict[str, PairGroups] | None
        if isinstance(eval_dataset, Mapping):
            parts = {name: self.tokenized(part, name) for name, part in eval_dataset.items()}
            self.eval = {name: groups for name, groups in parts.items() if groups is not None}
        else:
            self.eval = self.tokenized(eval_dataset, "eval")

    def _require_an_update(self) -> None:
        """Raise ValueError where drop_last, which drops updates that are not full, leaves none."""
        if self.train is None or not self.args.dataloader_drop_last:
            return
        if not len(self.sampler()):
            raise ValueError(
                f"{len(self.train):,} pairs and {self.pairs_per_update:,} an update leave no "
                "update, as --dataloader_drop_last drops those that are not full: leave it out, or "
                "lower --per_device_train_batch_size."
            )

    def _tell_of_lists(self) -> None:
        """Log that pairs are kept together, and how full that leaves the updates."""
        if self.train is None or not (sampler := self.sampler()).keeps_together:
            return
        several = [len(members) for members in sampler.lists if len(members) > 1]
        logger.info(
            "%s of %s pairs share a completion with another pair of their prompt, in lists of up "
            "to %s: each such completion is computed once an update. The pairs of a list stay in "
            "one update, so an update has %s pairs on average, of at most %s.",
            f"{sum(several):,}",
            f"{len(self.train):,}",
            max(several),
            f"{np.mean([sum(sizes) for sizes in sampler.plan]):.1f}",
            self.pairs_per_update,
        )

    @property
    def longest_tokens(self) -> int:
        """The tokens of the longest prompt + completion of all sets; 0 without any."""
        sets = [self.train, *self.eval_by_name.values()]
        return max((longest_sequence(groups) for groups in sets if groups is not None), default=0)

    @property
    def template_date(self) -> str | None:
        """The day, as 2025-06-30, that the chat template wrote into these sets; None if none."""
        sets = [*([] if self.train is None else [self.train]), *self.eval_by_name.values()]
        return next((day for each in sets if (day := each.pairs.report.template_date)), None)

    def tokenize_again(self, day: str) -> None:
        """Tokenize the same rows with another day in the chat template; pairs stay as they are."""
        self.args.template_date = day
        self._tokenize(*self._given)

    @property
    def pairs_per_update(self) -> int:
        """B, from the user's batch size and accumulation steps."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps

    @property
    def sampling(self) -> str | None:
        """The rule of the order of the pairs, beside the seed; None without training pairs."""
        if self.train is None:
            return None
        together = ", lists together" if self.sampler().keeps_together else ""
        return f"{self.args.train_sampling_strategy}{together}"

    @property
    def eval_by_name(self) -> dict[str, PairGroups]:
        """The evaluation sets; a single one is called eval."""
        if isinstance(self.eval, dict):
            return self.eval
        return {} if self.eval is None else {"eval": self.eval}

    def tokenized(self, dataset: Any, name: str, limit: int | None = None) -> PairGroups | None:
        """The groups of a data set's rows; groups and None are returned as they are."""
        return tokenize_dataset(
            dataset, name, self.args, self.tokenizer, self.vocabulary_size, limit=limit
        )

    def train_loader(self) -> DataLoader:
        """A loader of batches of B groups, one batch for each update; accelerate resumes it."""
        if self.train is None:
            raise ValueError("there is no train_dataset: pass one to DPOTrainer.")
        loader = DataLoader(
            self.train, batch_sampler=self.sampler(), collate_fn=list, generator=torch.Generator()
        )
        # Every rank gets whole updates.
        return prepare_data_loader(loader, num_processes=1, process_index=0)

    def sampler(self) -> UpdateSampler:
        """The updates of an epoch over the training pairs, of which there are some."""
        assert self.train is not None, "asked for by whoever trains"
        args = self.args
        return UpdateSampler(
            self.train.lists,
            self.pairs_per_update,
            seed=args.seed if args.data_seed is None else args.data_seed,
            shuffle=args.train_sampling_strategy != "sequential",
            drop_last=args.dataloader_drop_last,
        )

    def pairs_trained_on(self) -> list[int] | None:
        """The pairs of the updates of a run that ends before each pair was seen; else None."""
        sampler, args = self.sampler(), self.args
        updates = args.max_steps
        if updates <= 0:
            updates = math.ceil(args.num_train_epochs * len(sampler))
        if updates >= len(sampler):
            return None
        return sorted(pair for update in islice(sampler, updates) for pair in update)

    def pairs_seen(self, updates: int) -> int:
        """How many pairs so many updates have, each counted as often as it occurs."""
        if self.train is None:
            return 0
        sampler = self.sampler()
        epochs, rest = divmod(updates, len(sampler))
        sampler.set_epoch(epochs)
        whole = epochs * sum(map(sum, sampler.plan))
        return whole + sum(map(len, islice(sampler, rest)))

    def eval_loader(self, dataset: Any = None) -> DataLoader:
        """A loader of all groups of one evaluation set.

        Args:
            dataset: rows, groups, or the name of one of this run's sets; None is this run's set.
        """
        if isinstance(dataset, str):
            dataset = self.eval_by_name[dataset]
        groups = self.tokenized(self.eval if dataset is None else dataset, "eval")
        if groups is None:
            raise ValueError("there is no eval_dataset: pass one to DPOTrainer or evaluate().")
        return DataLoader(groups, batch_size=self.pairs_per_update, collate_fn=list)
