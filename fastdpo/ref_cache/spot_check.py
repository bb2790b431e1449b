"""A few stored rows scored again: a check that a store is this model's, before it is believed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastdpo.batching import PromptGroup
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
    keys: Sequence[Sequence[bytes]],
    store: ReferenceStore,
    *,
    count: int,
    compute_dtype: torch.dtype,
    micro_batch_tokens: int,
    mode: PackingMode | None = None,
) -> SpotCheck | None:
    """Score a few known groups and compare; nothing is written, nothing is used for training.

    The choice is deterministic: those that other versions computed first, then by key, which is a
    hash and so as good as random.

    Args:
        reference: the model, and how it is run as the reference.
        groups: those whose completions the store all knows.
        keys: theirs.
        store: to compare with.
        count: the most groups to score.
        compute_dtype: decides how much may differ.
        micro_batch_tokens: T of the pass.
        mode: how pairs run through the model, as in training; None chooses.

    Returns:
        What was found, or None if there was nothing to check.

    Raises:
        ValueError: the stored log-probs are not this model's.
    """
    if not count or not len(groups):
        return None
    foreign = store.has_other_versions([row[0] for row in keys])
    order = sorted(range(len(groups)), key=lambda i: (not foreign[i], keys[i][0]))[:count]
    with reference.active():
        scored = list(
            score_groups(
                reference.model,
                [groups[i] for i in order],
                micro_batch_tokens=micro_batch_tokens,
                mode=mode,
            )
        )
    flat = [key for each in scored for key in keys[order[each.index]]]
    sums, tokens = store.lookup(flat), store.stored_token_logps(flat)
    worst = (-1.0, 0.0, 0.0)
    now = [pair for s in scored for pair in zip(s.logps, s.token_logps, strict=True)]
    for stored, stored_tokens, (logps, token_logps) in zip(sums, tokens, now, strict=True):
        if stored_tokens is None:  # what independent differences of that rms would sum to
            rms = abs(float(logps) - float(stored)) / len(token_logps) ** 0.5
        else:
            away = token_logps.astype(np.float64) - stored_tokens.astype(np.float64)
            rms = float(np.sqrt(np.square(away).mean()))
        worst = max(worst, (rms if np.isfinite(rms) else np.inf, float(stored), float(logps)))
    found = SpotCheck(len(scored), *worst)
    allowed = LARGEST_RMS.get(compute_dtype, LARGEST_RMS_OTHERWISE)
    if found.largest_rms > allowed:
        raise ValueError(
            f"the reference log-probs stored in {store.folder} are not those of this model: a "
            f"completion has {found.stored:.6f} nats there and {found.scored:.6f} now, "
            f"{found.largest_rms:.2g} nats a token apart (rms; at most {allowed:g} in "
            f"{compute_dtype}). Move that folder away to compute them again, or pass another "
            "--ref_cache; --ref_versions strict computes again what other versions or another "
            "GPU computed; --ref_spot_check 0 does not look."
        )
    return found
