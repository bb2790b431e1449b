"""Where a run's reference log-probs come from: the store, or the reference model itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdpo.batching import PairGroups, PromptGroup
from fastdpo.losses import ld_logps
from fastdpo.modeling.head import unwrap_model
from fastdpo.modeling.packing import PackingMode, choose_packing
from fastdpo.modeling.reference_model import ReferenceModel
from fastdpo.modeling.scoring import score_groups
from fastdpo.modeling.weight_hash import HASH_CACHE_FILE
from fastdpo.ref_cache.compute import reference_logps
from fastdpo.ref_cache.identity import reference_identity
from fastdpo.ref_cache.store import ReferenceStore, group_keys
from fastdpo.system.versions import numeric_versions


class RefLogpsProvider:
    """The log-probs of one reference.

    Args:
        reference: the model, and how it is run as the reference.
        folder: of all stores, or None to keep nothing: for `--ref_cache off`, and for a reference
            that moves.
        compute_dtype: what the matrix products run in.
        micro_batch_tokens: T of the passes.
        mode: how pairs run through the model; None chooses.
        ld_alpha: weight of what lies beyond a pair's shorter completion; None is 1.
        keep_token_logps: store the log-prob of every token beside their sums.
        strict_versions: compute again what other library versions or another GPU computed.
        spot_check_pairs: how many stored pairs to score again before they are believed.
    """

    def __init__(
        self,
        reference: ReferenceModel,
        folder: Path | None,
        *,
        compute_dtype: torch.dtype,
        micro_batch_tokens: int,
        mode: PackingMode | None = None,
        ld_alpha: float | None = None,
        keep_token_logps: bool = True,
        strict_versions: bool = False,
        spot_check_pairs: int = 0,
    ) -> None:
        self.reference = reference
        self.folder = folder
        self.compute_dtype = compute_dtype
        self.mode = choose_packing(reference.model) if mode is None else mode
        self.options = {"micro_batch_tokens": micro_batch_tokens, "mode": self.mode}
        self.ld_alpha = ld_alpha
        self.store_options = {
            "keep_token_logps": keep_token_logps,
            "strict_versions": strict_versions,
        }
        self.spot_check_pairs = spot_check_pairs
        self.is_stale = False
        self._store: ReferenceStore | None = None

    def on_train_begin(self) -> None:
        """From now on the policy moves, and with it a reference that is the policy itself."""
        self.is_stale = not self.reference.is_frozen

    def logps(
        self, groups: PairGroups, name: str, requested: Mapping[str, Any] | None = None
    ) -> np.ndarray:
        """(n, 2) float64 of chosen and rejected, nats, as the loss takes them.

        Args:
            groups: of one data set.
            name: of it, for the log.
            requested: what shaped its rows, by option, to explain a later miss.

        Raises:
            ValueError: the reference is gone, or the stored one is not this model's.
            OSError: the store cannot be written.
        """
        if self.is_stale:
            raise ValueError(
                f"the reference of {name} was not computed before the first update, and all "
                "weights have been trained since: pass the data to DPOTrainer as eval_dataset."
            )
        if self.folder is None:
            return self._computed(groups, name)
        store = self.store(self.folder)
        logps = reference_logps(
            self.reference,
            groups,
            store,
            name=name,
            requested=requested,
            spot_check_pairs=self.spot_check_pairs,
            compute_dtype=self.compute_dtype,
            **self.options,
        )
        if self.ld_alpha is None:
            return logps
        keys = [key for group in groups for key in group_keys(group)]
        return self._ld_weighted(store.token_logps(keys))

    def fill(
        self, groups: PairGroups, name: str, requested: Mapping[str, Any] | None = None
    ) -> None:
        """Set `groups.ref_logps`, unless it is set already; otherwise as `logps`."""
        if groups.ref_logps is None:
            groups.ref_logps = self.logps(groups, name, requested)

    def store(self, root: Path) -> ReferenceStore:
        """This reference's store in `root`, identified once."""
        if self._store is None or self._store.root != root:
            model = self.reference.model
            identity = reference_identity(
                model,
                self.compute_dtype,
                root / HASH_CACHE_FILE,
                self.reference,
                self.mode.attention,
            )
            versions = numeric_versions(unwrap_model(model).device)
            self._store = ReferenceStore(root, identity, versions=versions, **self.store_options)
        return self._store

    def _computed(self, groups: Sequence[PromptGroup], name: str) -> np.ndarray:
        model = self.reference.model
        with self.reference.active():
            scored = sorted(
                score_groups(model, groups, description=f"Reference of {name}", **self.options),
                key=lambda each: each.index,
            )
        if self.ld_alpha is None:
            return np.stack([each.logps for each in scored])
        return self._ld_weighted([part for each in scored for part in each.token_logps])

    def _ld_weighted(self, token_logps: Sequence[np.ndarray]) -> np.ndarray:
        """(n, 2) float64, nats, from the token log-probs of chosen and rejected in turns."""
        assert self.ld_alpha is not None, "asked for"
        lengths = torch.tensor([len(each) for each in token_logps])
        shared = lengths.view(-1, 2).amin(dim=1).repeat_interleave(2)
        per_token = torch.from_numpy(np.concatenate(token_logps))
        return ld_logps(per_token, lengths, shared, self.ld_alpha).view(-1, 2).numpy()
