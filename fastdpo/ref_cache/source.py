"""Where a run's reference log-probs come from: the store, or the reference model itself."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdpo.batching import PairGroups, PromptGroup
from fastdpo.losses import TokenLogps, weighted_logps
from fastdpo.modeling.head import unwrap_model
from fastdpo.modeling.layout import ExecutionLayout
from fastdpo.modeling.packing import PackingMode, choose_packing
from fastdpo.modeling.reference_model import ReferenceModel
from fastdpo.modeling.scoring import ScoredPairs, score_pairs
from fastdpo.options import LossOptions
from fastdpo.ref_cache.compute import reference_logps
from fastdpo.ref_cache.hash_cache import HASH_CACHE_FILE
from fastdpo.ref_cache.identity import reference_identity
from fastdpo.ref_cache.store import ReferenceStore, StoreOptions, keys_of
from fastdpo.system import ranks
from fastdpo.system.versions import numeric_versions


class RefLogpsProvider:
    """The log-probs of one reference.

    Args:
        reference: the model, and how it is run as the reference.
        folder: folder of all stores, or None to keep nothing: for `--ref_cache off`, and for a
            reference that moves.
        compute_dtype: dtype of the matrix products.
        layout: bounds the micro-batches of the passes, and is lowered where memory runs out.
        mode: how pairs run through the model; None chooses.
        loss: decides how the tokens of a completion are weighed; None sums them up.
        store_options: how the run uses its store.
    """

    def __init__(
        self,
        reference: ReferenceModel,
        folder: Path | None,
        *,
        compute_dtype: torch.dtype,
        layout: ExecutionLayout,
        mode: PackingMode | None = None,
        loss: LossOptions | None = None,
        store_options: StoreOptions = StoreOptions(),  # noqa: B008 (it is frozen)
    ) -> None:
        self.reference = reference
        self.folder = folder
        self.compute_dtype = compute_dtype
        self.mode = choose_packing(reference.model) if mode is None else mode
        self.options = {"layout": layout, "mode": self.mode}
        self.loss = LossOptions() if loss is None else loss
        self.store_options = store_options
        self.is_stale = False
        self._store: ReferenceStore | None = None

    def on_train_begin(self) -> None:
        """Note that the policy moves from now on, and with it a reference that is the policy."""
        self.is_stale = not self.reference.is_frozen

    def logps(
        self, groups: Sequence[PromptGroup], name: str, requested: Mapping[str, Any] | None = None
    ) -> np.ndarray:
        """(n, 2) float64 log-probs of chosen and rejected in nats, as the loss takes them.

        Args:
            groups: the pairs of one data set.
            name: name of the data set, for the log.
            requested: the options that shaped its rows, to explain a later miss.

        Raises:
            ValueError: the reference is gone, or the stored one is not this model's.
            OSError: the store cannot be written.
        """
        if self.is_stale:
            raise ValueError(
                f"Cannot compute reference log-probs for a dataset passed to evaluate() ({name}): "
                "all weights have been trained since the reference was there. Pass it to "
                "DPOTrainer as eval_dataset, or pass a ref_model."
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
            compute_dtype=self.compute_dtype,
            **self.options,
        )
        if not self.loss.weighs_tokens:
            return logps
        token_logps = store.token_logps(keys_of(groups).ravel())
        tokens = np.array([len(each) for each in token_logps], dtype=np.int64).reshape(-1, 2)
        flat = torch.from_numpy(np.concatenate(token_logps))
        return self._weighted(ScoredPairs(logps, tokens, flat, {}))

    def attach(
        self,
        groups: PairGroups,
        name: str,
        requested: Mapping[str, Any] | None = None,
        indices: Sequence[int] | None = None,
    ) -> None:
        """Set `groups.ref_logps` to what `logps` returns, unless it is set already.

        Args:
            groups: the pairs of one data set.
            name: name of the data set, for the log.
            requested: the options that shaped its rows, to explain a later miss.
            indices: the pairs that are needed, the others get NaN; None for all of them.
        """
        part = slice(None) if indices is None else list(indices)
        if groups.ref_logps is not None and not np.isnan(groups.ref_logps[part]).any():
            return
        needed = groups if indices is None else [groups[index] for index in indices]
        logps = self.logps(needed, name, requested)
        groups.ref_logps = np.full((len(groups), 2), np.nan)
        groups.ref_logps[part] = logps

    def store(self, root: Path) -> ReferenceStore:
        """The store of this reference in `root`; the weights are hashed once."""
        if self._store is None or self._store.root != root:
            model = self.reference.model
            identity = ranks.first_does(
                lambda: reference_identity(
                    model,
                    self.compute_dtype,
                    root / HASH_CACHE_FILE,
                    self.reference,
                    self.mode.attention,
                )
            )
            versions = numeric_versions(unwrap_model(model).device)
            self._store = ReferenceStore(
                root, identity, versions=versions, options=self.store_options
            )
        return self._store

    def _computed(self, groups: Sequence[PromptGroup], name: str) -> np.ndarray:
        description = f"Reference of {name}"
        with self.reference.active():
            scored = score_pairs(
                self.reference.model, groups, description=description, **self.options
            )
        if not self.loss.weighs_tokens:
            return scored.logps
        return self._weighted(scored)

    def _weighted(self, scored: ScoredPairs) -> np.ndarray:
        """(n, 2) float64 in nats, with tokens weighed as the loss weighs the policy's."""
        lengths = torch.from_numpy(scored.tokens)
        tokens = TokenLogps(
            torch.from_numpy(scored.logps).flatten(),
            scored.token_logps,
            lengths.flatten(),
            lengths.repeat_interleave(2, dim=0),
        )
        return weighted_logps(tokens, self.loss).view(-1, 2).numpy()
