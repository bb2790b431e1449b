"""Tensors and scales that are not finite: found by one reduction, and named."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

_ALPHAS, _RANKS = ("lora_alpha", "alpha"), ("r",)
_LARGEST = torch.finfo(torch.float32).max


def nonfinite_tensors(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or infinity.

    One fused reduction of all of them is the usual case; only where it finds something each is
    looked at by itself.
    """
    floating = {
        name: tensor.detach()
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel()
    }
    if not floating or math.isfinite(get_total_norm(list(floating.values()), norm_type=math.inf)):
        return []
    return [name for name, tensor in floating.items() if not torch.isfinite(tensor).all()]


def named(names: list[str], of: int) -> str:
    """The first name, and how many others of so many there are."""
    return f"{names[0]} ({len(names)} of {of} tensors)"


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that `save_pretrained` writes: of the adapter that is on, else of the model."""
    if isinstance(model, PeftModel):
        return _adapter_tensors(model, model.active_adapters[0])
    return model.state_dict()


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that an optimizer changes, by name."""
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def require_finite_adapter(model: PeftModel, name: str, folder: str) -> None:
    """Refuse an adapter that was loaded and holds values that are not finite.

    Args:
        model: has the adapter.
        name: the adapter's name in it.
        folder: the folder that it is from.

    Raises:
        ValueError: names the folder, the first such tensor and what to do.
    """
    tensors = _adapter_tensors(model, name)
    if wrong := nonfinite_tensors(tensors):
        raise ValueError(nonfinite_adapter(folder, wrong, len(tensors)))


def nonfinite_adapter(folder: str, names: list[str], of: int) -> str:
    """The sentence about an adapter that holds NaN or infinity."""
    return (
        f"the adapter in {folder} is not finite: {named(names, of)}. Its training diverged: take a "
        "checkpoint from before that, or train again at a lower learning rate."
    )


def require_finite_scale(config: Mapping[str, Any], where: str) -> None:
    """Refuse an adapter whose config would scale it by something that is no finite number.

    Args:
        config: the content of its adapter_config.json.
        where: names it in the message.

    Raises:
        ValueError: names the key and the value.
    """
    for key, value in _entries(config, _ALPHAS, "alpha_pattern").items():
        if not _is_number(value, int | float) or not abs(value) <= _LARGEST:
            raise ValueError(
                f"{where}: {key} is {value!r}, and an adapter is scaled by it: it must be a finite "
                "number, as the run that made the adapter wrote it."
            )
    ranks = () if config.get("oft_block_size") else _RANKS  # which OFT has in place of a rank
    for key, value in _entries(config, ranks, "rank_pattern").items():
        if not _is_number(value, int) or value < 1:
            raise ValueError(
                f"{where}: {key} is {value!r}, and an adapter is divided by its rank: it must be a "
                "whole number from 1 on, as the run that made the adapter wrote it."
            )


def _adapter_tensors(model: PeftModel, name: str) -> dict[str, Tensor]:
    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def _entries(config: Mapping[str, Any], keys: tuple[str, ...], pattern: str) -> dict[str, Any]:
    """The values of some keys, and of the modules that a pattern gives one of their own, by key."""
    found = {key: config[key] for key in keys if config.get(key) is not None}
    modules = config.get(pattern) or {}
    if not isinstance(modules, Mapping):
        return {**found, pattern: modules}
    return found | {f"{pattern}[{module!r}]": value for module, value in modules.items()}


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
