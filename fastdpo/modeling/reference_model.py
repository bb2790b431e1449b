"""Which model the reference log-probs come from, and how the policy's weights become it.

Three kinds: the policy with its adapter off (or, if all weights are trained, as it was before the
first update), a frozen copy of the adapter that training starts from, or another model. Under
TR-DPO the copy follows the policy.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict
from torch import Tensor, nn

from fastdpo.modeling.adapter_starts import is_identity_adapter, uninitialized
from fastdpo.modeling.adapters import (
    adapters_disabled,
    base_model_name,
    load_second_adapter,
    replace_lora_forward,
)
from fastdpo.modeling.base_names import is_same_base
from fastdpo.modeling.base_weights import move_resident
from fastdpo.modeling.head import get_lm_head, unwrap_model

FROZEN_ADAPTER = "reference"
"""The name of the frozen copy inside the PeftModel, with a number behind it where that is taken.

Only the policy's own adapter is saved."""


_NOT_OF_THE_NUMBERS = (
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping",
    "peft_version",
)  # fmt: skip
"""Fields of an adapter's config that say nothing about what it adds to the weights."""


@dataclass(frozen=True, eq=False)
class ReferenceModel:
    """The model that gives the reference log-probs.

    Attributes:
        model: the model that runs: the policy itself, or another one.
        active: makes a context inside which `model` is the reference; afterwards it is as before.
        description: one sentence on what the reference is, for logs and model cards.
        adapter: name of the adapter that is on inside the context, or None.
        is_frozen: whether the reference is still there after the first update.
        is_start: whether it is the policy as training starts, so that the first margins are 0.
    """

    model: nn.Module
    active: Callable[[], AbstractContextManager[None]]
    description: str
    adapter: str | None = None
    is_frozen: bool = True
    is_start: bool = False

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Tensors of the adapter that is on, by name: log-probs depend on them as on weights."""
        if self.adapter is None:
            return {}
        return get_peft_model_state_dict(self.model, adapter_name=self.adapter)

    def adapter_scale(self) -> dict[str, Any]:
        """The adapter's config fields that decide what its tensors add to the weights."""
        assert self.adapter is not None, "there is one"
        config: Any = self.model.peft_config[self.adapter]  # pyrefly: ignore[bad-index]
        if config.peft_type != PeftType.LORA:
            return {n: v for n, v in config.to_dict().items() if n not in _NOT_OF_THE_NUMBERS}
        names = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
        return {name: getattr(config, name, None) for name in names}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a reference which follows the policy consists of, by name."""
        return self.adapter_tensors() or dict(self.model.named_parameters())

    def update_ema(self, policy: nn.Module, mixup_alpha: float) -> None:
        """Become alpha x policy + (1 - alpha) x this reference: TR-DPO, arXiv:2404.09656.

        Args:
            policy: the model that this reference is a copy of.
            mixup_alpha: 1 is the policy as it is now, 0 changes nothing.
        """
        trained = dict(policy.named_parameters())
        if isinstance(policy, PeftModel):
            (active,) = policy.active_adapters
            trained = get_peft_model_state_dict(policy, adapter_name=active)
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                if tensor.is_floating_point() and mixup_alpha < 1.0:
                    tensor.lerp_(trained[name].to(tensor.dtype), mixup_alpha)
                else:  # the first copy, onto any memory; which entries an adapter changes (SHiRA)
                    tensor.copy_(trained[name])


def reference_from_base(policy: nn.Module) -> ReferenceModel:
    """Take as reference the policy, with its adapters off or before its first update."""
    if isinstance(policy, PeftModel):
        description = "The reference is the same model with its adapter off."
        return ReferenceModel(
            policy,
            lambda: adapters_disabled(policy),
            description,
            is_start=is_identity_adapter(policy),
        )
    description = "The reference is the model as it is now, before the first update."
    return ReferenceModel(policy, nullcontext, description, is_frozen=False, is_start=True)


def reference_from_start(policy: nn.Module) -> ReferenceModel:
    """Take as reference what training starts from.

    It is a frozen copy of the adapter, or the base where the adapter adds nothing yet.
    """
    if not isinstance(policy, PeftModel) or is_identity_adapter(policy):
        return reference_from_base(policy)
    return reference_from_copy(policy)


def reference_from_copy(policy: nn.Module) -> ReferenceModel:
    """Take as reference a frozen copy of the adapter if there is one, else of all weights."""
    if not isinstance(policy, PeftModel):
        frozen = copy.deepcopy(policy).requires_grad_(False)
        description = "The reference is a frozen copy of the model."
        return ReferenceModel(frozen, nullcontext, description, is_start=True)
    (active,), trainable = policy.active_adapters, _trainable(policy)
    config = uninitialized(policy.peft_config[active])
    name = _free_name(policy)
    policy.add_adapter(name, config)
    replace_lora_forward(policy)
    move_resident(policy)
    reference = ReferenceModel(
        policy,
        lambda: _adapter_on(policy, name),
        "The reference is a frozen copy of the adapter that training starts from.",
        adapter=name,
        is_start=True,
    )
    _restore(policy, active, trainable)
    reference.update_ema(policy, 1.0)
    return reference


def reference_from_adapter(policy: PeftModel, folder: str) -> ReferenceModel:
    """Take as reference the adapter of a folder, on the policy's base.

    Raises:
        ValueError: the adapter was trained on another base, or its weights do not fit.
    """
    (active,), trainable = policy.active_adapters, _trainable(policy)
    base, adapter_base = str(unwrap_model(policy).name_or_path), base_model_name(folder)
    if base and not is_same_base(base, adapter_base):
        raise ValueError(
            f"the adapter in {folder} was trained on {adapter_base} and the policy lies on {base}: "
            "pass an adapter of the same base, or a whole model."
        )
    name = _free_name(policy)
    load_second_adapter(policy, folder, name)
    replace_lora_forward(policy)
    _restore(policy, active, trainable)
    return ReferenceModel(
        policy,
        lambda: _adapter_on(policy, name),
        f"The reference is the adapter in {folder}.",
        adapter=name,
    )


def reference_from_held(policy: PeftModel, name: str) -> ReferenceModel:
    """An adapter that the PeftModel holds already beside the active one; it is frozen."""
    trainable = {each for each in _trainable(policy) if f".{name}." not in each}
    (active,) = policy.active_adapters
    replace_lora_forward(policy)
    _restore(policy, active, trainable)
    return ReferenceModel(
        policy,
        lambda: _adapter_on(policy, name),
        f"The reference is the adapter called {name} of the model.",
        adapter=name,
    )


def _free_name(policy: PeftModel) -> str:
    """A name for one more adapter, which none of the model's has."""
    names = (FROZEN_ADAPTER, *(f"{FROZEN_ADAPTER}_{number}" for number in range(2, 100)))
    return next(name for name in names if name not in policy.peft_config)


def reference_from_model(model: nn.Module, policy: nn.Module) -> ReferenceModel:
    """Take as reference another model as it is, its adapters on if it has any.

    Raises:
        ValueError: its vocabulary is another one, or it is the policy itself.
    """
    if unwrap_model(model) is unwrap_model(policy):
        raise ValueError(
            "ref_model is the model that is trained and would move with it. Leave ref_model out: "
            "the reference is then the model with its adapter off, or its log-probs from before "
            "the first update."
        )
    sizes = [get_lm_head(each).weight.shape[0] for each in (model, policy)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the reference has a vocabulary of {sizes[0]:,} tokens and the policy one of "
            f"{sizes[1]:,}: their log-probs cannot be compared. Pass a reference of the same "
            "family and size of vocabulary."
        )
    model.requires_grad_(False)
    replace_lora_forward(model)
    name = unwrap_model(model).name_or_path or type(unwrap_model(model)).__name__
    adapter = model.active_adapter if isinstance(model, PeftModel) else None
    return ReferenceModel(model, nullcontext, f"The reference is {name}.", adapter=adapter)


@contextmanager
def _adapter_on(policy: PeftModel, name: str) -> Iterator[None]:
    """Turn on one adapter in place of the active one; on exit all is as before.

    PEFT's `set_adapter` turns `requires_grad` on for what it activates and off for the rest.
    """
    (before,), trainable = policy.active_adapters, _trainable(policy)
    policy.set_adapter(name)
    try:
        yield
    finally:
        _restore(policy, before, trainable)


def _trainable(policy: nn.Module) -> set[str]:
    return {name for name, parameter in policy.named_parameters() if parameter.requires_grad}


def _restore(policy: PeftModel, active: str, trainable: set[str]) -> None:
    policy.set_adapter(active)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name in trainable)
