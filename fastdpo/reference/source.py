"""Where a run's reference log-probs come from: the store, or the model itself when it is off."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from fastdpo.batching import PairGroups
from fastdpo.modeling.adapters import adapters_off
from fastdpo.modeling.head import causal_lm_of
from fastdpo.modeling.scoring import score_pairs
from fastdpo.reference.filling import reference_logps
from fastdpo.reference.identity import reference_identity
from fastdpo.reference.store import ReferenceStore
from fastdpo.reference.versions import numeric_versions
from fastdpo.reference.weights import MEMORY


class ReferenceSource:
    """The reference of one model: itself with its adapter off, or as it was before training.

    Args:
        model: the policy.
        folder: of all stores, or None to keep nothing.
        compute_dtype: what the matrix products run in.
        micro_batch_tokens: T of the passes.
        shared_prefix: compute what a pair's rows share once.
        keep_token_logps: store the log-prob of every token beside their sums.
        strict_versions: compute again what other library versions or another card computed.
        spot_check_pairs: how many stored pairs to score again before they are believed.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path | None,
        *,
        compute_dtype: torch.dtype,
        micro_batch_tokens: int,
        shared_prefix: bool,
        keep_token_logps: bool = True,
        strict_versions: bool = False,
        spot_check_pairs: int = 0,
    ) -> None:
        self.model = model
        self.folder = folder
        self.compute_dtype = compute_dtype
        self.options = {"micro_batch_tokens": micro_batch_tokens, "shared_prefix": shared_prefix}
        self.store_options = {
            "keep_token_logps": keep_token_logps,
            "strict_versions": strict_versions,
        }
        self.spot_check_pairs = spot_check_pairs
        self.is_gone = False
        self._store: ReferenceStore | None = None

    def begin_training(self) -> None:
        """From now on the weights move; if all of them do, the reference is gone."""
        self.is_gone = not isinstance(self.model, PeftModel)

    def fill(self, groups: PairGroups, name: str, asked: Mapping[str, Any] | None = None) -> None:
        """Set `groups.ref_logps`, unless it is set already.

        Args:
            groups: of one data set.
            name: of it, for the log.
            asked: what shaped its rows, by option, to explain a later miss.

        Raises:
            ValueError: the reference is gone, or the stored one is not this model's.
            OSError: the store cannot be written.
        """
        if groups.ref_logps is not None:
            return
        if self.is_gone:
            raise ValueError(
                f"the reference of {name} was not computed before the first update, and all "
                "weights have been trained since: pass the data to DPOTrainer as eval_dataset."
            )
        if self.folder is None:
            with adapters_off(self.model):
                scored = score_pairs(
                    self.model, groups, description=f"Reference of {name}", **self.options
                )
            groups.ref_logps = scored.logps
            return
        groups.ref_logps = reference_logps(
            self.model,
            groups,
            self.store(self.folder),
            name=name,
            asked=asked,
            spot_check_pairs=self.spot_check_pairs,
            compute_dtype=self.compute_dtype,
            **self.options,
        )

    def store(self, root: Path) -> ReferenceStore:
        """This reference's store in `root`, identified once."""
        if self._store is None or self._store.root != root:
            identity = reference_identity(self.model, self.compute_dtype, root / MEMORY)
            versions = numeric_versions(causal_lm_of(self.model).device)
            self._store = ReferenceStore(root, identity, versions=versions, **self.store_options)
        return self._store
