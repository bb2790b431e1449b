"""The trainer: `DPOTrainer` and what it is made of. The class is loaded when it is first used."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdpo.trainer.dpo_trainer import DPOTrainer

__all__ = ["DPOTrainer"]


def __getattr__(name: str) -> Any:
    if name != "DPOTrainer":
        raise AttributeError(
            f"module 'fastdpo.trainer' has no attribute {name!r}; it has {__all__}"
        )
    from fastdpo.trainer.dpo_trainer import DPOTrainer

    return DPOTrainer
