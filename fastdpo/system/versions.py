"""What computed a log-prob besides the model: the libraries and the device."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

LIBRARIES = ("torch", "transformers", "bitsandbytes", "peft")
"""Their releases have changed log-probs in the last bits, or by more."""


def numeric_versions(device: torch.device) -> dict[str, str]:
    """Recorded in every shard; never part of a key, so that an upgrade loses nothing."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    on_cuda = device.type == "cuda"
    found["device"] = torch.cuda.get_device_name(device) if on_cuda else device.type
    return found


def difference(then: Mapping[str, str] | None, now: Mapping[str, str]) -> str:
    """What differs, as `torch 2.11.0 -> 2.13.0, device cpu -> NVIDIA L4`; empty if nothing does."""
    if then is None:
        return "versions not recorded"
    return ", ".join(
        f"{name} {then.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    )
