"""fastdpo: Direct Preference Optimization on one GPU.

The public names are loaded when they are first used, so that `import fastdpo` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastdpo.version import __version__

if TYPE_CHECKING:
    from fastdpo.config import DPOConfig
    from fastdpo.trainer import DPOTrainer

_HOMES = {"DPOConfig": "fastdpo.config", "DPOTrainer": "fastdpo.trainer"}

__all__ = ["DPOConfig", "DPOTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastdpo' has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(_HOMES[name]), name)
