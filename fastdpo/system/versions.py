"""The libraries and the device that compute log-probs."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

LIBRARIES = ("torch", "transformers", "bitsandbytes", "peft")
"""Their releases have changed log-probs in the last bits, or by more."""


def numeric_versions(device: torch.device) -> dict[str, str]:
    """Versions of the libraries that decide a log-prob's rounding, and the device's name.

    They are recorded in every shard of a store and are no part of a key: an upgrade loses nothing.
    """
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    on_cuda = device.type == "cuda"
    versions["device"] = torch.cuda.get_device_name(device) if on_cuda else device.type
    return versions


def difference(then: Mapping[str, str] | None, now: Mapping[str, str]) -> str:
    """The differences, as `torch 2.11.0 -> 2.13.0, device cpu -> NVIDIA L4`; empty if none."""
    if then is None:
        return "versions not recorded"
    return ", ".join(
        f"{name} {then.get(name, 'none')} -> {now.get(name, 'none')}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    )
