"""Turn off everything random that a model's own forward does in training; adapters keep theirs.

Families hold their rates in three ways: in `nn.Dropout` modules, as numbers on the modules that
call functional dropout (OPT, Bloom, Falcon), and in the config, read at every forward (Persimmon).
All three are set to 0. Rates in the config are remembered: they belong to what is saved. Routers
with jitter (Mixtral, PhiMoE) stay in eval mode instead, since PhiMoE's number counts there too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig

from fastdpo.modeling.head import unwrap_model

RATE_WORD, JITTER_WORD = "drop", "jitter"
"""In the names of rates: hidden_dropout, resid_pdrop, layerdrop, drop_path; router_jitter_noise."""

_REMEMBERED = "_fastdpo_config_rates"
"""Attribute of a model: the rates of its configs as they were."""


def disable_dropout(model: nn.Module) -> None:
    """Turn off dropout of every kind, skipped layers and the jitter of routers in the base.

    Args:
        model: a causal LM or a PeftModel on it, whose adapters keep their dropout.
    """
    causal_lm = unwrap_model(model)
    for module in _own_modules(causal_lm):
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if _is_rate(name, value):
                setattr(module, name, type(value)(0))
            elif _is_rate(name, value, JITTER_WORD):
                _stay_in_eval(module)
    changed = getattr(causal_lm, _REMEMBERED, [])
    for config in _configs(causal_lm):
        for name, value in list(vars(config).items()):
            if _is_rate(name, value):
                changed.append((config, name, value))
                setattr(config, name, type(value)(0))
    setattr(causal_lm, _REMEMBERED, changed)


def has_dropout(model: nn.Module) -> bool:
    """Tell whether anything that `disable_dropout` turns off is on in the base."""
    causal_lm = unwrap_model(model)
    holders = [*_own_modules(causal_lm), *_configs(causal_lm)]
    return any(
        (isinstance(each, _DropoutNd) and each.p > 0)
        or any(_is_rate(name, value) for name, value in vars(each).items())
        or (
            not isinstance(each, _InEval | PreTrainedConfig)
            and any(_is_rate(name, value, JITTER_WORD) for name, value in vars(each).items())
        )
        for each in holders
    )


@contextmanager
def configured_dropout(model: nn.Module) -> Iterator[None]:
    """Let the model's configs have the rates that they came with: to be saved, or compared."""
    changed = getattr(unwrap_model(model), _REMEMBERED, [])
    for config, name, value in changed:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, value in changed:
            setattr(config, name, type(value)(0))


def _is_rate(name: str, value: Any, word: str = RATE_WORD) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and value != 0 and word in name


class _InEval:
    """A module whose own flag stays that of eval mode, whatever the modules inside have."""

    def train(self: Any, mode: bool = True) -> Any:
        super().train(mode)  # pyrefly: ignore
        self.training = False
        return self


def _stay_in_eval(module: nn.Module) -> None:
    if not isinstance(module, _InEval):
        kind = type(module)
        module.__class__ = type(kind.__name__, (_InEval, kind), {})
    module.training = False


def _own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of the base, those below adapter layers too, without the adapters' own."""
    if isinstance(module, BaseTunerLayer):
        yield from _own_modules(module.get_base_layer())
        return
    yield module
    for child in module.children():
        yield from _own_modules(child)


def _configs(module: nn.Module) -> Iterator[PreTrainedConfig]:
    """Every config that a module of the model holds, and those inside of them, once each."""
    found: dict[int, PreTrainedConfig] = {}
    waiting = [getattr(each, "config", None) for each in module.modules()]
    while waiting:
        config = waiting.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            waiting += vars(config).values()
    yield from found.values()
