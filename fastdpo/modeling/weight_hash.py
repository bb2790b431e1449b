"""The content of a model's weights as one hash, without reading 13 GB of it in every run.

The truth is a hash of the tensors' bytes in memory: whatever came between file and model (a 4-bit
quantizer, a conversion of names) is in it, and a model handed over as an object has the same
identity as one loaded by name. What is remembered beside the stores is this hash, by the files
that the model was loaded from and how. It is believed only for a model that `note_files` saw
coming from `load_model`, while no tensor has been written to since and samples of each one agree.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.modeling import loading
from fastdpo.system import files
from fastdpo.system.versions import numeric_versions

logger = logging.getLogger(__name__)

HASH_CACHE_FILE = "weights.json"
MAX_ENTRIES = 64
SAMPLE_BYTES = 4096  # at the beginning, middle and end of each tensor


@dataclass(frozen=True, slots=True)
class _LoadRecord:
    """Where a model's tensors came from, and the write counters that they had then."""

    fingerprint: str
    counters: dict[str, int]


_origins: WeakKeyDictionary[nn.Module, _LoadRecord] = WeakKeyDictionary()


def load_noting_files(
    load: Callable[..., PreTrainedModel],
    name: str,
    tensors: Callable[[nn.Module], dict[str, Tensor]],
    **arguments: Any,
) -> PreTrainedModel:
    """`load(name, **arguments)`, with a note of the files that the tensors are from.

    A folder's files are looked at before and after: if one changed meanwhile nothing is noted, and
    the tensors will be hashed. A hub id's lie in a snapshot of one commit, each a link to a blob
    that is named by its hash.
    """
    before = _files_of(Path(name)) if Path(name).is_dir() else None
    model = load(name, **arguments)
    found = _files_of(Path(name)) if before is not None else _files_of_hub(name, model)
    if found and before in (None, found):
        how = {
            "files": found,
            "arguments": {each: str(value) for each, value in sorted(arguments.items())},
            "versions": numeric_versions(model.device),
        }
        fingerprint = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()
        counters = {each: tensor._version for each, tensor in tensors(model).items()}
        _origins[model] = _LoadRecord(fingerprint, counters)
    return model


def weights_hash(
    causal_lm: nn.Module, tensors: Mapping[str, Tensor], hash_cache: Path | None = None
) -> str:
    """The sha256, in hex, of names, dtypes, shapes and bytes of all tensors.

    Args:
        causal_lm: whose tensors they are, without adapters.
        tensors: by the model's own names.
        hash_cache: a JSON file of known hashes; None hashes every byte and remembers nothing.
    """
    origin = _origins.get(causal_lm)
    untouched = origin is not None and origin.counters == {
        name: tensor._version for name, tensor in tensors.items()
    }
    if hash_cache is None or origin is None or not untouched:
        return tensors_hash(tensors)
    sample = _sample_hash(tensors)
    entry = _remembered(hash_cache).get(origin.fingerprint)
    if entry is not None and entry == _entry(entry.get("weights"), sample, entry.get("at")):
        return str(entry["weights"])
    found = tensors_hash(tensors)
    entries = {**_remembered(hash_cache), origin.fingerprint: _entry(found, sample, time.time())}
    newest = sorted(entries.items(), key=lambda item: -float(item[1].get("at") or 0))
    with suppress(OSError):  # it only saves time
        files.write_json(hash_cache, dict(newest[:MAX_ENTRIES]))
    return found


def _entry(weights: Any, sample: str, at: Any) -> dict[str, Any]:
    """With a checksum over the rest: a flipped bit must not name another model's store."""
    check = hashlib.sha256(f"{weights} {sample} {at}".encode()).hexdigest()
    return {"weights": weights, "sample": sample, "at": at, "check": check}


def _remembered(hash_cache: Path) -> dict[str, dict[str, Any]]:
    try:
        read = json.loads(hash_cache.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = read if isinstance(read, dict) else {}
    return {
        name: entry
        for name, entry in entries.items()
        if isinstance(entry, dict) and isinstance(entry.get("at"), int | float)
    }


def _files_of(folder: Path) -> list[list[Any]]:
    """Path, size, mtime and inode of everything that could shape the tensors; [] without weights.

    Links are followed, so in the hub's cache the path holds the content hash.
    """
    if not any(folder.glob("*.safetensors")):
        return []
    found = []
    for pattern in ("*.safetensors", "*.json", "*.py"):
        for path in sorted(folder.glob(pattern)):
            stat = path.stat()
            real = str(path.resolve())
            found.append([real, stat.st_size, stat.st_mtime_ns, stat.st_ino])
    return found


def _files_of_hub(name: str, model: PreTrainedModel) -> list[list[Any]]:
    from huggingface_hub import try_to_load_from_cache

    commit = getattr(model.config, "_commit_hash", None)
    config = try_to_load_from_cache(name, "config.json", revision=commit) if commit else None
    return _files_of(Path(config).parent) if isinstance(config, str) else []


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Hashing runs on several threads; about 1.8 GB/s on each."""
    began = time.perf_counter()
    names = sorted(tensors)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: _tensor_hash(name, tensors[name]), names)
        found = hashlib.sha256(b"".join(digests)).hexdigest()
    took = time.perf_counter() - began
    if took > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        logger.info("Identified %.1f GiB of weights by their content in %.1f s", size / 2**30, took)
    return found


def _tensor_hash(name: str, tensor: Tensor) -> bytes:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(raw.data)
    return digest.digest()


def _sample_hash(tensors: Mapping[str, Tensor]) -> str:
    """A few pages of each tensor: what a merged adapter or other values would change."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        for at in (0, len(raw) // 2, max(0, len(raw) - SAMPLE_BYTES)):
            digest.update(raw[at : at + SAMPLE_BYTES].cpu().numpy().tobytes())
    return digest.hexdigest()


def load_identified(name: str, **arguments: Any) -> PreTrainedModel:
    """`modeling.loading.load_model`, so that unchanged files need not be hashed in every run."""
    return load_noting_files(loading.load_model, name, base_tensors, **arguments)


def base_tensors(causal_lm: nn.Module) -> dict[str, Tensor]:
    """The base's own tensors under their own names, whatever PEFT has wrapped around them."""
    inner = {
        name: "base_layer" if isinstance(module, BaseTunerLayer) else "original_module"
        for name, module in causal_lm.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    }
    named = ((_own_name(name, inner), t) for name, t in causal_lm.state_dict().items())
    return {name: t for name, t in named if name is not None and isinstance(t, Tensor)}


def _own_name(name: str, inner: dict[str, str]) -> str | None:
    """`name` without the wrappers on its way; None if it is a wrapper's own, so the adapter's.

    `inner` says, by the path of each wrapper, as what it holds the wrapped module.
    """
    parts, kept = name.split("."), []
    for depth, part in enumerate(parts):
        held_as = inner.get(".".join(parts[:depth]))
        if held_as is None:
            kept.append(part)
        elif part != held_as:
            return None
    return ".".join(kept)
