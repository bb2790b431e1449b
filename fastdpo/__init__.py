"""fastdpo: Direct Preference Optimization on one GPU or a few.

The public names are loaded when they are first used, so that `import fastdpo` costs nothing. Beside
the trainer they are those that TRL's `scripts/dpo.py` imports.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastdpo.version import __version__

if TYPE_CHECKING:
    from fastdpo.cli.arguments import TrlParser
    from fastdpo.cli.trl_compat import ModelConfig, get_peft_config, get_quantization_config
    from fastdpo.config import DPOConfig
    from fastdpo.data import get_dataset
    from fastdpo.options.data import DatasetMixtureConfig, ScriptArguments
    from fastdpo.trainer import DPOTrainer

_HOMES = {
    "DPOConfig": "fastdpo.config",
    "DPOTrainer": "fastdpo.trainer",
    "DatasetMixtureConfig": "fastdpo.options.data",
    "ModelConfig": "fastdpo.cli.trl_compat",
    "ScriptArguments": "fastdpo.options.data",
    "TrlParser": "fastdpo.cli.arguments",
    "get_dataset": "fastdpo.data",
    "get_peft_config": "fastdpo.cli.trl_compat",
    "get_quantization_config": "fastdpo.cli.trl_compat",
}

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "DatasetMixtureConfig",
    "ModelConfig",
    "ScriptArguments",
    "TrlParser",
    "__version__",
    "get_dataset",
    "get_peft_config",
    "get_quantization_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastdpo' has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
