"""A few stored rows scored again: a check that a store is this model's, before it is believed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastdpo.batching import PromptGroup
from fastdpo.modeling.layout import ExecutionLayout
from fastdpo.modeling.packing import PackingMode
from fastdpo.modeling.reference_model import ReferenceModel
from fastdpo.modeling.scoring import score_groups
from fastdpo.ref_cache.store import ReferenceStore

logger = logging.getLogger(__name__)

LARGEST_RMS = {torch.float32: 1e-5, torch.float64: 1e-5}
LARGEST_RMS_OTHERWISE = 0.03
"""Nats a token, rms over a completion; what other shapes, kernels and GPUs may differ by."""


@dataclass(frozen=True, slots=True)
class SpotCheck:
    """How far the rows that were scored again lie from the stored ones."""

    pairs: int
    largest_rms: float  # nats a token, of the worst completion
    stored: float  # nats, its sum
    scored: float  # nats, its sum


def spot_check(
    reference: ReferenceModel,
    groups: Sequence[PromptGroup],
    keys: np.ndarray,
    known: np.ndarray,
    store: ReferenceStore,
    *,
    compute_dtype: torch.dtype,
    layout: ExecutionLayout,
    mode: PackingMode | None = None,
) -> SpotCheck | None:
    """Score a few known groups and compare; the new log-probs are neither stored nor trained on.

    The choice is deterministic: first groups that other versions computed, then by key, which is a
    hash and so as good as random.

    Args:
        reference: the model, and how it is run as the reference.
        groups: n groups of k completions each.
        keys: (n, k) S32, the row keys of their completions.
        known: indices of the groups that the store knows.
        store: the store to check; its options say how many groups to score.
        compute_dtype: decides how much may differ.
        layout: bounds the micro-batches, and is lowered where memory runs out.
        mode: how pairs run through the model, as in training; None chooses.

    Returns:
        How far the log-probs differ, or None if there was nothing to check.

    Raises:
        ValueError: the stored log-probs are not this model's.
    """
    count = store.options.spot_check_pairs
    if not count or not len(known):
        return None
    first_keys = keys[known, 0]
    foreign = store.has_other_versions(first_keys)
    order = known[np.lexsort((first_keys, ~foreign))[:count]].tolist()
    with reference.active():
        scored = list(
            score_groups(
                reference.model,
                [groups[i] for i in order],
                layout=layout,
                mode=mode,
            )
        )
    flat = [key for each in scored for key in keys[order[each.index]].tolist()]
    sums, tokens = store.lookup(flat), store.stored_token_logps(flat)
    worst = (-1.0, 0.0, 0.0)
    now = [each for s in scored for each in zip(s.logps, s.token_logps, strict=True)]
    for stored, stored_tokens, (logps, token_logps) in zip(sums, tokens, now, strict=True):
        rms = _apart(float(stored), stored_tokens, float(logps), token_logps)
        worst = max(worst, (rms if np.isfinite(rms) else np.inf, float(stored), float(logps)))
    result = SpotCheck(len(scored), *worst)
    allowed = LARGEST_RMS.get(compute_dtype, LARGEST_RMS_OTHERWISE)
    if result.largest_rms > allowed:
        raise ValueError(
            f"the reference log-probs stored in {store.folder} are not those of this model: a "
            f"completion has {result.stored:.6f} nats there and {result.scored:.6f} now, "
            f"{result.largest_rms:.2g} nats a token apart (rms; at most {allowed:g} in "
            f"{compute_dtype}). Move that folder away to compute them again, or pass another "
            "--ref_cache; --ref_versions strict computes again what other versions or another "
            "GPU computed; --ref_spot_check 0 does not look."
        )
    return result


def _apart(
    stored: float, stored_tokens: np.ndarray | None, scored: float, token_logps: np.ndarray
) -> float:
    """Nats a token, rms, by which a completion's stored log-probs differ from the scored ones.

    The sums count too, since training sees nothing else: their mean difference is at most the rms
    of the tokens' if they are the sums of these.

    Args:
        stored: the stored sum.
        stored_tokens: (C,) float32, or None where they were left out.
        scored: the sum as it is now.
        token_logps: (C,) float32, as they are now.
    """
    apart = abs(scored - stored)
    if stored_tokens is None:  # what independent differences of that rms would sum to
        return apart / len(token_logps) ** 0.5
    difference = token_logps.astype(np.float64) - stored_tokens.astype(np.float64)
    return max(float(np.sqrt(np.square(difference).mean())), apart / len(token_logps))
