"""Where a run's reference log-probs come from: the store, or the model itself when it is off."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from fastdpo.batching import PairGroups
from fastdpo.modeling.adapters import adapters_off
from fastdpo.modeling.scoring import score_pairs
from fastdpo.reference.filling import reference_logps
from fastdpo.reference.identity import reference_identity
from fastdpo.reference.store import ReferenceStore


class ReferenceSource:
    """The reference of one model: itself with its adapter off, or as it was before training.

    Args:
        model: the policy.
        folder: of all stores, or None to keep nothing.
        compute_dtype: what the matrix products run in.
        micro_batch_tokens: T of the passes.
        shared_prefix: compute what a pair's rows share once.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path | None,
        *,
        compute_dtype: torch.dtype,
        micro_batch_tokens: int,
        shared_prefix: bool,
    ) -> None:
        self.model = model
        self.folder = folder
        self.compute_dtype = compute_dtype
        self.options = {"micro_batch_tokens": micro_batch_tokens, "shared_prefix": shared_prefix}
        self.is_gone = False
        self._store: ReferenceStore | None = None

    def begin_training(self) -> None:
        """From now on the weights move; if all of them do, the reference is gone."""
        self.is_gone = not isinstance(self.model, PeftModel)

    def fill(self, groups: PairGroups, name: str) -> None:
        """Set `groups.ref_logps`, unless it is set already.

        Raises:
            ValueError: the reference is gone.
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
        if self._store is None:
            identity = reference_identity(self.model, self.compute_dtype)
            self._store = ReferenceStore(self.folder, identity)
        groups.ref_logps = reference_logps(
            self.model, groups, self._store, name=name, **self.options
        )
