"""Checks that an adapter leaves the base as it was, so that the base without it is the reference.

Some of PEFT's initializations (PiSSA, OLoRA, CorDA, LoftQ) take a part of each weight of the base
out of it and put it into the adapter, when the adapter is made and again whenever it is loaded.
What is left is no model that anybody has: as a reference it is off by thousands of nats.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from fastdpo.modeling.head import unwrap_model
from fastdpo.modeling.weight_hash import base_tensors, sample_hash

BASE_KEEPING_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` besides true and false that write nothing to the base."""

CONVERT = (
    "Save it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), which "
    "makes it a plain adapter, or set the key back if the base was never changed"
)


class AdapterStartError(ValueError):
    """An adapter whose base is not the model that training started from."""


def start_fault(config: Mapping[str, Any]) -> str | None:
    """Say why an adapter of this config does not lie on the base as it is stored, if so.

    Args:
        config: the content of `adapter_config.json`, or the fields of a PeftConfig.

    Returns:
        A clause that names the key and its value, or None where the base stays as it is.
    """
    start = config.get("init_lora_weights", True)
    if not (start is True or start is False or str(start).lower() in BASE_KEEPING_STARTS):
        return (
            f"init_lora_weights is {start!r}, which moves a part of the base into the adapter: the "
            "base without the adapter is then not the model that training started from"
        )
    if config.get("kasa_config"):
        return (
            "kasa_config is set, which takes the smallest singular values out of the base: the "
            "base without the adapter is then not the model that training started from"
        )
    return None


def require_base_kept(config: Mapping[str, Any], where: str, remedy: str = CONVERT) -> None:
    """Refuse a config whose adapter does not lie on the base as it is stored.

    Args:
        config: as in `start_fault`.
        where: the adapter in words, at the beginning of the message.
        remedy: a sentence on what to do, without its full stop.

    Raises:
        AdapterStartError: names the key of the config and its value.
    """
    if fault := start_fault(config):
        raise AdapterStartError(f"{where}: {fault}. {remedy}.")


def drawn_config(model: nn.Module, config: PeftConfig) -> PeftConfig:
    """The config of a new adapter as PEFT will really draw it.

    LoRA-GA without the gradients of `preprocess_loraga` is PEFT's default initialization; the
    config that is returned, and saved with the adapter, says so.

    Raises:
        AdapterStartError: the initialization would write to the base, or nothing would compute it.
    """
    start = getattr(config, "init_lora_weights", True)
    if start == "eva":
        raise AdapterStartError(
            "peft_config: init_lora_weights is 'eva', which PEFT computes from data in a step of "
            "its own, and it would stay undone here. Make the PeftModel with get_peft_model and "
            "initialize_lora_eva_weights and pass it as the model, or leave init_lora_weights out."
        )
    if start == "lora_ga" and not any(hasattr(m, "_peft_loraga_grad") for m in model.modules()):
        config = copy.copy(config)
        config.init_lora_weights = True  # pyrefly: ignore[missing-attribute]
    remedy = "Leave init_lora_weights out, or choose gaussian or orthogonal"
    require_base_kept(vars(config), "peft_config", remedy)
    return config


def check_policy_start(policy: nn.Module) -> None:
    """Refuse a PeftModel whose base is not the model that it was made of.

    Raises:
        AdapterStartError: names the adapter, the key of its config and the value.
    """
    if not isinstance(policy, PeftModel):
        return
    for name in policy.active_adapters:
        config = policy.peft_config[name]
        is_lora_ga = getattr(config, "init_lora_weights", True) == "lora_ga"
        if is_lora_ga and is_identity_adapter(policy):  # no gradients were there: the default
            config.init_lora_weights = True  # pyrefly: ignore[missing-attribute]
        require_base_kept(vars(config), f"the adapter {name!r} of the model")


def is_identity_adapter(policy: PeftModel) -> bool:
    """Tell whether the adapter is new: its output is 0, and its copies are those of the base.

    Then every one of its up-projections is 0, and its copies of whole modules and of token
    embeddings are equal to the base's.
    """
    if len(policy.active_adapters) != 1:
        return False
    (active,) = policy.active_adapters
    tensors = get_peft_model_state_dict(policy, adapter_name=active)
    ups = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    if not ups or any(tensor.any() for tensor in ups):
        return False
    return not any(_is_changed(module, active) for module in policy.modules())


def _is_changed(module: nn.Module, adapter: str) -> bool:
    """Return True if an adapter's copy of a module or of embeddings differs from the base's."""
    if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
        copies = module.modules_to_save[adapter].state_dict()
        originals = module.original_module.state_dict()
        return any(
            name not in originals or not torch.equal(each, originals[name].to(each))
            for name, each in copies.items()
        )
    if isinstance(module, TrainableTokensLayer) and adapter in module.trainable_tokens_delta:
        delta = module.trainable_tokens_delta[adapter]
        return not torch.equal(delta, module.trainable_tokens_original[adapter].to(delta))  # pyrefly: ignore
    return False


def uninitialized(config: PeftConfig) -> PeftConfig:
    """A copy of a config for an adapter whose weights will be copied: nothing is initialized."""
    config = copy.deepcopy(config)
    for name in ("init_lora_weights", "init_weights"):
        if hasattr(config, name):
            setattr(config, name, False)
    return config


@contextmanager
def base_kept(model: nn.Module, adapter: str) -> Iterator[None]:
    """Refuse an adapter that changes weights of the base while it is made or loaded in here.

    Args:
        model: the model that gets the adapter.
        adapter: the adapter in words, at the beginning of the message.

    Raises:
        AdapterStartError: names a tensor of the base that has changed.
    """
    before = _samples(model)
    yield
    now = _samples(model)
    if changed := [name for name in before if now.get(name, before[name]) != before[name]]:
        raise AdapterStartError(
            f"{adapter} has changed {changed[0]} ({len(changed)} tensors of the base in all) on "
            "being made: the base without the adapter would be another model than before, and no "
            "reference. Train another kind of adapter, or save the changed base as a model."
        )


def _samples(model: nn.Module) -> dict[str, str]:
    tensors = base_tensors(unwrap_model(model))
    real = {name: tensor for name, tensor in tensors.items() if not _has_no_data(tensor)}
    return {name: sample_hash({name: tensor}) for name, tensor in real.items()}


def _has_no_data(tensor: torch.Tensor) -> bool:
    """Return True for a tensor of shapes alone, as memory is counted with."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)
