"""Hashes of weights, remembered beside the stores: 13 GB need not be read again in every run.

A hash is remembered by the files that a model was loaded from and how. It is believed only while no
tensor has been written to since and samples of each one agree.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastdpo.modeling.weight_hash import load_fingerprint, sample_hash, tensors_hash
from fastdpo.system import files

HASH_CACHE_FILE = "weights.json"
MAX_ENTRIES = 64


def weights_hash(
    causal_lm: nn.Module, tensors: Mapping[str, Tensor], hash_cache: Path | None = None
) -> str:
    """The hash of all tensors, from `tensors_hash` or from the cache.

    Args:
        causal_lm: the model that holds the tensors, without adapters.
        tensors: its tensors, from `base_tensors`.
        hash_cache: JSON file of known hashes; None hashes every byte and remembers nothing.
    """
    fingerprint = load_fingerprint(causal_lm, tensors)
    if hash_cache is None or fingerprint is None:
        return tensors_hash(tensors)
    sample = sample_hash(tensors)
    entry = _read_cache(hash_cache).get(fingerprint)
    if entry is not None and entry == _entry(entry.get("weights"), sample, entry.get("at")):
        return str(entry["weights"])
    content = tensors_hash(tensors)
    entries = {**_read_cache(hash_cache), fingerprint: _entry(content, sample, time.time())}
    newest = sorted(entries.items(), key=lambda item: -float(item[1].get("at") or 0))
    with suppress(OSError):  # it only saves time
        files.write_json(hash_cache, dict(newest[:MAX_ENTRIES]))
    return content


def _entry(weights: Any, sample: str, at: Any) -> dict[str, Any]:
    """An entry of the cache. Its checksum keeps a flipped bit from naming another model's store."""
    check = hashlib.sha256(f"{weights} {sample} {at}".encode()).hexdigest()
    return {"weights": weights, "sample": sample, "at": at, "check": check}


def _read_cache(hash_cache: Path) -> dict[str, dict[str, Any]]:
    """The entries of the cache by fingerprint; what is damaged is left out."""
    try:
        content = json.loads(hash_cache.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = content if isinstance(content, dict) else {}
    return {
        name: entry
        for name, entry in entries.items()
        if isinstance(entry, dict) and isinstance(entry.get("at"), int | float)
    }
