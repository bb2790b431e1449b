"""The reference pass: look up what is known, compute the rest, keep it."""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastdpo.batching import PromptGroup
from fastdpo.modeling.layout import ExecutionLayout, group_length
from fastdpo.modeling.packing import PackingMode, choose_packing
from fastdpo.modeling.reference_model import ReferenceModel
from fastdpo.modeling.scoring import score_groups, share_of
from fastdpo.ref_cache.run_notes import explain_miss, record_request
from fastdpo.ref_cache.spot_check import SpotCheck, spot_check
from fastdpo.ref_cache.store import ReferenceStore, ScoredCompletion, group_keys, keys_of
from fastdpo.system import ranks, signals
from fastdpo.system.console import progress_bar

logger = logging.getLogger(__name__)

SHARD_COMPLETIONS = 4096
SHARD_SECONDS = 60.0
"""A shard is closed by whichever comes first: what a killed run loses at most."""


def reference_logps(
    reference: ReferenceModel,
    groups: Sequence[PromptGroup],
    store: ReferenceStore,
    *,
    layout: ExecutionLayout,
    mode: PackingMode | None = None,
    name: str = "train",
    requested: Mapping[str, Any] | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """Reference log-probs of all groups, each computed once in its life.

    Several ranks share what is missing and fill one store, which they all have to see; the first
    alone looks things up and checks.

    Args:
        reference: the model, and how it is run as the reference; it is left as it was.
        groups: n groups of k completions each.
        store: holds the known log-probs and takes the new ones; its options say how many known
            groups to score again and compare.
        layout: bounds the micro-batches, and is lowered where memory runs out.
        mode: how pairs run through the model, as in training; None chooses.
        name: name of the data set, for the progress bar and the log.
        requested: the options that shaped the rows of this run, to explain a later miss.
        compute_dtype: decides how far groups that are scored again may differ.

    Returns:
        (n, k) float64, nats.

    Raises:
        RuntimeError: a row is missing although the pass is over.
        SystemExit: 143 after SIGTERM; what was computed is in the store.
        ValueError: the spot check finds other log-probs than the stored ones.
        OSError: the store cannot be written; what is on the disk stays whole.
    """
    keys = keys_of(groups)
    mode = choose_packing(reference.model) if mode is None else mode
    options: dict[str, Any] = {"layout": layout, "mode": mode}

    def look_up_and_check() -> tuple[np.ndarray, list[int]]:
        logps = _lookup(store, keys)
        known = np.asarray(np.isfinite(logps).all(axis=1))
        _log_hits(store, keys, known, name, requested)
        if requested is not None:
            record_request(store, {"name": name, **requested})
        store.touch()
        checked = spot_check(
            reference,
            groups,
            keys,
            np.flatnonzero(known),
            store,
            compute_dtype=compute_dtype,
            **options,
        )
        _log_spot_check(checked)
        return logps, _unique_groups(keys, np.flatnonzero(~known))

    logps, missing = ranks.first_does(look_up_and_check)
    if not missing:
        return logps
    _compute(reference, groups, missing, store, name=name, **options)
    logps = ranks.first_does(lambda: _lookup(store, keys))
    if np.isnan(logps).any():
        raise RuntimeError(
            f"{int(np.isnan(logps).any(axis=1).sum())} pairs have no reference log-prob although "
            f"the pass is over: something else removes shards from {store.folder}"
            f"{', or the machines of this run do not share it' if ranks.count() > 1 else ''}."
        )
    return logps


def _compute(
    reference: ReferenceModel,
    groups: Sequence[PromptGroup],
    missing: list[int],
    store: ReferenceStore,
    *,
    name: str,
    layout: ExecutionLayout,
    mode: PackingMode,
) -> None:
    """Score this rank's part of the missing groups and keep it, shard by shard."""
    all_missing = len(missing)
    missing = [missing[i] for i in share_of([groups[i] for i in missing], mode)]
    sizes = [group_length(groups[i], mode) for i in missing]
    all_scored = score_groups(
        reference.model,
        [groups[i] for i in missing],
        layout=layout,
        mode=mode,
    )
    waiting: list[ScoredCompletion] = []
    kept: set[bytes] = set()
    began = closed = time.monotonic()
    # Closed here: this frame, which a held exception keeps, would otherwise keep the model in eval
    # mode after a failing `append`.
    try:
        with (
            reference.active(),
            contextlib.closing(all_scored),
            signals.graceful_shutdown() as stop,
            progress_bar(sum(sizes), f"Reference log-probs of {name}", "token") as bar,
        ):
            bar.unit_scale = True
            for done, scored in enumerate(all_scored, 1):
                its_keys = group_keys(groups[missing[scored.index]])
                for key, sum_, each in zip(its_keys, scored.logps, scored.token_logps, strict=True):
                    if key not in kept:
                        waiting.append(ScoredCompletion(key, float(sum_), each))
                        kept.add(key)
                bar.set_postfix_str(f"{done:,} of {len(missing):,} pairs", refresh=False)
                bar.update(sizes[scored.index])
                now = time.monotonic()
                if len(waiting) >= SHARD_COMPLETIONS or now - closed >= SHARD_SECONDS:
                    shard, waiting, closed = waiting, [], now
                    store.append(shard)
                if ranks.count() > 1 and stop.received is not None:
                    break
                stop.raise_if_requested()
    finally:  # also after Ctrl-C, SIGTERM or out of memory
        store.append(waiting)
    stop.agree()  # all shards are written
    stop.raise_if_requested()
    took = max(time.monotonic() - began, 1e-9)
    logger.info(
        "Computed the reference log-probs of %s distinct pairs in %.1f s: %s tokens/s",
        f"{all_missing:,}",
        took,
        f"{ranks.total(sum(sizes)) / took:,.0f}",
    )


def _log_hits(
    store: ReferenceStore,
    keys: np.ndarray,
    known: np.ndarray,
    name: str,
    requested: Mapping[str, Any] | None,
) -> None:
    """Log how many pairs are known, why others are not, and which other versions computed some."""
    pairs, missing = len(known), int((~known).sum())
    if not missing:
        logger.info(
            "Reference log-probs of %s: all %s found in %s", name, _count_pairs(pairs), store.folder
        )
    else:
        reason = explain_miss(store, {"name": name, **(requested or {})}, pairs - missing)
        logger.info(
            "Reference log-probs of %s: %s %s missing in %s (%s); computing them",
            name,
            f"{missing:,} of" if missing < pairs else "all",
            _count_pairs(pairs),
            store.folder,
            reason,
        )
    flat = keys.ravel()
    for differs, count in store.other_versions(flat).most_common(3):
        logger.warning(
            "%s of %s reference log-probs were computed with other versions or on another GPU "
            "(%s) and may differ in rounding. They are used; --ref_versions strict computes them "
            "again.",
            f"{count:,}",
            f"{len(flat):,}",
            differs,
        )


def _log_spot_check(checked: SpotCheck | None) -> None:
    if checked is not None:
        logger.info(
            "Spot check: %s scored again, at most %.2g nats a token (rms) from the stored ones",
            _count_pairs(checked.pairs),
            checked.largest_rms,
        )


def _count_pairs(pairs: int) -> str:
    return f"{pairs:,} pairs" if pairs != 1 else "1 pair"


def _lookup(store: ReferenceStore, keys: np.ndarray) -> np.ndarray:
    """(n, k) float64 log-probs in nats, NaN where unknown."""
    return store.lookup(keys.ravel()).reshape(keys.shape)


def _unique_groups(keys: np.ndarray, indices: np.ndarray) -> list[int]:
    """The indices without those whose keys all lie in earlier ones: no group is computed twice."""
    seen: set[bytes] = set()
    first = []
    for index, its_keys in zip(indices.tolist(), keys[indices].tolist(), strict=True):
        if not seen.issuperset(its_keys):
            first.append(index)
            seen.update(its_keys)
    return first
