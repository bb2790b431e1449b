"""The reference pass: look up what is known, compute the rest with the adapters off, keep it."""

import contextlib
import logging
from collections.abc import Sequence

import numpy as np
from torch import nn

from fastdpo.batching import Group
from fastdpo.modeling.adapters import adapters_off
from fastdpo.modeling.scoring import score_groups
from fastdpo.reference.store import ReferenceStore, ScoredCompletion, group_keys

logger = logging.getLogger(__name__)

SHARD_COMPLETIONS = 4096
"""Completions per shard: what a killed run loses at most."""


def reference_logps(
    model: nn.Module,
    groups: Sequence[Group],
    store: ReferenceStore,
    *,
    micro_batch_tokens: int,
    shared_prefix: bool = True,
    name: str = "train",
) -> np.ndarray:
    """Reference log-probs of all groups, each computed once in its life.

    Args:
        model: the policy; its adapters are off during the pass and as before afterwards.
        groups: n groups of k completions each.
        store: where known log-probs are found and new ones are kept.
        micro_batch_tokens: T of the pass.
        shared_prefix: as in training.
        name: of the data, for the progress bar and the log.

    Returns:
        (n, k) float64, nats.

    Raises:
        RuntimeError: a row is missing although the pass is over.
        OSError: the store cannot be written; what is on the disk stays whole.
    """
    keys = [group_keys(group) for group in groups]
    found = _lookup(store, keys)
    missing = _first_of_each(keys, np.flatnonzero(np.isnan(found).any(axis=1)))
    known = int(np.isfinite(found).all(axis=1).sum())
    logger.info(
        "Reference log-probs of %s: %d of %d pairs found in %s%s",
        name,
        known,
        len(groups),
        store.folder,
        f", computing {len(missing)}" if missing else "",
    )
    if not missing:
        return found
    waiting: list[ScoredCompletion] = []
    all_scored = score_groups(
        model,
        [groups[i] for i in missing],
        micro_batch_tokens=micro_batch_tokens,
        shared_prefix=shared_prefix,
        description=f"Reference log-probs of {name}",
    )
    # Closed here: this frame, which a held exception keeps, would otherwise keep the model in eval
    # mode after a failing `append`.
    try:
        with adapters_off(model), contextlib.closing(all_scored):
            for scored in all_scored:
                row_keys = keys[missing[scored.index]]
                rows = zip(row_keys, scored.logps, scored.token_logps, strict=True)
                waiting += [ScoredCompletion(key, float(sum_), each) for key, sum_, each in rows]
                if len(waiting) >= SHARD_COMPLETIONS:
                    shard, waiting = waiting, []
                    store.append(shard)
    finally:  # also after Ctrl-C or out of memory
        store.append(waiting)
    found = _lookup(store, keys)
    if np.isnan(found).any():
        raise RuntimeError(
            f"{int(np.isnan(found).any(axis=1).sum())} pairs have no reference log-prob although "
            f"the pass is over: something else removes shards from {store.folder}."
        )
    return found


def _lookup(store: ReferenceStore, keys: list[list[bytes]]) -> np.ndarray:
    """(n, k) float64, NaN where unknown."""
    completions = len(keys[0]) if keys else 0
    return store.lookup([key for row in keys for key in row]).reshape(len(keys), completions)


def _first_of_each(keys: list[list[bytes]], indices: np.ndarray) -> list[int]:
    """The indices without those whose keys all lie in earlier ones: no group is computed twice."""
    seen: set[bytes] = set()
    first = []
    for index in indices:
        if not seen.issuperset(keys[index]):
            first.append(int(index))
            seen.update(keys[index])
    return first
