"""The content of a model's weights as one hash, and a note of the files that they were loaded from.

The truth is a hash of the tensors' bytes in memory: whatever came between file and model (a 4-bit
quantizer, a conversion of names) is in it, and a model handed over as an object has the same
identity as one loaded by name. The note lets a cache of hashes know a loaded model again, as long
as no tensor has been written to since.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.system.versions import numeric_versions

logger = logging.getLogger(__name__)

SAMPLE_BYTES = 4096  # at the beginning, middle and end of each tensor


@dataclass(frozen=True, slots=True)
class _LoadRecord:
    """The files that a model's tensors came from, and the tensors' write counters at that time."""

    fingerprint: str
    counters: dict[str, int]


_records: WeakKeyDictionary[nn.Module, _LoadRecord] = WeakKeyDictionary()


def weight_files(folder: Path) -> list[list[Any]]:
    """Path, size, mtime and inode of each file that could shape the tensors; [] without weights.

    Links are followed, so in the hub's cache the path holds the content hash.
    """
    if not any(folder.glob("*.safetensors")):
        return []
    entries = []
    for pattern in ("*.safetensors", "*.json", "*.py"):
        for path in sorted(folder.glob(pattern)):
            stat = path.stat()
            entries.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino])
    return entries


def record_load(
    model: PreTrainedModel, name: str, before: list[list[Any]], arguments: Mapping[str, Any]
) -> None:
    """Note the files that a model's tensors were loaded from a moment ago.

    Args:
        model: as `from_pretrained` returned it.
        name: folder or hub id. A hub id's files lie in a snapshot of one commit, each a link to a
            blob that is named by its hash.
        before: `weight_files` of the folder before loading. If they have changed meanwhile,
            nothing is noted.
        arguments: what else `from_pretrained` was called with.
    """
    is_folder = Path(name).is_dir()
    found = weight_files(Path(name)) if is_folder else _hub_files(name, model)
    if not found or (is_folder and found != before):
        return
    origin = {
        "files": found,
        "arguments": {each: str(value) for each, value in sorted(arguments.items())},
        "versions": numeric_versions(model.device),
    }
    fingerprint = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
    _records[model] = _LoadRecord(fingerprint, _counters(base_tensors(model)))


def load_fingerprint(causal_lm: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    """A hash of the files that a model came from and of how it was loaded.

    Args:
        causal_lm: the model without adapters.
        tensors: its tensors, from `base_tensors`.

    Returns:
        The hash in hex; None where the origin is not known or a tensor was written to since.
    """
    record = _records.get(causal_lm)
    return record.fingerprint if record and record.counters == _counters(tensors) else None


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """The sha256, in hex, of names, dtypes, shapes and bytes of all tensors.

    Runs on several threads, at about 1.8 GB/s each.
    """
    began = time.perf_counter()
    names = sorted(tensors)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: _tensor_hash(name, tensors[name]), names)
        combined = hashlib.sha256(b"".join(digests)).hexdigest()
    took = time.perf_counter() - began
    if took > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        logger.info("Identified %.1f GiB of weights by their content in %.1f s", size / 2**30, took)
    return combined


def sample_hash(tensors: Mapping[str, Tensor]) -> str:
    """The sha256, in hex, of a few pages of each tensor: enough to notice a merged adapter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        for start in (0, len(raw) // 2, max(0, len(raw) - SAMPLE_BYTES)):
            digest.update(raw[start : start + SAMPLE_BYTES].cpu().numpy().tobytes())
    return digest.hexdigest()


def base_tensors(causal_lm: nn.Module) -> dict[str, Tensor]:
    """The base's own tensors under their own names, whatever PEFT has wrapped around them."""
    inner = {
        name: "base_layer" if isinstance(module, BaseTunerLayer) else "original_module"
        for name, module in causal_lm.named_modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    }
    named = ((_unwrapped_name(name, inner), t) for name, t in causal_lm.state_dict().items())
    return {name: t for name, t in named if name is not None and isinstance(t, Tensor)}


def _unwrapped_name(name: str, inner: dict[str, str]) -> str | None:
    """A tensor's name without the wrappers on its path; None if it belongs to a wrapper.

    Args:
        name: the name with the wrappers.
        inner: for the path of each wrapper the attribute that holds the wrapped module.
    """
    parts, kept = name.split("."), []
    for depth, part in enumerate(parts):
        attribute = inner.get(".".join(parts[:depth]))
        if attribute is None:
            kept.append(part)
        elif part != attribute:
            return None
    return ".".join(kept)


def _hub_files(name: str, model: PreTrainedModel) -> list[list[Any]]:
    """The files of the hub's snapshot that the model was loaded from, as `weight_files`."""
    from huggingface_hub import try_to_load_from_cache

    commit = getattr(model.config, "_commit_hash", None)
    config = try_to_load_from_cache(name, "config.json", revision=commit) if commit else None
    return weight_files(Path(config).parent) if isinstance(config, str) else []


def _counters(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How often each tensor has been written to in place, as torch counts it."""
    return {name: tensor._version for name, tensor in tensors.items()}


def _tensor_hash(name: str, tensor: Tensor) -> bytes:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(raw.data)
    return digest.digest()
